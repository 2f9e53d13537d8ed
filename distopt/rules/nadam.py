"""NAdam (Dozat, 2016, "Incorporating Nesterov momentum into Adam", openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from distopt.rule import Rule, Shape, State, require


@dataclass(frozen=True)
class NAdam(Rule):
    """Adam whose step already contains what the next momentum will be. The same mathematics, order and defaults as
    torch.optim.NAdam (timm's NAdamW is another rule): weight decay is added to the gradient unless
    `decoupled_weight_decay`.

    lr is what Adam's is. The momentum of step t is μₜ = β₁(1 − ½ · 0.96^(t · momentum_decay)), which warms up from half
    of β₁. torch keeps the product of all μ as a tensor per parameter; here it is a function of the step.

    Start: lr 2e-3, betas (0.9, 0.999) (torch.optim.NAdam's defaults).
    """

    lr: float = 2e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum_decay: float = 4e-3
    decoupled_weight_decay: bool = False

    reach: ClassVar = "elementwise"

    def check(self) -> None:
        super().check()
        require(self.momentum_decay >= 0, f"momentum_decay must be ≥ 0, got {self.momentum_decay}")

    def states(self, shape: Shape) -> dict[str, State]:
        return {"exp_avg": State("like"), "exp_avg_sq": State("like", signed=False)}

    def scalars(self, step: int) -> dict[str, Any]:
        def mu(t: int) -> float:
            return float(self.betas[0] * (1 - 0.5 * 0.96 ** (t * self.momentum_decay)))

        product, t = 1.0, 0
        while t < step and product > 1e-20:  # 1 − product is 1 long before that: some hundred turns at most
            t += 1
            product *= mu(t)
        return {
            "grad_part": (1 - mu(step)) / (1 - product),
            "momentum_part": mu(step + 1) / (1 - product * mu(step + 1)),
            "bias_correction2": 1 - self.betas[1] ** step,
        }

    def update(self, grad: Tensor, weight: Tensor, state: Any, h: Any) -> Tensor:
        beta1, beta2 = self.betas
        if self.decoupled_weight_decay:
            weight = weight * (1 - h.lr * h.weight_decay)
        elif h.weight_decay:
            grad = grad.add(weight, alpha=h.weight_decay)
        state.exp_avg = state.exp_avg.lerp(grad, 1 - beta1)
        state.exp_avg_sq = torch.addcmul(state.exp_avg_sq * beta2, grad, grad, value=1 - beta2)
        denominator = (state.exp_avg_sq / h.bias_correction2).sqrt() + self.eps
        weight = torch.addcdiv(weight, grad, denominator, value=-h.lr * h.grad_part)
        return torch.addcdiv(weight, state.exp_avg, denominator, value=-h.lr * h.momentum_part)
