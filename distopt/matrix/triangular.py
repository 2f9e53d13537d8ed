"""Factors Q of a preconditioner Qᵀ Q that are fitted without inverses (Li 2015, arXiv 1512.04202; Li 2018,
arXiv 1809.10232): upper triangular (k, n, n), or diagonal, kept as (k, n, 1)."""

import torch
from torch import Tensor

TINY = torch.finfo(torch.bfloat16).tiny


def identity(like: Tensor) -> Tensor:
    """The factor to begin with, shaped as `like`."""
    if like.shape[-1] == 1:
        return torch.ones_like(like)
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device).expand_as(like)


def multiply(q: Tensor, x: Tensor) -> Tensor:
    """Q X for x (k, n, m)."""
    return q * x if q.shape[-1] == 1 else q @ x


def multiply_transposed(q: Tensor, x: Tensor) -> Tensor:
    """Qᵀ X."""
    return q * x if q.shape[-1] == 1 else q.mT @ x


def solve_transposed(q: Tensor, x: Tensor) -> Tensor:
    """Q^(−T) X."""
    return x / q if q.shape[-1] == 1 else torch.linalg.solve_triangular(q.mT, x, upper=False)


def fit(q: Tensor, a: Tensor, b: Tensor, lr: float) -> Tensor:
    """One step of Q towards A Aᵀ = B Bᵀ, relative to their size: Q − lr · triu(A Aᵀ − B Bᵀ) Q / ‖A Aᵀ + B Bᵀ‖.

    Args:
        q: (k, n, n) or (k, n, 1).
        a, b: (k, n, m), the preconditioned gradient and the probe under the inverse.
        lr: relative step, below 1.

    Returns:
        The new factor; the old one where the new one is not finite.
    """
    if q.shape[-1] == 1:
        ours, probes = a.square().sum(-1, keepdim=True), b.square().sum(-1, keepdim=True)
        new = q - lr * (ours - probes) * q / ((ours + probes).amax(-2, keepdim=True) + TINY)
    else:
        ours, probes = a @ a.mT, b @ b.mT
        new = q - lr * (ours - probes).triu() / (norm_bound(ours + probes) + TINY) @ q
    return torch.where(new.isfinite().all(-1, keepdim=True).all(-2, keepdim=True), new, q)


def norm_bound(x: Tensor) -> Tensor:
    """A lower bound of the spectral norm of symmetric x (k, n, n), (k, 1, 1): ‖X u‖ for u along X times its longest
    column."""
    largest = x.abs().amax((-2, -1), keepdim=True)
    x = x / torch.where(largest > 0, largest, 1.0)
    longest = x.square().sum(-2, keepdim=True).argmax(-1, keepdim=True).expand(-1, x.shape[-2], 1)
    u = x @ x.gather(-1, longest)
    length = torch.linalg.vector_norm(u, dim=-2, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    return largest * torch.linalg.vector_norm(x @ (u / length), dim=-2, keepdim=True)
