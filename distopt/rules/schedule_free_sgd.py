"""Schedule-Free SGD (Defazio et al., 2024, arXiv 2405.15682, algorithm of section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from distopt.rule import Rule, Shape, State, require


class ScheduleFree(Rule):
    """Of every Schedule-Free rule: z steps, x is the average of z, gradients are taken at y = (1 − β) z + β x. The model's
    weights are y while training and x to evaluate and to keep."""

    modes: ClassVar = True

    @property
    def beta(self) -> float:
        """β, in (0, 1)."""
        raise NotImplementedError

    def evaluated(self, weight: Tensor, state: Any) -> Tensor:
        return weight + (state.z - weight) * (1 - 1 / self.beta)

    def trained(self, weight: Tensor, state: Any) -> Tensor:
        return weight + (state.z - weight) * (1 - self.beta)

    def share(self, state: Any, lr: Tensor, step_weight: float, power: float) -> Tensor:
        """c, the share of this step's z in the average x."""
        state.lr_max = torch.maximum(state.lr_max, lr)
        weight = step_weight * state.lr_max**power
        state.weight_sum = state.weight_sum + weight
        return torch.where(state.weight_sum > 0, weight / state.weight_sum, 0.0)

    def towards_average(self, y: Tensor, state: Any, direction: Tensor, lr: Tensor, share: Tensor) -> Tensor:
        """The next y, with z stepped against the direction and x moved to it by its share."""
        y = y + (state.z - y) * share + direction * (lr * (self.beta * (1 - share) - 1))
        state.z = state.z - lr * direction
        return y


@dataclass(frozen=True)
class ScheduleFreeSGD(ScheduleFree):
    """SGD whose average of iterates takes the place of a learning-rate schedule: z steps, x is the average of z, gradients
    are taken at y between the two, momentum of the way from z to x. Names, order and defaults are schedulefree's.

    The model's weights are y while training and x to evaluate and to keep: call `optimizer.eval()` before either, and
    `optimizer.train()` before the next step. Each z has the weight step^r · (largest lr so far)^weight_lr_power.

    lr multiplies the gradient, as SGD's, and is constant after `warmup_steps`.

    Start: 10 to 50 times the lr of SGD with a schedule, momentum 0.9, warmup (its authors' README).

    It pays where the length of training is not known in advance. Batch-norm statistics must be computed anew at x.
    """

    lr: float = 1.0
    momentum: float = 0.9
    weight_decay: float = 0.0
    warmup_steps: int = 0
    r: float = 0.0
    weight_lr_power: float = 2.0

    reach: ClassVar = "elementwise"

    @property
    def beta(self) -> float:
        return self.momentum

    def check(self) -> None:
        super().check()
        require(0 < self.momentum < 1, f"momentum must lie in (0, 1): gradients are taken there, got {self.momentum}")
        require(self.warmup_steps >= 0, f"warmup_steps must be ≥ 0, got {self.warmup_steps}")

    def states(self, shape: Shape) -> dict[str, State]:
        return {"z": State("like", fill="weight"), "lr_max": State("group"), "weight_sum": State("group")}

    def scalars(self, step: int) -> dict[str, Any]:
        return {"warm_lr": self.lr * min(1.0, step / max(self.warmup_steps, 1)), "step_weight": float(step) ** self.r}

    def update(self, grad: Tensor, weight: Tensor, state: Any, h: Any) -> Tensor:
        lr = torch.full_like(state.lr_max, h.warm_lr)
        share = self.share(state, lr, h.step_weight, self.weight_lr_power)
        return self.towards_average(weight, state, grad + h.weight_decay * weight, lr, share)
