"""Sophia: Liu et al. 2023, algorithm 3 (arXiv 2305.14342), in the variant of https://github.com/Liuhong99/Sophia."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def sophia(
    weight: Tensor,
    grads: Sequence[Tensor],
    observed: Mapping[int, Tensor] | None = None,
    *,
    lr: float = 1e-4,
    betas: tuple[float, float] = (0.965, 0.99),
    rho: float = 0.04,
    weight_decay: float = 0.1,
    bs: float = 5120,
    squared: bool = True,
) -> Tensor:
    """w ← (1 − lr λ) w − lr sign(m) min(|m| / (ρ bs h + 1e-15), 1), with h a mean of what is observed, or its square."""
    m, h = torch.zeros_like(weight), torch.zeros_like(weight)
    for t, g in enumerate(grads):
        if observed is not None and t in observed:
            seen = observed[t] ** 2 if squared else observed[t]
            h = betas[1] * h + (1 - betas[1]) * seen
        m = betas[0] * m + (1 - betas[0]) * g
        ratio = (m.abs() / (rho * bs * h.clamp(min=0) + 1e-15)).clamp(max=1)
        weight = (1 - lr * weight_decay) * weight - lr * m.sign() * ratio
    return weight
