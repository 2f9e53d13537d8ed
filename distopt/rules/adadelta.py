"""Adadelta (Zeiler, 2012, arXiv 1212.5701, algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from distopt.rule import Rule, Shape, State, require


@dataclass(frozen=True)
class Adadelta(Rule):
    """Divide the gradient by the root of its running mean square, and multiply by that of past steps, so that units
    match. The same mathematics, order and defaults as torch.optim.Adadelta: weight decay is added to the gradient.

    lr is a plain factor on a step that sets its own size, 1.0 in the paper; the first steps are √eps long.

    Start: lr 1.0, rho 0.95, eps 1e-6 (the paper, section 4).
    """

    lr: float = 1.0
    rho: float = 0.9
    eps: float = 1e-6
    weight_decay: float = 0.0

    reach: ClassVar = "elementwise"

    def check(self) -> None:
        super().check()
        require(0 <= self.rho <= 1, f"rho must lie in [0, 1], got {self.rho}")

    def states(self, shape: Shape) -> dict[str, State]:
        return {name: State("like", signed=False) for name in ("square_avg", "acc_delta")}

    def update(self, grad: Tensor, weight: Tensor, state: Any, h: Any) -> Tensor:
        if h.weight_decay:
            grad = grad.add(weight, alpha=h.weight_decay)
        state.square_avg = torch.addcmul(state.square_avg * self.rho, grad, grad, value=1 - self.rho)
        delta = (state.acc_delta + self.eps).sqrt() / (state.square_avg + self.eps).sqrt() * grad
        state.acc_delta = torch.addcmul(state.acc_delta * self.rho, delta, delta, value=1 - self.rho)
        return weight.add(delta, alpha=-h.lr)
