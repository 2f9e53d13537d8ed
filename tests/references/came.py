"""CAME: Luo et al. 2023, algorithm 2 (arXiv 2307.02047)."""

from collections.abc import Sequence

import torch
from torch import Tensor


def came(
    weight: Tensor,
    grads: Sequence[Tensor],
    *,
    lr: float = 2e-4,
    eps: tuple[float, float] = (1e-30, 1e-16),
    clip_threshold: float = 1.0,
    betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
    weight_decay: float = 0.0,
) -> Tensor:
    """u = g / √v̂, clipped to an RMS; m ← β₁ m + (1 − β₁) u; w ← w − lr m / √ŝ, where v̂ and ŝ are the factored means of
    g² + ε₁ and (u − m)² + ε₂. Vectors: v whole, no ŝ."""
    beta1, beta2, beta3 = betas
    m, v = torch.zeros_like(weight), torch.zeros_like(weight)
    second, residual = (v, v), (v, v)
    for g in grads:
        square = g * g + eps[0]
        if weight.ndim > 1:
            second = averaged(second, square, beta2)
            u = g / outer(*second).sqrt()
        else:
            v = beta2 * v + (1 - beta2) * square
            u = g / v.sqrt()
        u = u / (u.square().mean().sqrt() / clip_threshold).clamp(min=1)
        m = beta1 * m + (1 - beta1) * u
        step = m
        if weight.ndim > 1:
            residual = averaged(residual, (u - m) ** 2 + eps[1], beta3)
            step = m / outer(*residual).sqrt()
        weight = weight - lr * (step + weight_decay * weight)
    return weight


def averaged(old: tuple[Tensor, Tensor], x: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Running row and column means."""
    row, col = old
    return beta * row + (1 - beta) * x.mean(-1, keepdim=True), beta * col + (1 - beta) * x.mean(-2, keepdim=True)


def outer(row: Tensor, col: Tensor) -> Tensor:
    """The matrix of rank 1 with these row and column means."""
    return row * col / row.mean(-2, keepdim=True)
