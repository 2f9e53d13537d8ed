"""Signum: the sign of momentum (Bernstein et al., 2018, arXiv 1802.04434, algorithm 2); signSGD with momentum 0."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from distopt.rule import Rule, Shape, State, require


@dataclass(frozen=True)
class Signum(Rule):
    """Sign of the running mean of gradients (1 − momentum of each new one), with decoupled weight decay.

    lr: every coordinate moves by exactly that, and not at all where the mean is zero. Unlike Lion the sign is taken of the
    momentum that is kept. With `momentum=0` there is no state: signSGD.

    Start: lr 1e-4, momentum 0.9 (ResNet-50 on ImageNet: the authors' best, github.com/jxbz/signSGD).
    """

    lr: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 0.0

    reach: ClassVar = "elementwise"

    def check(self) -> None:
        super().check()
        require(self.momentum < 1, f"momentum must lie in [0, 1), got {self.momentum}")

    def states(self, shape: Shape) -> dict[str, State]:
        return {"momentum_buffer": State("like")} if self.momentum else {}

    def update(self, grad: Tensor, weight: Tensor, state: Any, h: Any) -> Tensor:
        if self.momentum:
            grad = state.momentum_buffer = state.momentum_buffer.lerp(grad, 1 - self.momentum)
        return (weight * (1 - h.lr * h.weight_decay)).sub(grad.sign(), alpha=h.lr)
