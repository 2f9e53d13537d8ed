"""AdaLomo: LOMO with Adafactor's second moment (Lv et al., 2023, arXiv 2310.10195, algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from distopt.rule import Mean, Rule, Shape, State, Update, require


@dataclass(frozen=True)
class AdaLomo(Rule):
    """Adafactor's factored update, clipped to `clip_threshold` in RMS, and scaled by the RMS of the weights (at least
    eps[1]). Names and defaults are lomo_optim's: eps[0] is added to squared gradients, the second moment at step t
    weighs the new square with t^decay_rate, weight decay comes before the update and is scaled as the step is. Tensors
    of three dims or more are stacks of matrices over their last two dims with one clipping threshold and one scale.

    lr is relative: the step is at most `clip_threshold` · lr times the RMS of the weights.

    Deviation: the row statistic's mean comes in the same round as the statistics, since averaging over steps and over
    rows commute.

    It pays where AdamW's states and the gradients do not fit, in fine-tuning; its states are a row and a column. The
    authors report parity with AdamW there; no third party's figure is known to us.

    Start: lr 5e-4 for instruction tuning of a LLaMA of 7B (the authors' script, github.com/OpenLMLab/LOMO).
    """

    lr: float = 1e-3
    weight_decay: float = 0.0
    clip_threshold: float = 1.0
    decay_rate: float = -0.8
    eps: tuple[float, float] = (1e-30, 1e-3)

    reach: ClassVar = "reduce"

    def check(self) -> None:
        super().check()
        require(self.decay_rate <= 0, f"decay_rate must be ≤ 0, got {self.decay_rate}")
        require(all(eps >= 0 for eps in self.eps), f"eps must be two numbers ≥ 0, got {self.eps}")
        require(self.clip_threshold > 0, f"clip_threshold must be > 0, got {self.clip_threshold}")

    def states(self, shape: Shape) -> dict[str, State]:
        if shape.is_matrix:
            return {"exp_avg_sq_row": State("row"), "exp_avg_sq_col": State("col")}
        return {"exp_avg_sq": State("like", signed=False)}

    def scalars(self, step: int) -> dict[str, Any]:
        return {"fresh": float(step) ** self.decay_rate}

    def update(self, grad: Tensor, weight: Tensor, state: Any, h: Any) -> Update:
        square = grad * grad + self.eps[0]
        if h.shape.is_matrix:
            row, col, before, now = yield (
                Mean(square, -1),
                Mean(square, -2),
                Mean(state.exp_avg_sq_row, -2),
                Mean(square),
            )
            state.exp_avg_sq_row = state.exp_avg_sq_row.lerp(row, h.fresh)
            state.exp_avg_sq_col = state.exp_avg_sq_col.lerp(col, h.fresh)
            mean = before.lerp(now, h.fresh)
            update = (state.exp_avg_sq_row / mean).rsqrt() * state.exp_avg_sq_col.rsqrt() * grad
        else:
            state.exp_avg_sq = state.exp_avg_sq.lerp(square, h.fresh)
            update = state.exp_avg_sq.rsqrt() * grad
        squares, weights = yield Mean(update * update, scope="tensor"), Mean(weight * weight, scope="tensor")
        step_size = h.lr * weights.sqrt().clamp(min=self.eps[1])
        clipped = update / (squares.sqrt() / self.clip_threshold).clamp(min=1)
        return weight * (1 - step_size * h.weight_decay) - step_size * clipped
