"""MARS-AdamW (Yuan et al., 2024, arXiv 2411.10438, algorithm 3 in its approximate form)."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from distopt.rule import Rule, Shape, State, Sum, Update, require


@dataclass(frozen=True)
class MARS(Rule):
    """AdamW on gradients corrected by γ β₁ / (1 − β₁) times their change since the last step, each tensor's correction
    clipped to norm 1: variance reduction without a second gradient, since the last batch's gradient stands in for the
    old weights' gradient on this batch (`is_approx` of github.com/AGI-Arena/MARS).

    lr is what AdamW's is. Vectors and scalars are AdamW with `betas_1d`, unless `optimize_1d`; their lr and weight decay
    are their group's, where the authors' class has options of their own.

    Start: lr 3e-3, betas (0.95, 0.99), gamma 0.025 (the authors' defaults for GPT-2).
    """

    lr: float = 3e-3
    betas: tuple[float, float] = (0.95, 0.99)
    eps: float = 1e-8
    weight_decay: float = 0.0
    amsgrad: bool = False
    gamma: float = 0.025
    _: KW_ONLY
    optimize_1d: bool = False
    betas_1d: tuple[float, float] = (0.9, 0.95)

    reach: ClassVar = "reduce"

    def check(self) -> None:
        super().check()
        require(all(0 <= beta < 1 for beta in self.betas_1d), f"betas_1d must lie in [0, 1), got {self.betas_1d!r}")
        require(self.gamma >= 0, f"gamma must be ≥ 0, got {self.gamma}")

    def corrects(self, shape: Shape) -> bool:
        """Whether gradients of this shape are corrected."""
        return shape.is_matrix or self.optimize_1d

    def states(self, shape: Shape) -> dict[str, State]:
        squares = ["exp_avg_sq"] + ["max_exp_avg_sq"] * self.amsgrad
        others = ["exp_avg"] + ["last_grad"] * self.corrects(shape)
        return {name: State("like", signed=name in others) for name in others + squares}

    def update(self, grad: Tensor, weight: Tensor, state: Any, h: Any) -> Update:
        beta1, beta2 = self.betas if self.corrects(h.shape) else self.betas_1d
        if self.corrects(h.shape):
            corrected = grad.add(grad - state.last_grad, alpha=self.gamma * beta1 / (1 - beta1))
            state.last_grad = grad
            squares = yield Sum(corrected * corrected, scope="tensor")
            grad = corrected / squares.sqrt().clamp(min=1)
        state.exp_avg = state.exp_avg.lerp(grad, 1 - beta1)
        state.exp_avg_sq = torch.addcmul(state.exp_avg_sq * beta2, grad, grad, value=1 - beta2)
        second = state.exp_avg_sq
        if self.amsgrad:
            second = state.max_exp_avg_sq = torch.maximum(state.max_exp_avg_sq, second)
        denominator = second.sqrt() / (1 - beta2**h.step) ** 0.5 + self.eps
        decayed = weight * (1 - h.lr * h.weight_decay)
        return torch.addcdiv(decayed, state.exp_avg, denominator, value=-h.lr / (1 - beta1**h.step))
