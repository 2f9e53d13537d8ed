"""Muon: Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon/).

The scale that matches AdamW's is of Liu et al. 2025 (arXiv 2502.16982).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def newton_schulz(
    matrix: Tensor,
    *,
    coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
    steps: int = 5,
    eps: float = 1e-7,
) -> Tensor:
    """X ← a X + b (X Xᵀ) X + c (X Xᵀ)² X, from X = G / ‖G‖: near U Vᵀ of the singular value decomposition of G."""
    a, b, c = coefficients
    x: Tensor = matrix / matrix.norm().clamp(min=eps)
    if matrix.shape[0] > matrix.shape[1]:
        x = x.T
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + b * gram @ x + c * gram @ gram @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def muon(
    weight: Tensor,
    grads: Sequence[Tensor],
    *,
    lr: float = 1e-3,
    weight_decay: float = 0.1,
    momentum: float = 0.95,
    nesterov: bool = True,
    ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
    eps: float = 1e-7,
    ns_steps: int = 5,
    adjust_lr_fn: str | None = None,
) -> Tensor:
    """m ← μ m + (1 − μ) g; w ← (1 − lr λ) w − lr · scale(shape) · orthogonalize(m, or (1 − μ) g + μ m).

    The moving average instead of m ← μ m + g is torch.optim.Muon's: orthogonalization does not see the factor.
    A 3-D weight is a stack of experts, each a matrix of its own.
    """
    if weight.ndim == 3:
        options = {name: value for name, value in locals().items() if name not in ("weight", "grads")}
        experts = [muon(w, [g[i] for g in grads], **options) for i, w in enumerate(weight)]
        return torch.stack(experts) if experts else weight
    rows, cols = weight.shape
    if weight.numel() == 0:
        return weight
    scale = {
        None: math.sqrt(max(1, rows / cols)),
        "original": math.sqrt(max(1, rows / cols)),
        "match_rms_adamw": 0.2 * math.sqrt(max(rows, cols)),
        "spectral": math.sqrt(rows / cols),
    }[adjust_lr_fn]
    m = torch.zeros_like(weight)
    for g in grads:
        m = momentum * m + (1 - momentum) * g
        update = (1 - momentum) * g + momentum * m if nesterov else m
        update = newton_schulz(update, coefficients=ns_coefficients, steps=ns_steps, eps=eps)
        weight = (1 - lr * weight_decay) * weight - lr * scale * update
    return weight
