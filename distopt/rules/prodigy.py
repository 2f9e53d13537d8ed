"""Prodigy (Mishchenko and Defazio, 2024, arXiv 2306.06101, algorithm 4)."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from distopt.rule import Rule, Shape, State, Sum, Update, require


@dataclass(frozen=True)
class Prodigy(Rule):
    """Adam that estimates its own learning rate: d, a lower bound of the distance from the first weights to a solution,
    from inner products of gradients with the way gone so far. Names and defaults are prodigyopt's; weight decay is
    decoupled. One d for the whole optimizer: groups should differ in nothing that it is made of.

    lr is a factor on d; a step has the size that Adam's would have at the learning rate d·lr.

    Start: lr 1 with a schedule that decays to 0, d_coef 0.5 … 2 to turn it down or up (its authors' README).

    It pays where nobody can tune; a tuned AdamW is seldom beaten.

    Deviations: a group whose lr differs from the others' adds to d with its own (prodigyopt refuses it); where every
    gradient is zero weights still decay. The first weights are kept in fp32.
    """

    lr: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    beta3: float | None = None
    eps: float = 1e-8
    weight_decay: float = 0.0
    _: KW_ONLY
    use_bias_correction: bool = False
    safeguard_warmup: bool = False
    d0: float = 1e-6
    d_coef: float = 1.0
    growth_rate: float | None = None

    reach: ClassVar = "reduce"

    def check(self) -> None:
        super().check()
        require(self.beta3 is None or 0 <= self.beta3 < 1, f"beta3 must lie in [0, 1) or be None, got {self.beta3}")
        require(self.d0 > 0 and self.d_coef > 0, f"d0 and d_coef must be > 0, got {self.d0} and {self.d_coef}")
        require(self.growth_rate is None or self.growth_rate > 1, f"growth_rate must be > 1, got {self.growth_rate}")

    def states(self, shape: Shape) -> dict[str, State]:
        d = {"d": State("group", fill=self.d0), "d_max": State("group", fill=self.d0), "d_numerator": State("group")}
        like = {name: State("like", signed=name != "exp_avg_sq") for name in ("exp_avg", "exp_avg_sq", "s")}
        return {**like, "p0": State("like", fill="weight"), **d}

    def scalars(self, step: int) -> dict[str, Any]:
        beta1, beta2 = self.betas
        correction = (1 - beta2**step) ** 0.5 / (1 - beta1**step) if self.use_bias_correction else 1.0
        return {"factor": self.lr * correction}

    def update(self, grad: Tensor, weight: Tensor, state: Any, h: Any) -> Update:
        beta1, beta2 = self.betas
        beta3 = beta2**0.5 if self.beta3 is None else self.beta3
        d, step_size = state.d, state.d * h.factor
        state.exp_avg = state.exp_avg * beta1 + grad * (d * (1 - beta1))
        state.exp_avg_sq = state.exp_avg_sq * beta2 + grad * grad * (d * d * (1 - beta2))
        state.s = state.s * beta3 + grad * (d / self.d0 * (d if self.safeguard_warmup else step_size))

        way = grad * (state.p0 - weight) * (d / self.d0 * step_size)
        gained, length = yield Sum(way, scope="optimizer"), Sum(state.s.abs(), scope="optimizer")
        self.estimate(state, state.d_numerator * beta3 + gained, length)

        direction = state.exp_avg / (state.exp_avg_sq.sqrt() + state.d * self.eps)
        return weight - step_size * (direction + h.weight_decay * weight)

    def estimate(self, state: Any, numerator: Tensor, length: Tensor) -> None:
        """The new d."""
        found = torch.where(length > 0, self.d_coef * numerator / length, state.d)
        first = torch.where(state.d == self.d0, torch.maximum(state.d, found), state.d)
        state.d_numerator = numerator
        state.d_max = torch.maximum(state.d_max, found)
        state.d = state.d_max if self.growth_rate is None else torch.minimum(state.d_max, first * self.growth_rate)
