"""QK-clip: Kimi Team 2025, algorithm 1 (arXiv 2507.20534)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.references.muon import newton_schulz


def muon_clip(
    weight: Tensor,
    grads: Sequence[Tensor],
    observed: Mapping[int, Tensor] | None = None,
    *,
    lr: float = 1e-3,
    weight_decay: float = 0.1,
    momentum: float = 0.95,
    tau: float = 100.0,
    alpha: float = 0.5,
    **options: Any,
) -> Tensor:
    """Muon; after a step, blocks of rows whose observed number is above tau are multiplied by (tau / number)^alpha. A
    3-D weight is a stack of experts, whose rows are numbered through."""
    if weight.numel() == 0:
        return weight
    rows, cols = weight.shape[-2:]
    m = torch.zeros_like(weight)
    for t, g in enumerate(grads):
        m = momentum * m + (1 - momentum) * g
        update = (1 - momentum) * g + momentum * m
        stack = [newton_schulz(u, [(3.4445, -4.7750, 2.0315)] * 5) for u in update.reshape(-1, rows, cols)]
        direction = torch.stack(stack).reshape(weight.shape)
        weight = (1 - lr * weight_decay) * weight - lr * max(1, rows / cols) ** 0.5 * direction
        if observed is not None and t in observed:
            flat = weight.reshape(-1, cols)
            factor = (tau / observed[t].clamp(min=tau)) ** alpha
            flat = flat * factor.repeat_interleave(len(flat) // len(factor))[:, None]
            weight = flat.reshape(weight.shape)
    return weight
