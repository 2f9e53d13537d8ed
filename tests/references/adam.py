"""Adam: Kingma and Ba 2015, algorithm 1 (arXiv 1412.6980); NAdam: Dozat 2016, with torch.optim's momentum schedule."""

from collections.abc import Sequence

import torch
from torch import Tensor


def adam(
    weight: Tensor,
    grads: Sequence[Tensor],
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    amsgrad: bool = False,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
) -> Tensor:
    """w ← w − lr m̂ / (√v̂ + ε), g with λw added, or w shrunk first. AMSGrad takes the maximum before the correction."""
    beta1, beta2 = betas
    m, v, v_max = (torch.zeros_like(weight) for _ in range(3))
    for t, grad in enumerate(grads, start=1):
        g, weight = decayed(-grad if maximize else grad, weight, lr, weight_decay, decoupled_weight_decay)
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        v_max = torch.maximum(v_max, v)
        v_hat = (v_max if amsgrad else v) / (1 - beta2**t)
        weight = weight - lr * m / (1 - beta1**t) / (v_hat.sqrt() + eps)
    return weight


def nadam(
    weight: Tensor,
    grads: Sequence[Tensor],
    *,
    lr: float = 2e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum_decay: float = 4e-3,
    decoupled_weight_decay: bool = False,
) -> Tensor:
    """m̂ = μₜ₊₁ m / (1 − Πμ over t + 1 steps) + (1 − μₜ) g / (1 − Πμ over t steps)."""
    beta1, beta2 = betas
    mus = [beta1 * (1 - 0.5 * 0.96 ** (t * momentum_decay)) for t in range(1, len(grads) + 2)]
    m, v, product = torch.zeros_like(weight), torch.zeros_like(weight), 1.0
    for t, grad in enumerate(grads, start=1):
        g, weight = decayed(grad, weight, lr, weight_decay, decoupled_weight_decay)
        product *= mus[t - 1]
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        m_hat = mus[t] * m / (1 - product * mus[t]) + (1 - mus[t - 1]) * g / (1 - product)
        weight = weight - lr * m_hat / ((v / (1 - beta2**t)).sqrt() + eps)
    return weight


def decayed(grad: Tensor, weight: Tensor, lr: float, weight_decay: float, decoupled: bool) -> tuple[Tensor, Tensor]:
    """Gradient and weight after decay, which goes into one of them."""
    if decoupled:
        return grad, weight * (1 - lr * weight_decay)
    return grad + weight_decay * weight, weight
