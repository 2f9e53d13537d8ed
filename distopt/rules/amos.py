"""Amos (Tian and Parikh, 2022, arXiv 2210.11693, algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from distopt.rule import Mean, Rule, Shape, State, Update, require


@dataclass(frozen=True)
class Amos(Rule):
    """Adam without momentum and with one second moment per matrix, whose weight decay and step size anneal themselves
    from the scale that weights are expected to reach.

    lr is the paper's ξ: the size of a step relative to that scale, about 1/√(number of steps in an epoch); no schedule
    beside a warmup is needed. The scale is √(2 / cols) for a matrix and ½ for vectors, as in pytorch_optimizer, where
    the paper lets the user set it; `extra_l2`, `c_coef` and `d_coef` are that package's. A 3-D tensor is a stack of
    matrices with a second moment each.

    Start: lr 1/√(batches in the training data), beta 0.999 (the paper).
    """

    lr: float = 1e-3
    beta: float = 0.999
    momentum: float = 0.0
    extra_l2: float = 0.0
    c_coef: float = 0.25
    d_coef: float = 0.25
    eps: float = 1e-18

    reach: ClassVar = "reduce"

    def check(self) -> None:
        super().check()
        require(0 <= self.beta < 1, f"beta must lie in [0, 1), got {self.beta}")
        require(self.momentum < 1, f"momentum must lie in [0, 1), got {self.momentum}")

    def refuse(self, shape: Shape) -> str | None:
        return "Amos needs to know the inputs of a layer, not of a kernel" if shape.ndim > 3 else None

    def states(self, shape: Shape) -> dict[str, State]:
        momentum = {"exp_avg": State("like")} if self.momentum else {}
        return {"exp_avg_sq": State("matrix"), "decay": State("matrix"), **momentum}

    def scalars(self, step: int) -> dict[str, Any]:
        return {"bias_correction": 1 - self.beta**step}

    def update(self, grad: Tensor, weight: Tensor, state: Any, h: Any) -> Update:
        scale = (2 / h.shape.cols) ** 0.5 if h.shape.is_matrix else 0.5
        square = yield Mean(grad * grad)
        state.exp_avg_sq = state.exp_avg_sq.lerp(square, 1 - self.beta)
        inverse = h.bias_correction / (state.exp_avg_sq + self.eps)

        gamma = (1 + self.c_coef * h.lr**0.5 * state.decay).rsqrt() * h.lr**2 * inverse * square
        update = grad * (inverse.sqrt() * (h.lr * scale)) + weight * ((gamma - self.extra_l2) / 2)
        update = update / (1 + self.d_coef * (h.lr * scale) ** 0.5 * state.decay)
        state.decay = state.decay * (1 + gamma) + gamma
        if self.momentum:
            update = state.exp_avg = state.exp_avg.lerp(update, 1 - self.momentum)
        return weight - update
