"""SM3 (Anil et al., 2019, arXiv 1901.11150, algorithm SM3-II)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from distopt.rule import Max, Rule, Shape, State, Update, require


@dataclass(frozen=True)
class SM3(Rule):
    """AdaGrad with one accumulator per row and one per column of a matrix, whose minimum bounds each element's own.

    lr is the size of the first step in each coordinate, as AdaGrad's. On vectors this is
    AdaGrad. `momentum` averages steps, not gradients, and costs a state as large as the weights. Tensors of three dims
    or more are stacks of matrices over their last two, where the paper has an accumulator for each dim.

    Start: lr 0.1 (the default here, untuned), a warmup over 5 % of the steps and no decay (the authors' README,
    github.com/google-research/google-research, sm3).
    """

    lr: float = 0.1
    momentum: float = 0.0
    weight_decay: float = 0.0
    eps: float = 1e-30

    reach: ClassVar = "reduce"

    def check(self) -> None:
        super().check()
        require(self.momentum < 1, f"momentum must lie in [0, 1), got {self.momentum}")

    def states(self, shape: Shape) -> dict[str, State]:
        momentum = {"momentum_buffer": State("like")} if self.momentum else {}
        if shape.is_matrix:
            return {"row_max": State("row"), "col_max": State("col"), **momentum}
        return {"sum": State("like", signed=False), **momentum}

    def update(self, grad: Tensor, weight: Tensor, state: Any, h: Any) -> Update:
        if h.shape.is_matrix:
            bound = torch.addcmul(torch.minimum(state.row_max, state.col_max), grad, grad)
            state.row_max, state.col_max = yield Max(bound, -1), Max(bound, -2)
        else:
            bound = state.sum = torch.addcmul(state.sum, grad, grad)
        update = (bound + self.eps).rsqrt() * grad
        if self.momentum:
            update = state.momentum_buffer = state.momentum_buffer.lerp(update, 1 - self.momentum)
        return (weight * (1 - h.lr * h.weight_decay)).add(update, alpha=-h.lr)
