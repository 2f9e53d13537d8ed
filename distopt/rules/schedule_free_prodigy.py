"""Schedule-Free Prodigy: Prodigy's d (arXiv 2306.06101) as the learning rate of Schedule-Free AdamW (2405.15682)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from distopt.rule import Shape, State, Sum, Update, require
from distopt.rules.prodigy import Prodigy
from distopt.rules.schedule_free_sgd import ScheduleFree


@dataclass(frozen=True)
class ScheduleFreeProdigy(ScheduleFree, Prodigy):
    """Neither a learning rate nor a schedule: z takes Prodigy's steps without a first moment, x is the average of z with
    the weight (largest d·lr so far)², gradients are taken at y = (1 − β₁) z + β₁ x, and d is estimated from them. No paper
    has the combination; both halves are as their authors' code. Options are Prodigy's.

    The model's weights are y while training and x to evaluate and to keep: call `optimizer.eval()` before either, and
    `optimizer.train()` before the next step.

    lr is a factor on d, as Prodigy's.

    Start: lr 1, no schedule (both papers).

    AlgoPerf's external tuning gave a submission of this kind 0 points, where Schedule-Free AdamW had 0.71: it is for
    trying, not for counting on.
    """

    @property
    def beta(self) -> float:
        return self.betas[0]

    def check(self) -> None:
        super().check()
        require(self.betas[0] > 0, f"betas[0] must be > 0: gradients are taken there, got {self.betas[0]}")

    def states(self, shape: Shape) -> dict[str, State]:
        states = super().states(shape)
        del states["exp_avg"]
        return {**states, "z": State("like", fill="weight"), "lr_max": State("group"), "weight_sum": State("group")}

    def update(self, grad: Tensor, weight: Tensor, state: Any, h: Any) -> Update:
        beta2 = self.betas[1]
        beta3 = beta2**0.5 if self.beta3 is None else self.beta3
        d, step_size = state.d, state.d * h.factor
        state.exp_avg_sq = state.exp_avg_sq * beta2 + grad * grad * (d * d * (1 - beta2))
        state.s = state.s * beta3 + grad * (d / self.d0 * (d if self.safeguard_warmup else step_size))

        way = grad * (state.p0 - weight) * (d / self.d0 * step_size)
        gained, length = yield Sum(way, scope="optimizer"), Sum(state.s.abs(), scope="optimizer")
        self.estimate(state, state.d_numerator * beta3 + gained, length)

        direction = d * grad / (state.exp_avg_sq.sqrt() + state.d * self.eps) + h.weight_decay * weight
        share = self.share(state, step_size, 1.0, 2.0)
        return self.towards_average(weight, state, direction, step_size, share)
