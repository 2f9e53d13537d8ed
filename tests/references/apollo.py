"""APOLLO: Zhu et al. 2024 (arXiv 2412.05270), in the variant of apollo_torch.APOLLOAdamW."""

from collections.abc import Sequence

import torch
from torch import Tensor


def apollo(
    weight: Tensor,
    grads: Sequence[Tensor],
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    rank: int = 256,
    update_proj_gap: int = 200,
    scale: float = 1.0,
    scale_type: str = "channel",
    scale_front: bool = False,
    disable_nl: bool = False,
    seed: int = 1,
) -> Tensor:
    """g, with each row of a matrix that is not wide (each column of a wide one, or all of it) as long as Adam makes the
    same part of a random projection; it grows by 1 % per step at most. A 3-D weight is a stack of experts."""
    if weight.ndim == 3:
        options = {name: value for name, value in locals().items() if name not in ("weight", "grads")}
        return torch.stack([apollo(w, [g[i] for g in grads], **options) for i, w in enumerate(weight)])
    if weight.numel() == 0:
        return weight
    matrix = weight.ndim == 2
    wide = matrix and weight.shape[0] < weight.shape[1]
    m, v, last = torch.zeros(()), torch.zeros(()), None
    for t, g in enumerate(grads, 1):
        low = g
        if matrix:
            r = min(rank, *g.shape)
            generator = torch.Generator().manual_seed(seed + (t - 1) // update_proj_gap)
            p = torch.randn((g.shape[0], r) if wide else (r, g.shape[1]), generator=generator) / r**0.5
            low = p.to(g.dtype).T @ g if wide else g @ p.to(g.dtype).T
        m = betas[0] * m + (1 - betas[0]) * low
        v = betas[1] * v + (1 - betas[1]) * low**2
        step = m / (v.sqrt() + eps)
        if matrix:
            dims = {"channel": (0,) if wide else (1,), "tensor": (0, 1)}[scale_type]
            step = g * step.norm(dim=dims, keepdim=True) / (low.norm(dim=dims, keepdim=True) + 1e-8)
            step = step * scale**0.5 if scale_front else step
            if last is not None and not disable_nl:
                step = step / (max(step.norm() / (last + 1e-8), 1.01) / 1.01)
            last = step.norm()
            step = step if scale_front else step * scale**0.5
        weight = weight - lr * (1 - betas[1] ** t) ** 0.5 / (1 - betas[0] ** t) * step
        weight = weight - lr * weight_decay * weight
    return weight
