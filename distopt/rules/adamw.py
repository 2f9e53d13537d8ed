"""AdamW (Loshchilov and Hutter, 2019, arXiv 1711.05101), with AMSGrad (Reddi et al., 2018)."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from distopt.rule import Rule, Shape, State, Sum, Update


@dataclass(frozen=True)
class AdamW(Rule):
    """Adam with decoupled weight decay. The same mathematics, order and defaults as torch.optim.AdamW.

    lr is the size of a step in each coordinate where the gradient keeps its sign; weight decay shrinks weights by
    lr · weight_decay per step, before the update. With `cautious` only coordinates move whose direction has the sign of
    their gradient, longer by how many there are (Liang et al., 2024, arXiv 2411.16085), at the price of one sum.

    Start: lr 8e-3, betas (0.9, 0.98), weight decay 0.1 at 130M parameters, the best of a sweep (arXiv 2509.02046); lr
    1e-3 in another benchmark at 124M (arXiv 2509.01440).
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2
    amsgrad: bool = False
    _: KW_ONLY
    cautious: bool = False

    reach: ClassVar = "elementwise"

    def __post_init__(self) -> None:
        if self.cautious:  # how many coordinates agree is a sum over the tensor
            object.__setattr__(self, "reach", "reduce")

    def states(self, shape: Shape) -> dict[str, State]:
        squares = ("exp_avg_sq", "max_exp_avg_sq") if self.amsgrad else ("exp_avg_sq",)
        return {"exp_avg": State("like"), **{name: State("like", signed=False) for name in squares}}

    def scalars(self, step: int) -> dict[str, Any]:
        beta1, beta2 = self.betas
        return {"bias_correction1": 1 - beta1**step, "bias_correction2_sqrt": (1 - beta2**step) ** 0.5}

    def update(self, grad: Tensor, weight: Tensor, state: Any, h: Any) -> Tensor | Update:
        beta1, beta2 = self.betas
        state.exp_avg = state.exp_avg.lerp(grad, 1 - beta1)
        state.exp_avg_sq = torch.addcmul(state.exp_avg_sq * beta2, grad, grad, value=1 - beta2)
        second = state.exp_avg_sq
        if self.amsgrad:
            second = state.max_exp_avg_sq = torch.maximum(state.max_exp_avg_sq, second)
        denominator = second.sqrt() / h.bias_correction2_sqrt + self.eps
        decayed = weight * (1 - h.lr * h.weight_decay)
        if self.cautious:
            return self.cautiously(decayed, state.exp_avg / h.bias_correction1 / denominator, grad, h)
        return torch.addcdiv(decayed, state.exp_avg, denominator, value=-h.lr / h.bias_correction1)

    def cautiously(self, weight: Tensor, direction: Tensor, grad: Tensor, h: Any) -> Update:
        """Step only where direction and gradient agree, longer by the share of those that do."""
        agree = (direction * grad > 0).to(grad.dtype)
        total, agreeing = yield Sum(torch.ones_like(agree), scope="tensor"), Sum(agree, scope="tensor")
        return weight - direction * agree * (h.lr * total / (agreeing + 1))
