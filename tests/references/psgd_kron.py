"""PSGD with Kronecker factors: Li 2018 (arXiv 1809.10232), in the variant of pytorch_optimizer and kron_torch."""

from collections.abc import Sequence

import torch
from torch import Tensor


def psgd_kron(
    weight: Tensor,
    grads: Sequence[Tensor],
    *,
    lr: float = 1e-3,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    update_probability: float | None = None,
    max_size_triangular: int = 8192,
    precondition_lr: float = 0.1,
    seed: int = 0,
) -> Tensor:
    """Factors as full matrices, inverses by inverting. A 3-D weight is a stack of experts."""
    if weight.ndim == 3:
        options = {name: value for name, value in locals().items() if name not in ("weight", "grads")}
        return torch.stack([psgd_kron(w, [g[i] for g in grads], **options) for i, w in enumerate(weight)])
    if weight.numel() == 0:
        return weight
    factors = [torch.eye(n, dtype=weight.dtype) for n in weight.shape]
    diagonal = [n == 1 or n > max_size_triangular for n in weight.shape]
    m = torch.zeros_like(weight)
    waited = 0.0
    for t, g in enumerate(grads, 1):
        m = momentum * m + (1 - momentum) * g
        mean = m / (1 - momentum**t)
        waited += 1 if update_probability is None else update_probability
        if waited > 1 - 1e-9:
            waited -= 1
            generator = torch.Generator().manual_seed(seed + t)
            v = torch.randn(*weight.shape, generator=generator).to(weight.dtype)
            a = factors[0] @ mean @ factors[1].T
            b = torch.linalg.inv(factors[0]).T @ v @ torch.linalg.inv(factors[1])
            pairs = [(a @ a.T, b @ b.T), (a.T @ a, b.T @ b)]
            for side, (ours, probes) in enumerate(pairs):
                if diagonal[side]:
                    ours, probes = ours.diag().diag(), probes.diag().diag()
                    size = (ours + probes).diag().max()
                else:
                    size = bound(ours + probes)
                factors[side] = factors[side] - precondition_lr * (ours - probes).triu() / size @ factors[side]
        direction = factors[0].T @ factors[0] @ mean @ factors[1].T @ factors[1]
        direction = direction * min(1.0, 1.1 / (direction.square().mean().sqrt().item() + 1e-6))
        weight = weight - lr * (direction + weight_decay * weight)
    return weight


def bound(x: Tensor) -> Tensor:
    """‖x u‖ for u along x times the longest column of x."""
    column = x[:, x.norm(dim=0).argmax()]
    u = x @ column
    return (x @ (u / u.norm())).norm()
