"""Dion2: Ahn et al. 2025 (arXiv 2512.16928), in the variant of https://github.com/microsoft/dion, global selection."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tests.references.muon import newton_schulz, polar_express


def dion2(
    weight: Tensor,
    grads: Sequence[Tensor],
    *,
    lr: float = 1e-2,
    weight_decay: float = 0.01,
    fraction: float = 0.25,
    ef_decay: float = 0.95,
    eps: float = 1e-8,
    ns_steps: int = 5,
    adjust_lr_fn: str | None = "spectral",
    ns: str = "polar_express",
) -> Tensor:
    """m ← m + g; the ⌈fraction · rows⌉ rows of m with the largest L1 norms are orthogonalized and subtracted, and decay
    in m. A tall matrix is transposed. A 3-D weight is a stack of experts."""
    if weight.ndim == 3:
        options = {name: value for name, value in locals().items() if name not in ("weight", "grads")}
        experts = [dion2(w, [g[i] for g in grads], **options) for i, w in enumerate(weight)]
        return torch.stack(experts) if experts else weight
    if weight.numel() == 0:
        return weight
    rows, cols = weight.shape
    scale = {
        None: math.sqrt(max(1, rows / cols)),
        "match_rms_adamw": 0.2 * math.sqrt(max(rows, cols)),
        "spectral": math.sqrt(rows / cols),
    }[adjust_lr_fn]
    tall = rows > cols
    w = weight.T.clone() if tall else weight.clone()
    m = torch.zeros_like(w)
    for g in grads:
        m = m + (g.T if tall else g)
        w = (1 - lr * weight_decay) * w
        chosen = m.abs().sum(dim=1).argsort(descending=True)[: math.ceil(fraction * len(m))]
        if ns == "polar_express":
            w[chosen] -= lr * scale * polar_express(m[chosen], steps=ns_steps, eps=eps)
        else:
            w[chosen] -= lr * scale * newton_schulz(m[chosen], [(3.4445, -4.7750, 2.0315)] * ns_steps, eps=eps)
        m[chosen] *= ef_decay
    return w.T if tall else w
