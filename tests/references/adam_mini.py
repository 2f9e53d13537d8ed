"""Adam-mini: Zhang et al. 2024 (arXiv 2406.16793), one block per row of a matrix, one for a vector."""

from collections.abc import Sequence

import torch
from torch import Tensor


def adam_mini(
    weight: Tensor,
    grads: Sequence[Tensor],
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> Tensor:
    """AdamW with v ← β₂ v + (1 − β₂) mean(g² over the block)."""
    beta1, beta2 = betas
    m, v = torch.zeros_like(weight), weight.new_zeros(())
    for t, g in enumerate(grads, start=1):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * (g * g).mean(-1, keepdim=True)
        weight = (1 - lr * weight_decay) * weight
        weight = weight - lr * m / (1 - beta1**t) / ((v / (1 - beta2**t)).sqrt() + eps)
    return weight
