"""Scion: Pethick et al. 2025, algorithms 1 and 2 (arXiv 2502.07529)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.references.muon import newton_schulz


def scion(
    weight: Tensor,
    grads: Sequence[Tensor],
    *,
    lr: float = 1e-3,
    momentum: float = 0.9,
    norm: str = "spectral",
    scale: float = 50.0,
    unconstrained: bool = False,
    eps: float = 1e-7,
    ns_steps: int = 5,
) -> Tensor:
    """w ← (1 − lr) w − lr · scale · lmo(m). A 3-D weight is a stack of experts."""
    if weight.ndim == 3:
        options = {name: value for name, value in locals().items() if name not in ("weight", "grads")}
        return torch.stack([scion(w, [g[i] for g in grads], **options) for i, w in enumerate(weight)])
    if weight.numel() == 0:
        return weight
    m = torch.zeros_like(weight)
    for g in grads:
        m = momentum * m + (1 - momentum) * g
        if weight.ndim < 2:
            extreme = m / (m.square().mean().sqrt() + 1e-8)
        elif norm == "sign":
            extreme = m.sign() / weight.shape[1]
        else:
            rows, cols = weight.shape
            orthogonal = newton_schulz(m.T if rows > cols else m, [(3.4445, -4.7750, 2.0315)] * ns_steps, eps=eps)
            extreme = (orthogonal.T if rows > cols else orthogonal) * (rows / cols) ** 0.5
        weight = (weight if unconstrained else (1 - lr) * weight) - lr * scale * extreme
    return weight
