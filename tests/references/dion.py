"""Dion: Ahn et al. 2025, algorithm 2 (arXiv 2504.05295), as in https://github.com/microsoft/dion."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def dion(
    weight: Tensor,
    grads: Sequence[Tensor],
    *,
    lr: float = 1e-2,
    mu: float = 0.95,
    weight_decay: float = 0.01,
    rank_fraction: float = 1.0,
    eps: float = 1e-8,
    adjust_lr_fn: str | None = "spectral",
    seed: int = 0,
) -> Tensor:
    """m ← m + g ≈ p rᵀ; w ← w − lr p qᵀ, q the columns of r made unit vectors; m ← m − (1 − mu) p rᵀ. A wide matrix is
    transposed. A 3-D weight is a stack of experts."""
    if weight.ndim == 3:
        options = {name: value for name, value in locals().items() if name not in ("weight", "grads")}
        return torch.stack([dion(w, [g[i] for g in grads], **options) for i, w in enumerate(weight)])
    if weight.numel() == 0:
        return weight
    rows, cols = weight.shape
    scale = {
        None: math.sqrt(max(1, rows / cols)),
        "match_rms_adamw": 0.2 * math.sqrt(max(rows, cols)),
        "spectral": math.sqrt(rows / cols),
    }[adjust_lr_fn]
    wide = rows < cols
    w = weight.T if wide else weight
    short = min(rows, cols)
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(short, math.ceil(rank_fraction * short), generator=generator).to(w.dtype)
    m = torch.zeros_like(w)
    for g in grads:
        m = m + (g.T if wide else g)
        p = torch.linalg.qr(m @ q)[0]
        r = m.T @ p
        m = m - (1 - mu) * p @ r.T
        q = r / (r.norm(dim=0) + eps)
        w = (1 - lr * weight_decay) * w - lr * scale * p @ q.T
    return w.T if wide else w
