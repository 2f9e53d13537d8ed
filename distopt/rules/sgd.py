"""Stochastic gradient descent with momentum (Polyak, 1964; Nesterov as in Sutskever et al., 2013)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from distopt.rule import Rule, Shape, State, require


@dataclass(frozen=True)
class SGD(Rule):
    """Gradient descent. The same mathematics, order and defaults as torch.optim.SGD: weight decay is added to the
    gradient, the first momentum buffer is the first gradient, without dampening.

    lr multiplies the raw gradient.

    Start: lr 0.1, momentum 0.9, weight decay 1e-4, for a ResNet-50 at batch size 256 (Goyal et al., 2017, arXiv
    1706.02677).
    """

    lr: float = 1e-3
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False

    reach: ClassVar = "elementwise"

    def check(self) -> None:
        super().check()
        require(
            not self.nesterov or (self.momentum > 0 and self.dampening == 0),
            "Nesterov momentum requires a momentum and zero dampening",
        )

    def states(self, shape: Shape) -> dict[str, State]:
        return {"momentum_buffer": State("like")} if self.momentum else {}

    def update(self, grad: Tensor, weight: Tensor, state: Any, h: Any) -> Tensor:
        if h.weight_decay:
            grad = grad.add(weight, alpha=h.weight_decay)
        if self.momentum:
            if h.step == 1:
                state.momentum_buffer = grad
            else:
                state.momentum_buffer = (state.momentum_buffer * self.momentum).add(grad, alpha=1 - self.dampening)
            grad = grad.add(state.momentum_buffer, alpha=self.momentum) if self.nesterov else state.momentum_buffer
        return weight.add(grad, alpha=-h.lr)
