"""Prodigy (Mishchenko and Defazio 2024, arXiv 2306.06101, algorithm 4), and with schedule-free averaging."""

from collections.abc import Sequence

import torch
from torch import Tensor


def prodigy(
    weight: Tensor,
    grads: Sequence[Tensor],
    *,
    lr: float = 1.0,
    betas: tuple[float, float] = (0.9, 0.999),
    beta3: float | None = None,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    use_bias_correction: bool = False,
    safeguard_warmup: bool = False,
    d0: float = 1e-6,
    d_coef: float = 1.0,
    growth_rate: float = float("inf"),
    schedule_free: bool = False,
) -> Tensor:
    """w ← w − d γ (m / (√v + d ε) + λ w), where d is the largest ⟨g, w₀ − w⟩ / ‖s‖₁ so far, both decayed by β₃.

    `schedule_free`: z takes the steps, with g for m, and gradients are taken at y = (1 − β₁) z + β₁ x.
    """
    beta1, beta2 = betas
    beta3 = beta2**0.5 if beta3 is None else beta3
    first = y = z = x = weight
    m, v, s = (torch.zeros_like(weight) for _ in range(3))
    d = largest_d = d0
    numerator = total = largest = 0.0
    for t, g in enumerate(grads, start=1):
        gamma = lr * ((1 - beta2**t) ** 0.5 / (1 - beta1**t) if use_bias_correction else 1.0)
        step = d * gamma
        m = beta1 * m + (1 - beta1) * d * g
        v = beta2 * v + (1 - beta2) * (d * g) ** 2
        numerator = beta3 * numerator + d / d0 * step * float((g * (first - y)).sum())
        s = beta3 * s + d / d0 * (d if safeguard_warmup else step) * g
        new_d, length = d, float(s.abs().sum())
        if length > 0:
            found = d_coef * numerator / length
            largest_d = max(largest_d, found)
            new_d = min(largest_d, (max(d, found) if d == d0 else d) * growth_rate)
        direction = (d * g if schedule_free else m) / (v.sqrt() + new_d * eps) + weight_decay * y
        d = new_d
        if schedule_free:
            z = z - step * direction
            largest = max(largest, step)
            total += largest**2
            x = x + (z - x) * (largest**2 / total if total else 0.0)
            y = (1 - beta1) * z + beta1 * x
        else:
            y = y - step * direction
    return y
