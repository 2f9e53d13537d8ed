"""AdEMAMix: Pagliardini et al. 2024, algorithm 1 (arXiv 2409.03137)."""

from collections.abc import Sequence
from math import exp, log

import torch
from torch import Tensor


def ademamix(
    weight: Tensor,
    grads: Sequence[Tensor],
    *,
    lr: float = 1e-3,
    betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
    alpha: float = 5.0,
    t_alpha: int | None = None,
    t_beta3: int | None = None,
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
) -> Tensor:
    """w ← w − lr ((m̂₁ + α m₂) / (√v̂ + ε) + λ w), where α and β₃ are warmed up over t_alpha and t_beta3 steps."""
    beta1, beta2, beta3 = betas
    fast, slow, v = (torch.zeros_like(weight) for _ in range(3))
    for t, g in enumerate(grads, start=1):
        alpha_t = min(t * alpha / t_alpha, alpha) if t_alpha else alpha
        beta3_t = beta3
        if t_beta3:
            part = t / t_beta3
            beta3_t = min(exp(log(beta1) * log(beta3) / ((1 - part) * log(beta3) + part * log(beta1))), beta3)
        fast = beta1 * fast + (1 - beta1) * g
        slow = beta3_t * slow + (1 - beta3_t) * g
        v = beta2 * v + (1 - beta2) * g * g
        step = (fast / (1 - beta1**t) + alpha_t * slow) / ((v / (1 - beta2**t)).sqrt() + eps)
        weight = weight - lr * (step + weight_decay * weight)
    return weight
