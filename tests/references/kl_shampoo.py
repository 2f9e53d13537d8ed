"""KL-Shampoo: Lin et al. 2025 (arXiv 2509.03378), in the variant of https://github.com/yorkerlin/KL-Methods."""

from collections.abc import Sequence

import torch
from torch import Tensor


def kl_shampoo(
    weight: Tensor,
    grads: Sequence[Tensor],
    *,
    lr: float = 1e-4,
    betas: tuple[float, float] = (0.9, 0.98),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    precondition_frequency: int = 10,
    max_precond_dim: int = 10000,
    synchronous: bool = True,
    init_factor: float = 0.1,
) -> Tensor:
    """w ← w − lr Q_L ((Q_Lᵀ m Q_R) / √(λ_L λ_Rᵀ)) Q_Rᵀ, with bases and eigenvalues from before this gradient.

    Then λ_L ← ⟨mean over columns of (Q_Lᵀ g Q_R)² / λ_R⟩ and S_L ← ⟨g Q_R λ_R⁻¹ Q_Rᵀ gᵀ⟩ / cols, the right side alike,
    and, every `precondition_frequency` steps, Q ← QR(S Q). A side longer than `max_precond_dim` keeps Q = I.
    A 3-D weight is a stack of experts. `synchronous`: a reference takes no turns.
    """
    if weight.ndim == 3:
        options = {name: value for name, value in locals().items() if name not in ("weight", "grads")}
        experts = [kl_shampoo(w, [g[i] for g in grads], **options) for i, w in enumerate(weight)]
        return torch.stack(experts) if experts else weight
    if weight.numel() == 0:
        return weight
    beta1, beta2 = betas
    sizes = weight.shape
    bases = [torch.eye(size, dtype=weight.dtype) for size in sizes]
    factors = [weight.new_zeros(size, size) for size in sizes]
    values = [weight.new_full((size,), init_factor) for size in sizes]
    m = torch.zeros_like(weight)
    for step, g in enumerate(grads):
        if step > 0:
            m = beta1 * m + (1 - beta1) * g
            scale = torch.outer(values[0], values[1]).sqrt() + eps
            weight = weight - lr * bases[0] @ (bases[0].T @ m @ bases[1] / scale) @ bases[1].T
            weight = (1 - lr * weight_decay) * weight
        new_values = []
        for side, x in enumerate((g, g.T)):
            other = bases[1 - side] @ torch.diag(1 / values[1 - side]) @ bases[1 - side].T
            covariance = (x @ other @ x.T if step > 0 else x @ x.T) / sizes[1 - side]
            factors[side] = beta2 * factors[side] + (1 - beta2) * covariance
            floor = max(10, min(sizes[side], 4000)) ** -2
            fresh = beta2 * values[side] + (1 - beta2) * (bases[side].T @ covariance @ bases[side]).diagonal()
            new_values.append(fresh.clamp(min=floor) if step > 0 else values[side])
        values = new_values
        for side, size in enumerate(sizes):
            if size <= max_precond_dim and step == 0:
                bases[side] = torch.linalg.eigh(factors[side])[1].flip(1)
            elif size <= max_precond_dim and step % precondition_frequency == 0:
                bases[side] = torch.linalg.qr(factors[side] @ bases[side])[0]
    return weight
