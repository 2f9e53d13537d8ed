"""Signum: Bernstein et al. 2018, algorithm 2 (arXiv 1802.04434)."""

from collections.abc import Sequence

import torch
from torch import Tensor


def signum(
    weight: Tensor, grads: Sequence[Tensor], *, lr: float = 1e-3, momentum: float = 0.9, weight_decay: float = 0.0
) -> Tensor:
    """m ← β m + (1 − β) g; w ← w − lr (sign(m) + λ w)."""
    m = torch.zeros_like(weight)
    for g in grads:
        m = momentum * m + (1 - momentum) * g
        weight = weight - lr * (m.sign() + weight_decay * weight)
    return weight
