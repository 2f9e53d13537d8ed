"""AdaGrad: Duchi et al. 2011; RMSProp: Tieleman and Hinton 2012; Adadelta: Zeiler 2012 (arXiv 1212.5701)."""

from collections.abc import Sequence

import torch
from torch import Tensor


def adagrad(
    weight: Tensor,
    grads: Sequence[Tensor],
    *,
    lr: float = 1e-2,
    lr_decay: float = 0.0,
    weight_decay: float = 0.0,
    initial_accumulator_value: float = 0.0,
    eps: float = 1e-10,
) -> Tensor:
    """s ← s + g²; w ← w − lr / (1 + (t − 1) lr_decay) · g / (√s + ε)."""
    s = torch.full_like(weight, initial_accumulator_value)
    for t, grad in enumerate(grads, start=1):
        g = grad + weight_decay * weight
        s = s + g * g
        weight = weight - lr / (1 + (t - 1) * lr_decay) * g / (s.sqrt() + eps)
    return weight


def rmsprop(
    weight: Tensor,
    grads: Sequence[Tensor],
    *,
    lr: float = 1e-2,
    alpha: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    centered: bool = False,
) -> Tensor:
    """v ← α v + (1 − α) g²; b ← μ b + g / (√v + ε), where centered takes ⟨g⟩² from v; w ← w − lr b."""
    v, mean, b = (torch.zeros_like(weight) for _ in range(3))
    for grad in grads:
        g = grad + weight_decay * weight
        v = alpha * v + (1 - alpha) * g * g
        mean = alpha * mean + (1 - alpha) * g
        b = momentum * b + g / ((v - mean * mean if centered else v).sqrt() + eps)
        weight = weight - lr * b
    return weight


def adadelta(
    weight: Tensor,
    grads: Sequence[Tensor],
    *,
    lr: float = 1.0,
    rho: float = 0.9,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
) -> Tensor:
    """Δ = √(d + ε) / √(v + ε) · g with v, d the running means of g² and Δ²; w ← w − lr Δ."""
    v, d = torch.zeros_like(weight), torch.zeros_like(weight)
    for grad in grads:
        g = grad + weight_decay * weight
        v = rho * v + (1 - rho) * g * g
        delta = ((d + eps) / (v + eps)).sqrt() * g
        d = rho * d + (1 - rho) * delta * delta
        weight = weight - lr * delta
    return weight
