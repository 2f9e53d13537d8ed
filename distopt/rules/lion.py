"""Lion (Chen et al., 2023, arXiv 2302.06675, program 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from distopt.rule import Rule, Shape, State


@dataclass(frozen=True)
class Lion(Rule):
    """Sign of an interpolated momentum, with decoupled weight decay.

    Every coordinate moves by exactly lr: use about a tenth to a third of AdamW's lr and three to ten times its weight
    decay.
    """

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0

    reach: ClassVar = "elementwise"

    def states(self, shape: Shape) -> dict[str, State]:
        return {"exp_avg": State("like")}

    def update(self, grad: Tensor, weight: Tensor, state: Any, h: Any) -> Tensor:
        beta1, beta2 = self.betas
        direction = (state.exp_avg * beta1).add(grad, alpha=1 - beta1).sign()
        state.exp_avg = (state.exp_avg * beta2).add(grad, alpha=1 - beta2)
        return (weight * (1 - h.lr * h.weight_decay)).add(direction, alpha=-h.lr)
