"""Adafactor: Shazeer and Stern 2018, algorithms 4 and 5 (arXiv 1804.04235), with torch.optim.Adafactor's lr and ε₁."""

from collections.abc import Sequence

import torch
from torch import Tensor


def adafactor(
    weight: Tensor,
    grads: Sequence[Tensor],
    *,
    lr: float = 1e-2,
    beta2_decay: float = -0.8,
    eps: tuple[float | None, float] = (None, 1e-3),
    d: float = 1.0,
    weight_decay: float = 0.0,
    scale_parameter: bool = True,
    maximize: bool = False,
) -> Tensor:
    """The second moment of a matrix is the outer product of its row and column means over the mean of all.

    Deviations from the paper, torch's: ρ = min(lr, 1/√t); weight decay scaled by lr; ε₁ bounds the denominators
    instead of being added to g² (None is the machine epsilon of float32, whatever the dtype here). Transformers', for
    `scale_parameter=False`: the step size is lr.
    Tensors of more than two dims are stacks of matrices with one clipping threshold and one scale.
    """
    eps1 = torch.finfo(torch.float32).eps if eps[0] is None else eps[0]
    factored = weight.ndim > 1
    row, col, v = weight.new_zeros(()), weight.new_zeros(()), torch.zeros_like(weight)
    for t, grad in enumerate(grads, start=1):
        g = -grad if maximize else grad
        beta2 = 1 - t**beta2_decay
        alpha = min(lr, t**-0.5) * max(eps[1], rms(weight)) if scale_parameter else lr
        if factored:
            row = beta2 * row + (1 - beta2) * (g * g).mean(dim=-1, keepdim=True)
            col = beta2 * col + (1 - beta2) * (g * g).mean(dim=-2, keepdim=True)
            v = row * col / row.mean(dim=-2, keepdim=True).clamp(min=eps1)
        else:
            v = beta2 * v + (1 - beta2) * g * g
        update = g / v.sqrt().clamp(min=eps1)
        update = update / max(1.0, rms(update) / d)
        weight = (1 - lr * weight_decay) * weight - alpha * update
    return weight


def rms(x: Tensor) -> float:
    """Root of the mean square of all elements."""
    return x.square().mean().sqrt().item()
