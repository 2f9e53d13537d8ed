"""AdaGrad (Duchi, Hazan and Singer, 2011, jmlr.org/papers/v12/duchi11a.html, diagonal form)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from distopt.rule import Rule, Shape, State, require


@dataclass(frozen=True)
class Adagrad(Rule):
    """Divide the gradient by the root of the sum of all its squares so far. The same mathematics, order and defaults as
    torch.optim.Adagrad: weight decay is added to the gradient, lr decays as lr / (1 + (step − 1) · lr_decay).

    lr is the size of the first step in each coordinate; where gradients keep their size, later ones shrink as 1/√step.

    Start: lr 1e-2 (torch.optim.Adagrad's default).
    """

    lr: float = 1e-2
    lr_decay: float = 0.0
    weight_decay: float = 0.0
    initial_accumulator_value: float = 0.0
    eps: float = 1e-10

    reach: ClassVar = "elementwise"

    def check(self) -> None:
        super().check()
        for name in ("lr_decay", "initial_accumulator_value"):
            require(getattr(self, name) >= 0, f"{name} must be ≥ 0, got {getattr(self, name)}")

    def states(self, shape: Shape) -> dict[str, State]:
        return {"sum": State("like", fill=self.initial_accumulator_value, signed=False)}

    def scalars(self, step: int) -> dict[str, Any]:
        return {"step_size": self.lr / (1 + (step - 1) * self.lr_decay)}

    def update(self, grad: Tensor, weight: Tensor, state: Any, h: Any) -> Tensor:
        if h.weight_decay:
            grad = grad.add(weight, alpha=h.weight_decay)
        state.sum = torch.addcmul(state.sum, grad, grad)
        return torch.addcdiv(weight, grad, state.sum.sqrt() + self.eps, value=-h.step_size)
