"""NorMuon: Li et al. 2025, algorithm 1 (arXiv 2510.05491), and the norm-preserving variant of the authors' code."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tests.references.muon import newton_schulz, polar_express

QUINTIC = (3.4445, -4.7750, 2.0315)


def normuon(
    weight: Tensor,
    grads: Sequence[Tensor],
    *,
    lr: float = 1e-3,
    weight_decay: float = 0.1,
    momentum: float = 0.95,
    beta2: float = 0.95,
    nesterov: bool = False,
    eps: float = 1e-8,
    ns_steps: int = 5,
    adjust_lr_fn: str | None = "rms",
    ns: str = "quintic",
) -> Tensor:
    """o = orthogonalize(m); v ← β₂ v + (1 − β₂) mean over columns of o²; ô = o / (√v + ε), scaled to a norm:
    0.2 √(rows · cols) for "rms", else that of o times Muon's factor for the shape."""
    if weight.ndim == 3:
        options = {name: value for name, value in locals().items() if name not in ("weight", "grads")}
        experts = [normuon(w, [g[i] for g in grads], **options) for i, w in enumerate(weight)]
        return torch.stack(experts) if experts else weight
    if weight.numel() == 0:
        return weight
    rows, cols = weight.shape
    m, v = torch.zeros_like(weight), weight.new_zeros(rows, 1)
    for g in grads:
        m = momentum * m + (1 - momentum) * g
        update = (1 - momentum) * g + momentum * m if nesterov else m
        if ns == "polar_express":
            o = polar_express(update, steps=ns_steps)
        else:
            o = newton_schulz(update, [QUINTIC] * ns_steps)
        v = beta2 * v + (1 - beta2) * (o * o).mean(dim=1, keepdim=True)
        direction = o / (v.sqrt() + eps)
        norm = {
            "rms": 0.2 * math.sqrt(rows * cols),
            None: o.norm() * math.sqrt(max(1, rows / cols)),
            "original": o.norm() * math.sqrt(max(1, rows / cols)),
            "match_rms_adamw": o.norm() * 0.2 * math.sqrt(max(rows, cols)),
            "spectral": o.norm() * math.sqrt(rows / cols),
        }[adjust_lr_fn]
        weight = (1 - lr * weight_decay) * weight - lr * norm * direction / direction.norm()
    return weight
