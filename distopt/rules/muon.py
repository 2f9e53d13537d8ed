"""Muon: momentum, orthogonalized (Jordan et al., 2024, kellerjordan.github.io/posts/muon)."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from distopt.matrix.newton_schulz import Method, Orthogonalize
from distopt.rule import Back, Rule, Shape, State, Through, Update, Whole, require

SCALES = {
    "original": lambda rows, cols: max(1, rows / cols) ** 0.5,
    "match_rms_adamw": lambda rows, cols: 0.2 * max(rows, cols) ** 0.5,
    "spectral": lambda rows, cols: (rows / cols) ** 0.5,
}


def prepare(
    grad: Tensor, momentum_buffer: Tensor, momentum: float, nesterov: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The new momentum, and what is made orthogonal, in the dtype that travels."""
    momentum_buffer = momentum_buffer.lerp(grad, 1 - momentum)
    return momentum_buffer, (grad.lerp(momentum_buffer, momentum) if nesterov else momentum_buffer).to(dtype)


def apply(weight: Tensor, direction: Tensor, decay: float, factor: float) -> Tensor:
    """New weights from a direction, in the dtype that travelled."""
    return (weight * decay).add(direction.to(weight.dtype), alpha=factor)


@dataclass(frozen=True)
class Muon(Rule):
    """Replaces the momentum of a hidden matrix by the nearest semi-orthogonal one. The same mathematics, order and
    defaults as torch.optim.Muon; a 3-D tensor is a stack of matrices, a convolution one matrix (out, rest).

    lr: for `adjust_lr_fn` None or "original" the spectral norm of the step, times √max(1, rows/cols); "spectral" makes
    it lr·√(rows/cols), the operator norm between RMS norms; with "match_rms_adamw" the step has the RMS of a
    typical AdamW step, 0.2·lr, so that AdamW's lr and weight decay carry over (Liu et al., 2025, arXiv 2502.16982).

    ns: the iteration; ns_dtype: what it computes in, and what travels (None: fp32 on CPU, bf16 on GPU, where
    torch.optim.Muon always takes bf16).

    Start: with "match_rms_adamw" AdamW's lr and weight decay (arXiv 2502.16982); with "original" lr 0.02, momentum 0.95
    (github.com/KellerJordan/Muon).
    """

    lr: float = 1e-3
    weight_decay: float = 0.1
    momentum: float = 0.95
    nesterov: bool = True
    ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315)
    eps: float = 1e-7
    ns_steps: int = 5
    adjust_lr_fn: str | None = None
    _: KW_ONLY
    ns: Method = "quintic"
    ns_dtype: torch.dtype | None = None

    reach: ClassVar = "matrix"
    create_defaults: ClassVar = {"adjust_lr_fn": "match_rms_adamw"}

    def check(self) -> None:
        super().check()
        require(self.adjust_lr_fn is None or self.adjust_lr_fn in SCALES, f"adjust_lr_fn: one of {list(SCALES)}")
        require(self.ns in ("quintic", "polar_express", "gram"), f"ns: quintic, polar_express or gram, got {self.ns!r}")
        require(0 <= self.momentum < 1, f"momentum must lie in [0, 1), got {self.momentum}")
        require(1 <= self.ns_steps < 100, f"ns_steps must lie in 1 … 99, got {self.ns_steps}")

    def states(self, shape: Shape) -> dict[str, State]:
        return {"momentum_buffer": State("like")}

    def update(self, grad: Tensor, weight: Tensor, state: Any, h: Any) -> Update:
        dtype = self.ns_dtype or (torch.bfloat16 if h.gpu else torch.float32)
        state.momentum_buffer, update = h.run(prepare, grad, state.momentum_buffer, self.momentum, self.nesterov, dtype)
        newton_schulz = Orthogonalize(self.ns, self.ns_steps, self.ns_coefficients, self.eps, dtype)
        matrix = yield Whole(update)
        orthogonal = yield Through(matrix, newton_schulz)
        orthogonal = yield Back(orthogonal)
        scale = SCALES[self.adjust_lr_fn or "original"](h.shape.rows, h.shape.cols)
        return h.run(apply, weight, orthogonal, 1 - h.lr * h.weight_decay, -h.lr * scale)
