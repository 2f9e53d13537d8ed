"""Lion: Chen et al. 2023, algorithm 2 (arXiv 2302.06675)."""

from collections.abc import Sequence

import torch
from torch import Tensor


def lion(
    weight: Tensor,
    grads: Sequence[Tensor],
    *,
    lr: float = 1e-4,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
) -> Tensor:
    """c ← β₁ m + (1 − β₁) g; w ← w − lr (sign(c) + λ w); m ← β₂ m + (1 − β₂) g."""
    beta1, beta2 = betas
    m = torch.zeros_like(weight)
    for g in grads:
        c = beta1 * m + (1 - beta1) * g
        weight = weight - lr * (c.sign() + weight_decay * weight)
        m = beta2 * m + (1 - beta2) * g
    return weight
