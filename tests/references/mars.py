"""MARS-AdamW: Yuan et al. 2024 (arXiv 2411.10438), the approximate form."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.references.adamw import adamw


def mars(
    weight: Tensor,
    grads: Sequence[Tensor],
    *,
    lr: float = 3e-3,
    betas: tuple[float, float] = (0.95, 0.99),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    amsgrad: bool = False,
    gamma: float = 0.025,
    optimize_1d: bool = False,
    betas_1d: tuple[float, float] = (0.9, 0.95),
) -> Tensor:
    """AdamW on c = g + γ β₁ / (1 − β₁) (g − g before), clipped to norm 1; vectors are AdamW with betas of their own."""
    corrects = optimize_1d or weight.ndim > 1
    if corrects:
        before = [torch.zeros_like(weight), *grads[:-1]]
        raw = [g + gamma * betas[0] / (1 - betas[0]) * (g - old) for g, old in zip(grads, before)]
        grads = [c / max(1.0, c.norm().item()) for c in raw]
    used = betas if corrects else betas_1d
    return adamw(weight, grads, lr=lr, betas=used, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad)
