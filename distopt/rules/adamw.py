"""AdamW (Loshchilov and Hutter, 2019, arXiv 1711.05101), with AMSGrad (Reddi et al., 2018)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from distopt.rule import Rule, Shape, State


@dataclass(frozen=True)
class AdamW(Rule):
    """Adam with decoupled weight decay. The same mathematics, order and defaults as torch.optim.AdamW.

    lr is the size of a step in each coordinate where the gradient keeps its sign; weight decay shrinks weights by
    lr · weight_decay per step, before the update.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2
    amsgrad: bool = False

    reach: ClassVar = "elementwise"

    def states(self, shape: Shape) -> dict[str, State]:
        names = ("exp_avg", "exp_avg_sq") + (("max_exp_avg_sq",) if self.amsgrad else ())
        return {name: State("like") for name in names}

    def scalars(self, step: int) -> dict[str, Any]:
        beta1, beta2 = self.betas
        return {"bias_correction1": 1 - beta1**step, "bias_correction2_sqrt": (1 - beta2**step) ** 0.5}

    def update(self, grad: Tensor, weight: Tensor, state: Any, h: Any) -> Tensor:
        beta1, beta2 = self.betas
        state.exp_avg = state.exp_avg.lerp(grad, 1 - beta1)
        state.exp_avg_sq = torch.addcmul(state.exp_avg_sq * beta2, grad, grad, value=1 - beta2)
        second = state.exp_avg_sq
        if self.amsgrad:
            second = state.max_exp_avg_sq = torch.maximum(state.max_exp_avg_sq, second)
        denominator = second.sqrt() / h.bias_correction2_sqrt + self.eps
        return torch.addcdiv(
            weight * (1 - h.lr * h.weight_decay), state.exp_avg, denominator, value=-h.lr / h.bias_correction1
        )
