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
    cautious: bool = False,
) -> Tensor:
    """c ← β₁ m + (1 − β₁) g; w ← w − lr (sign(c) + λ w); m ← β₂ m + (1 − β₂) g.
    Cautious: s ← s · [s g > 0] · numel / (number of those + 1) for the sign s."""
    beta1, beta2 = betas
    m = torch.zeros_like(weight)
    for g in grads:
        s = (beta1 * m + (1 - beta1) * g).sign()
        if cautious:
            s = s * (s * g > 0) * s.numel() / (int((s * g > 0).sum()) + 1)
        weight = weight - lr * (s + weight_decay * weight)
        m = beta2 * m + (1 - beta2) * g
    return weight
