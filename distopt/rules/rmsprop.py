"""RMSProp (Tieleman and Hinton, 2012, lecture 6.5 of Neural Networks for Machine Learning); centered as in Graves
(2013, arXiv 1308.0850)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from distopt.rule import Rule, Shape, State, require


@dataclass(frozen=True)
class RMSprop(Rule):
    """Divide the gradient by the root of its running mean square, then accumulate momentum. The same mathematics, order
    and defaults as torch.optim.RMSprop: eps outside the root, weight decay added to the gradient; centered divides by
    the standard deviation instead. `maximize`, positional in torch, is keyword-only as on all rules here.

    lr is about the size of a step in each coordinate, times 1 / (1 − momentum); the running mean starts at zero without
    a correction, so the first steps are 1/√(1 − alpha) times as long.

    Start: lr 1e-3, alpha 0.9 (Hinton's lecture, by way of Ruder, 2016, arXiv 1609.04747).
    """

    lr: float = 1e-2
    alpha: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.0
    centered: bool = False

    reach: ClassVar = "elementwise"

    def check(self) -> None:
        super().check()
        require(0 <= self.alpha < 1, f"alpha must lie in [0, 1), got {self.alpha}")

    def states(self, shape: Shape) -> dict[str, State]:
        names = ["square_avg"] + ["momentum_buffer"] * (self.momentum > 0) + ["grad_avg"] * self.centered
        return {name: State("like", signed=name != "square_avg") for name in names}

    def update(self, grad: Tensor, weight: Tensor, state: Any, h: Any) -> Tensor:
        if h.weight_decay:
            grad = grad.add(weight, alpha=h.weight_decay)
        state.square_avg = torch.addcmul(state.square_avg * self.alpha, grad, grad, value=1 - self.alpha)
        variance = state.square_avg
        if self.centered:
            state.grad_avg = state.grad_avg.lerp(grad, 1 - self.alpha)
            variance = torch.addcmul(variance, state.grad_avg, state.grad_avg, value=-1)
        denominator = variance.sqrt() + self.eps
        if self.momentum:
            state.momentum_buffer = torch.addcdiv(state.momentum_buffer * self.momentum, grad, denominator)
            return weight.add(state.momentum_buffer, alpha=-h.lr)
        return torch.addcdiv(weight, grad, denominator, value=-h.lr)
