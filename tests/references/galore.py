"""GaLore: Zhao et al. 2024, algorithm 2 (arXiv 2403.03507), in the variant of galore_torch.GaLoreAdamW."""

from collections.abc import Sequence

import torch
from torch import Tensor


def galore(
    weight: Tensor,
    grads: Sequence[Tensor],
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    rank: int = 128,
    update_proj_gap: int = 200,
    scale: float = 0.25,
    synchronous: bool = True,
) -> Tensor:
    """Adam in the coordinates of the gradient's first singular vectors, on the right of matrices that are not wide. Their
    largest entry is positive. A 3-D weight is a stack of experts; vectors are not projected."""
    if weight.ndim == 3:
        options = {name: value for name, value in locals().items() if name not in ("weight", "grads")}
        return torch.stack([galore(w, [g[i] for g in grads], **options) for i, w in enumerate(weight)])
    if weight.numel() == 0:
        return weight
    projected = weight.ndim == 2
    right = projected and weight.shape[0] >= weight.shape[1]
    basis, m, v = torch.eye(1), torch.zeros(()), torch.zeros(())
    for t, g in enumerate(grads, 1):
        if projected and (t - 1) % update_proj_gap == 0:
            u, _, vt = torch.linalg.svd(g)
            basis = (vt.T if right else u)[:, : min(rank, *g.shape)]
            basis = basis * torch.stack([column[column.abs().argmax()].sign() for column in basis.T])
        low = g if not projected else g @ basis if right else basis.T @ g
        m = betas[0] * m + (1 - betas[0]) * low
        v = betas[1] * v + (1 - betas[1]) * low**2
        step = m / (v.sqrt() + eps) * (1 - betas[1] ** t) ** 0.5 / (1 - betas[0] ** t)
        if projected:
            step = scale * (step @ basis.T if right else basis @ step)
        weight = weight - lr * step
        weight = weight - lr * weight_decay * weight
    return weight
