"""Muon: Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon/).

The scale that matches AdamW's is of Liu et al. 2025 (arXiv 2502.16982).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Coefficients = tuple[float, float, float]

# Algorithm 1 of Amsel et al. 2025 (arXiv 2505.16932), for singular values from 1e-3; later steps repeat the last line.
POLAR_EXPRESS: list[Coefficients] = [
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
]


def newton_schulz(matrix: Tensor, schedule: Sequence[Coefficients], *, eps: float = 1e-7, safety: float = 1) -> Tensor:
    """X ← a X + b (X Xᵀ) X + c (X Xᵀ)² X, from X = G / ‖G‖: near U Vᵀ of the singular value decomposition of G."""
    x: Tensor = matrix / (safety * matrix.norm().clamp(min=eps))
    if matrix.shape[0] > matrix.shape[1]:
        x = x.T
    for a, b, c in schedule:
        gram = x @ x.T
        x = a * x + b * gram @ x + c * gram @ gram @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def polar_express(matrix: Tensor, *, steps: int, eps: float = 1e-7) -> Tensor:
    """Newton–Schulz with the best polynomial for what the steps before left, 1 % of safety in all but the last line."""
    shrunk = [(a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in POLAR_EXPRESS[:-1]]
    schedule = [*shrunk, *[POLAR_EXPRESS[-1]] * steps][:steps]
    return newton_schulz(matrix, schedule, eps=eps, safety=1.01)


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
    ns: str = "quintic",
) -> Tensor:
    """m ← μ m + (1 − μ) g; w ← (1 − lr λ) w − lr · scale(shape) · orthogonalize(m, or (1 − μ) g + μ m).

    The moving average instead of m ← μ m + g is torch.optim.Muon's: orthogonalization does not see the factor.
    `ns="gram"` is the quintic in exact arithmetic. A 3-D weight is a stack of experts, each a matrix of its own.
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
        if ns == "polar_express":
            update = polar_express(update, steps=ns_steps, eps=eps)
        else:
            update = newton_schulz(update, [ns_coefficients] * ns_steps, eps=eps)
        weight = (1 - lr * weight_decay) * weight - lr * scale * update
    return weight
