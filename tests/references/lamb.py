"""LAMB: You et al. 2020, algorithm 2 (arXiv 1904.00962); LARS: You et al. 2017 (arXiv 1708.03888), both as in timm."""

from collections.abc import Sequence

import torch
from torch import Tensor


def lamb(
    weight: Tensor,
    grads: Sequence[Tensor],
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.01,
) -> Tensor:
    """u = m̂ / (√v̂ + ε) + λ w; w ← w − lr ‖w‖ / ‖u‖ · u, the ratio 1 where a norm is 0."""
    beta1, beta2 = betas
    m, v = torch.zeros_like(weight), torch.zeros_like(weight)
    for t, g in enumerate(grads, start=1):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        u = m / (1 - beta1**t) / ((v / (1 - beta2**t)).sqrt() + eps) + weight_decay * weight
        norms = weight.norm().item(), u.norm().item()
        weight = weight - lr * (norms[0] / norms[1] if min(norms) > 0 else 1.0) * u
    return weight


def lars(
    weight: Tensor,
    grads: Sequence[Tensor],
    *,
    lr: float = 1.0,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    trust_coeff: float = 1e-3,
    eps: float = 1e-8,
) -> Tensor:
    """g ← η ‖w‖ / (‖g‖ + λ ‖w‖ + ε) · (g + λ w) on matrices, then SGD with momentum; vectors are SGD."""
    buffer = None
    for grad in grads:
        g = grad + weight_decay * weight
        norms = weight.norm().item(), grad.norm().item()
        if weight.ndim > 1 and min(norms) > 0:
            g = g * trust_coeff * norms[0] / (norms[1] + weight_decay * norms[0] + eps)
        buffer = g if buffer is None else momentum * buffer + (1 - dampening) * g
        if momentum:
            g = g + momentum * buffer if nesterov else buffer
        weight = weight - lr * g
    return weight
