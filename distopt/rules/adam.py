"""Adam (Kingma and Ba, 2015, arXiv 1412.6980, algorithm 1), with AMSGrad (Reddi et al., 2018, arXiv 1904.09237)."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from distopt.rule import Rule, Shape, State


@dataclass(frozen=True)
class Adam(Rule):
    """Step by the running mean of gradients over the root of their running mean square. The same mathematics, order and
    defaults as torch.optim.Adam: weight decay is added to the gradient, and so is divided by the root as well, unless
    `decoupled_weight_decay` makes this AdamW.

    lr is the size of a step in each coordinate where the gradient keeps its sign. AMSGrad takes the maximum of second
    moments before their bias correction, as torch does; the paper corrects none.

    Start: lr 1e-3, betas (0.9, 0.999) (the paper, algorithm 1).
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    amsgrad: bool = False
    _: KW_ONLY
    decoupled_weight_decay: bool = False

    reach: ClassVar = "elementwise"

    def states(self, shape: Shape) -> dict[str, State]:
        squares = ("exp_avg_sq", "max_exp_avg_sq") if self.amsgrad else ("exp_avg_sq",)
        return {"exp_avg": State("like"), **{name: State("like", signed=False) for name in squares}}

    def scalars(self, step: int) -> dict[str, Any]:
        beta1, beta2 = self.betas
        return {"bias_correction1": 1 - beta1**step, "bias_correction2_sqrt": (1 - beta2**step) ** 0.5}

    def update(self, grad: Tensor, weight: Tensor, state: Any, h: Any) -> Tensor:
        beta1, beta2 = self.betas
        if self.decoupled_weight_decay:
            weight = weight * (1 - h.lr * h.weight_decay)
        elif h.weight_decay:
            grad = grad.add(weight, alpha=h.weight_decay)
        state.exp_avg = state.exp_avg.lerp(grad, 1 - beta1)
        state.exp_avg_sq = torch.addcmul(state.exp_avg_sq * beta2, grad, grad, value=1 - beta2)
        second = state.exp_avg_sq
        if self.amsgrad:
            second = state.max_exp_avg_sq = torch.maximum(state.max_exp_avg_sq, second)
        denominator = second.sqrt() / h.bias_correction2_sqrt + self.eps
        return torch.addcdiv(weight, state.exp_avg, denominator, value=-h.lr / h.bias_correction1)
