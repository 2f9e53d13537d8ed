"""CAME (Luo et al., 2023, arXiv 2307.02047, algorithm 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from distopt.rule import Mean, Rule, Shape, State, Update, require

FACTORED = ("exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_res_row", "exp_avg_res_col")


@dataclass(frozen=True)
class CAME(Rule):
    """Adafactor's clipped update, averaged, then divided by how far updates stray from their average: a confidence,
    factored as the second moment is. On vectors the confidence is left out, as in came_pytorch, whose defaults these
    are.

    lr is the size of a step: `clip_threshold` · lr in RMS before the confidence, which lengthens it where updates agree.
    `eps` is added to squared gradients and to squared residuals. Tensors of three dims or more are stacks of matrices
    over their last two dims with one clipping threshold.

    Means of the row statistics come in the same round as the statistics, since averaging over steps and over rows
    commute: three rounds of sums instead of five.

    Start: lr 2e-4, betas (0.9, 0.999, 0.9999) (the README of came_pytorch).
    """

    lr: float = 2e-4
    eps: tuple[float, float] = (1e-30, 1e-16)
    clip_threshold: float = 1.0
    betas: tuple[float, float, float] = (0.9, 0.999, 0.9999)
    weight_decay: float = 0.0

    reach: ClassVar = "reduce"

    def check(self) -> None:
        super().check()
        require(len(self.betas) == 3, f"betas must be three numbers, got {self.betas}")
        require(all(eps >= 0 for eps in self.eps), f"eps must be two numbers ≥ 0, got {self.eps}")
        require(self.clip_threshold > 0, f"clip_threshold must be > 0, got {self.clip_threshold}")

    def states(self, shape: Shape) -> dict[str, State]:
        if not shape.is_matrix:
            return {"exp_avg": State("like"), "exp_avg_sq": State("like", signed=False)}
        return {"exp_avg": State("like"), **{name: State("row" if "row" in name else "col") for name in FACTORED}}

    def update(self, grad: Tensor, weight: Tensor, state: Any, h: Any) -> Update:
        beta1, beta2, beta3 = self.betas
        square = grad * grad + self.eps[0]
        if h.shape.is_matrix:
            row, col, before, now = yield (
                Mean(square, -1),
                Mean(square, -2),
                Mean(state.exp_avg_sq_row, -2),
                Mean(square),
            )
            state.exp_avg_sq_row = state.exp_avg_sq_row.lerp(row, 1 - beta2)
            state.exp_avg_sq_col = state.exp_avg_sq_col.lerp(col, 1 - beta2)
            mean = before.lerp(now, 1 - beta2)
            update = (state.exp_avg_sq_row / mean).rsqrt() * state.exp_avg_sq_col.rsqrt() * grad
        else:
            state.exp_avg_sq = state.exp_avg_sq.lerp(square, 1 - beta2)
            update = state.exp_avg_sq.rsqrt() * grad

        squares = yield Mean(update * update, scope="tensor")
        update = update / (squares.sqrt() / self.clip_threshold).clamp(min=1)
        direction = state.exp_avg = state.exp_avg.lerp(update, 1 - beta1)
        if h.shape.is_matrix:
            residual = (update - direction).square() + self.eps[1]
            row, col, before, now = yield (
                Mean(residual, -1),
                Mean(residual, -2),
                Mean(state.exp_avg_res_row, -2),
                Mean(residual),
            )
            state.exp_avg_res_row = state.exp_avg_res_row.lerp(row, 1 - beta3)
            state.exp_avg_res_col = state.exp_avg_res_col.lerp(col, 1 - beta3)
            mean = before.lerp(now, 1 - beta3)
            direction = (state.exp_avg_res_row / mean).rsqrt() * state.exp_avg_res_col.rsqrt() * direction
        return (weight * (1 - h.lr * h.weight_decay)).add(direction, alpha=-h.lr)
