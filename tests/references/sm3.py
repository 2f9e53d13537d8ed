"""SM3: Anil et al. 2019, algorithm SM3-II (arXiv 1901.11150), rows and columns as the cover."""

from collections.abc import Sequence

import torch
from torch import Tensor


def sm3(
    weight: Tensor,
    grads: Sequence[Tensor],
    *,
    lr: float = 0.1,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    eps: float = 1e-30,
) -> Tensor:
    """ν = min(row, col) + g²; row, col ← its maxima; w ← w − lr g / √ν. Vectors: ν ← ν + g²."""
    if not weight.numel():
        return weight  # no maximum
    v, row, col, m = (torch.zeros_like(weight) for _ in range(4))
    for g in grads:
        v = (torch.minimum(row, col) if weight.ndim > 1 else v) + g * g
        if weight.ndim > 1:
            row, col = v.amax(-1, keepdim=True), v.amax(-2, keepdim=True)
        m = momentum * m + (1 - momentum) * g / (v + eps).sqrt()
        weight = weight - lr * (m + weight_decay * weight)
    return weight
