"""AdEMAMix (Pagliardini, Ablin and Grangier, 2024, arXiv 2409.03137, algorithm 1)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from distopt.rule import Rule, Shape, State, require


@dataclass(frozen=True)
class AdEMAMix(Rule):
    """AdamW with a second, much slower running mean of gradients, added to the first one with weight `alpha`.

    lr is what AdamW's is, times 1 + alpha where gradients keep their sign. `t_alpha` and `t_beta3` are the steps over
    which alpha grows from 0 and beta3 from beta1 (None: constant); the paper takes the length of the training. Names,
    order and defaults are bitsandbytes'. The slow mean has no bias correction.

    Start: AdamW's lr and weight decay, betas[2] 0.9999, alpha 4 to 10 (the paper).
    """

    lr: float = 1e-3
    betas: tuple[float, float, float] = (0.9, 0.999, 0.9999)
    alpha: float = 5.0
    t_alpha: int | None = None
    t_beta3: int | None = None
    eps: float = 1e-8
    weight_decay: float = 1e-2

    reach: ClassVar = "elementwise"

    def check(self) -> None:
        super().check()
        require(len(self.betas) == 3, f"betas must be three numbers, got {self.betas}")
        require(self.alpha >= 0, f"alpha must be ≥ 0, got {self.alpha}")
        for name in ("t_alpha", "t_beta3"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name} must be ≥ 1 or None, got {value}")
        warms = self.t_beta3 is not None
        require(not warms or min(self.betas[0], self.betas[2]) > 0, f"t_beta3 needs beta1, beta3 > 0, got {self.betas}")

    def states(self, shape: Shape) -> dict[str, State]:
        means = {name: State("like") for name in ("exp_avg", "exp_avg_slow")}
        return {**means, "exp_avg_sq": State("like", signed=False)}

    def scalars(self, step: int) -> dict[str, Any]:
        beta1, beta2, beta3 = self.betas
        if self.t_beta3 is not None and step < self.t_beta3:  # half-lives grow linearly
            fast, slow, done = math.log(beta1), math.log(beta3), step / self.t_beta3
            beta3 = min(math.exp(fast * slow / ((1 - done) * slow + done * fast)), beta3)
        return {
            "alpha": self.alpha if self.t_alpha is None else self.alpha * min(step / self.t_alpha, 1),
            "beta3": beta3,
            "bias_correction1": 1 - beta1**step,
            "bias_correction2_sqrt": (1 - beta2**step) ** 0.5,
        }

    def update(self, grad: Tensor, weight: Tensor, state: Any, h: Any) -> Tensor:
        beta1, beta2, _ = self.betas
        state.exp_avg = state.exp_avg.lerp(grad, 1 - beta1)
        state.exp_avg_slow = state.exp_avg_slow.lerp(grad, 1 - h.beta3)
        state.exp_avg_sq = torch.addcmul(state.exp_avg_sq * beta2, grad, grad, value=1 - beta2)
        mixed = (state.exp_avg / h.bias_correction1).add(state.exp_avg_slow, alpha=h.alpha)
        denominator = state.exp_avg_sq.sqrt() / h.bias_correction2_sqrt + self.eps
        return torch.addcdiv(weight * (1 - h.lr * h.weight_decay), mixed, denominator, value=-h.lr)
