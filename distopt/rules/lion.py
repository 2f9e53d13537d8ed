"""Lion (Chen et al., 2023, arXiv 2302.06675, program 1)."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from distopt.rule import Rule, Shape, State, Sum, Update


@dataclass(frozen=True)
class Lion(Rule):
    """Sign of an interpolated momentum, with decoupled weight decay.

    lr: every coordinate moves by exactly that; use about a tenth to a third of AdamW's lr and three to ten times its
    weight decay. With `cautious` only coordinates move whose direction has the sign of their gradient, longer by how many
    there are (Liang et al., 2024, arXiv 2411.16085), at the price of one sum.

    Start: lr 1e-4, betas (0.9, 0.99), for language models (0.95, 0.98) (the authors' README, github.com/google/automl).
    """

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    _: KW_ONLY
    cautious: bool = False

    reach: ClassVar = "elementwise"

    def __post_init__(self) -> None:
        if self.cautious:  # how many coordinates agree is a sum over the tensor
            object.__setattr__(self, "reach", "reduce")

    def states(self, shape: Shape) -> dict[str, State]:
        return {"exp_avg": State("like")}

    def update(self, grad: Tensor, weight: Tensor, state: Any, h: Any) -> Tensor | Update:
        beta1, beta2 = self.betas
        direction = (state.exp_avg * beta1).add(grad, alpha=1 - beta1).sign()
        state.exp_avg = (state.exp_avg * beta2).add(grad, alpha=1 - beta2)
        decayed = weight * (1 - h.lr * h.weight_decay)
        return self.cautiously(decayed, direction, grad, h) if self.cautious else decayed.add(direction, alpha=-h.lr)

    def cautiously(self, weight: Tensor, direction: Tensor, grad: Tensor, h: Any) -> Update:
        """Step only where direction and gradient agree, longer by the share of those that do."""
        agree = (direction * grad > 0).to(grad.dtype)
        total, agreeing = yield Sum(torch.ones_like(agree), scope="tensor"), Sum(agree, scope="tensor")
        return weight - direction * agree * (h.lr * total / (agreeing + 1))
