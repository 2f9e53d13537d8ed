"""Adafactor (Shazeer and Stern, 2018, arXiv 1804.04235, algorithms 4 and 5)."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from distopt.rule import Mean, Rule, Shape, State, Update, require


def precondition(grad: Tensor, row: Tensor, col: Tensor, total: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The update of a matrix, and its squares: row (k, rows, 1), col (k, 1, cols), total (k, 1, 1)."""
    update = (row * col / total.clamp(min=eps)).clamp(min=eps * eps).rsqrt() * grad
    return update, update * update


def average(grad: Tensor, variance: Tensor, fresh: float, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The new second moment of what is no matrix, the update and its squares."""
    variance = variance.lerp(grad * grad, fresh)
    update = variance.clamp(min=eps * eps).rsqrt() * grad
    return variance, update, update * update


def apply(weight: Tensor, update: Tensor, factor: Tensor, decay: float) -> Tensor:
    """New weights; the factor is one number per matrix (k, 1, 1)."""
    return weight * decay - update * factor


@dataclass(frozen=True)
class Adafactor(Rule):
    """Second moments of a matrix factored into a row and a column statistic. The same mathematics, order and defaults
    as torch.optim.Adafactor; tensors of three dims or more are stacks of matrices over their last two dims.

    lr is relative: the step is at most `d` · min(lr, 1/√step) in RMS, times the RMS of the weights (at least eps[1]).
    With `scale_parameter=False` it is lr itself, which is transformers' Adafactor(relative_step=False,
    scale_parameter=False). `eps[0]=None` is the machine epsilon of fp32, in which all is computed.

    Start: lr 1e-2 with `scale_parameter` (the paper, section 9).
    """

    lr: float = 1e-2
    beta2_decay: float = -0.8
    eps: tuple[float | None, float] = (None, 1e-3)
    d: float = 1.0
    weight_decay: float = 0.0
    _: KW_ONLY
    scale_parameter: bool = True

    reach: ClassVar = "reduce"

    def check(self) -> None:
        super().check()
        require(self.beta2_decay <= 0, f"beta2_decay must be ≤ 0, got {self.beta2_decay}")
        require(self.eps[0] is None or self.eps[0] >= 0, f"eps[0] must be ≥ 0 or None, got {self.eps[0]}")
        require(self.eps[1] >= 0, f"eps[1] must be ≥ 0, got {self.eps[1]}")
        require(self.d >= 1, f"the clipping threshold d must be ≥ 1, got {self.d}")

    def states(self, shape: Shape) -> dict[str, State]:
        if shape.is_matrix:
            return {"row_var": State("row"), "col_var": State("col")}
        return {"variance": State("like", signed=False)}

    def scalars(self, step: int) -> dict[str, Any]:
        return {"one_minus_beta2": float(step) ** self.beta2_decay, "rho": min(self.lr, 1 / step**0.5)}

    def update(self, grad: Tensor, weight: Tensor, state: Any, h: Any) -> Update:
        eps = self.eps[0] if self.eps[0] is not None else torch.finfo(torch.float32).eps
        if h.shape.is_matrix:
            square = grad * grad
            row, col = yield Mean(square, -1), Mean(square, -2)
            state.row_var = state.row_var.lerp(row, h.one_minus_beta2)
            state.col_var = state.col_var.lerp(col, h.one_minus_beta2)
            total = yield Mean(state.row_var, -2)
            update, square = h.run(precondition, grad, state.row_var, state.col_var, total, eps)
        else:
            state.variance, update, square = h.run(average, grad, state.variance, h.one_minus_beta2, eps)
        squares, weights = yield Mean(square, scope="tensor"), Mean(weight * weight, scope="tensor")
        step_size = h.rho * weights.sqrt().clamp(min=self.eps[1]) if self.scale_parameter else h.lr
        factor = step_size / (squares.sqrt() / self.d).clamp(min=1)
        return h.run(apply, weight, update, factor, 1 - h.lr * h.weight_decay)
