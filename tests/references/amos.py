"""Amos: Tian and Parikh 2022, algorithm 1 (arXiv 2210.11693), with one second moment per matrix."""

from collections.abc import Sequence

import torch
from torch import Tensor


def amos(
    weight: Tensor,
    grads: Sequence[Tensor],
    *,
    lr: float = 1e-3,
    beta: float = 0.999,
    momentum: float = 0.0,
    extra_l2: float = 0.0,
    c_coef: float = 0.25,
    d_coef: float = 0.25,
    eps: float = 1e-18,
) -> Tensor:
    """γ = c ξ² g² / v̂; w ← w − d (ξ η g / √v̂ + (γ − λ) w / 2); b ← b + γ (1 + b), with η = √(2 / cols) or ½,
    c = (1 + ¼ √ξ b)^−½ and d = 1 / (1 + ¼ √(ξ η) b)."""
    eta = (2 / weight.shape[-1]) ** 0.5 if weight.ndim > 1 else 0.5
    v = b = weight.new_zeros((*weight.shape[:-2], 1, 1) if weight.ndim > 1 else ())
    m = torch.zeros_like(weight)
    for t, g in enumerate(grads, start=1):
        square = (g * g).mean((-2, -1), keepdim=True) if weight.ndim > 1 else (g * g).mean()
        v = beta * v + (1 - beta) * square
        v_hat = (v + eps) / (1 - beta**t)
        gamma = lr**2 * square / v_hat / (1 + c_coef * lr**0.5 * b).sqrt()
        step = lr * eta * g / v_hat.sqrt() + (gamma - extra_l2) / 2 * weight
        m = momentum * m + (1 - momentum) * step / (1 + d_coef * (lr * eta) ** 0.5 * b)
        b = b + gamma * (1 + b)
        weight = weight - m
    return weight
