"""AdaLomo: Lv et al. 2023, algorithm 1 (arXiv 2310.10195), with lomo_optim's order of weight decay."""

from collections.abc import Sequence

import torch
from torch import Tensor


def adalomo(
    weight: Tensor,
    grads: Sequence[Tensor],
    *,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    clip_threshold: float = 1.0,
    decay_rate: float = -0.8,
    eps: tuple[float, float] = (1e-30, 1e-3),
) -> Tensor:
    """u = g / √v with v the outer product of its row and column means over the mean of all; clipped, and as long as the
    weights. Tensors of more than two dims are stacks of matrices."""
    row, col, v = weight.new_zeros(()), weight.new_zeros(()), torch.zeros_like(weight)
    if weight.numel() == 0:
        return weight
    for t, g in enumerate(grads, start=1):
        beta2 = 1 - t**decay_rate
        square = g * g + eps[0]
        if weight.ndim > 1:
            row = beta2 * row + (1 - beta2) * square.mean(dim=-1, keepdim=True)
            col = beta2 * col + (1 - beta2) * square.mean(dim=-2, keepdim=True)
            v = row * col / row.mean(dim=-2, keepdim=True)
        else:
            v = beta2 * v + (1 - beta2) * square
        u = g / v.sqrt()
        u = u / max(1.0, u.square().mean().sqrt().item() / clip_threshold)
        relative = lr * max(eps[1], weight.square().mean().sqrt().item())
        weight = (1 - relative * weight_decay) * weight - relative * u
    return weight
