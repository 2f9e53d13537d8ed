"""Schedule-Free learning (Defazio et al. 2024, arXiv 2405.15682): the weights y at which gradients are taken."""

from collections.abc import Sequence

import torch
from torch import Tensor


def schedule_free(
    weight: Tensor,
    grads: Sequence[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float | None = None,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    warmup_steps: int = 0,
    r: float = 0.0,
    weight_lr_power: float = 2.0,
) -> Tensor:
    """z ← z − γ d, x ← (1 − c) x + c z, y ← (1 − β₁) z + β₁ x, with d = g / (√v̂ + ε) + λ y, or g + λ y without `beta2`."""
    z, x, y, v = weight, weight, weight, torch.zeros_like(weight)
    total, largest = 0.0, 0.0
    for t, g in enumerate(grads, start=1):
        step = lr * min(1.0, t / warmup_steps) if warmup_steps else lr
        if beta2 is not None:
            v = beta2 * v + (1 - beta2) * g * g
            g = g / ((v / (1 - beta2**t)).sqrt() + eps)
        z = z - step * (g + weight_decay * y)
        largest = max(largest, step)
        total += t**r * largest**weight_lr_power
        c = t**r * largest**weight_lr_power / total if total else 0.0
        x = (1 - c) * x + c * z
        y = (1 - beta1) * z + beta1 * x
    return y


def schedule_free_sgd(
    weight: Tensor, grads: Sequence[Tensor], *, lr: float = 1.0, momentum: float = 0.9, **options: float
) -> Tensor:
    """Without second moments."""
    return schedule_free(weight, grads, lr=lr, beta1=momentum, **options)


def schedule_free_adamw(
    weight: Tensor,
    grads: Sequence[Tensor],
    *,
    lr: float = 0.0025,
    betas: tuple[float, float] = (0.9, 0.999),
    **options: float,
) -> Tensor:
    """With Adam's."""
    return schedule_free(weight, grads, lr=lr, beta1=betas[0], beta2=betas[1], **options)
