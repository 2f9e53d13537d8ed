"""Shampoo: Gupta et al. 2018 (arXiv 1802.09568), with the running means and grafting of Shi et al. 2023 (2309.06497)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def eigenpairs(factor: Tensor, basis: Tensor | None) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors; or, by one orthogonal iteration from a basis sorted by Rayleigh quotients, nearly."""
    if basis is None:
        return torch.linalg.eigh(factor)
    product = factor @ basis
    order = (basis * product).sum(dim=0).argsort(descending=True)
    vectors = torch.linalg.qr(product[:, order])[0]
    return (vectors * (factor @ vectors)).sum(dim=0), vectors


def kronecker_product(m: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Shampoo's combination of L^(−1/4) and R^(−1/4)."""
    return left @ m @ right


def shampoo(
    weight: Tensor,
    grads: Sequence[Tensor],
    *,
    lr: float = 1e-2,
    betas: tuple[float, float] = (0.0, 0.99),
    eps: float = 1e-12,
    weight_decay: float = 0.0,
    precondition_frequency: int = 1,
    max_precond_dim: int = 10000,
    synchronous: bool = True,
    root: str = "eigh",
    grafting: str | None = None,
    grafting_eps: float = 1e-8,
    combine: Callable[[Tensor, Tensor, Tensor], Tensor] = kronecker_product,
) -> Tensor:
    """Roots (factor + eps)^(−1/4) are taken of bias-corrected means, at step 1 and every multiple of the frequency.

    A side longer than `max_precond_dim` has the identity, and the other one the root −1/2; without any side, as for
    vectors, a step is the grafted rule's, or Adam's with β₂. "newton" is "eigh" in exact arithmetic.
    A 3-D weight is a stack of experts, each a matrix of its own. `synchronous`: a reference takes no turns.
    """
    if weight.ndim == 3:
        options = {name: value for name, value in locals().items() if name not in ("weight", "grads")}
        experts = [shampoo(w, [g[i] for g in grads], **options) for i, w in enumerate(weight)]
        return torch.stack(experts) if experts else weight
    if weight.numel() == 0:
        return weight
    beta1, beta2 = betas
    sides = [side for side in range(2) if weight.ndim == 2 and weight.shape[side] <= max_precond_dim]
    mean, squares = torch.zeros_like(weight), torch.zeros_like(weight)
    factors = {side: weight.new_zeros(weight.shape[side], weight.shape[side]) for side in sides}
    bases: dict[int, Tensor | None] = dict.fromkeys(sides)
    roots: dict[int, Tensor] = {}
    for step, g in enumerate(grads, start=1):
        mean = beta1 * mean + (1 - beta1) * g
        direction = m = mean / (1 - beta1**step)
        if grafting == "adagrad":
            squares = squares + g * g
            direction = m / (squares.sqrt() + grafting_eps)
        elif grafting == "adam" or (grafting is None and not sides):
            squares = beta2 * squares + (1 - beta2) * g * g
            direction = m / ((squares / (1 - beta2**step)).sqrt() + grafting_eps)
        for side in sides:
            factors[side] = beta2 * factors[side] + (1 - beta2) * (g @ g.T if side == 0 else g.T @ g)
            if step == 1 or step % precondition_frequency == 0:
                ridged = factors[side] / (1 - beta2**step) + eps * torch.eye(weight.shape[side], dtype=weight.dtype)
                values, vectors = eigenpairs(ridged, bases[side])
                bases[side] = vectors if root == "qr" else None
                roots[side] = vectors @ torch.diag(values.clamp(min=eps) ** (-1 / (2 * len(sides)))) @ vectors.T
        if sides:
            both = combine(m, roots[0], roots[1]) if len(sides) == 2 else roots[0] @ m if 0 in sides else m @ roots[1]
            direction = both * direction.norm() / (both.norm() + 1e-16) if grafting else both
        weight = (1 - lr * weight_decay) * weight - lr * direction
    return weight
