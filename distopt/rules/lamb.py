"""LAMB (You et al., 2020, arXiv 1904.00962, algorithm 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from distopt.rule import Rule, Shape, State, Sum, Update


@dataclass(frozen=True)
class LAMB(Rule):
    """Adam's step with weight decay added to it, scaled to the norm of the tensor's weights. For large batches.

    lr is the length of a tensor's step relative to its weights. Implementations disagree; this is timm's
    Lamb(max_grad_norm=None, always_adapt=True): moments with bias correction, as in the paper, the ratio of norms not
    bounded, and 1 where either norm is zero. A global clip is `max_grad_norm`, here as on all optimizers.

    Start: lr 6.25e-4 at batch size 512, growing as its root, weight decay 0.01 (the paper, BERT).
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    weight_decay: float = 0.01

    reach: ClassVar = "reduce"

    def states(self, shape: Shape) -> dict[str, State]:
        return {"exp_avg": State("like"), "exp_avg_sq": State("like", signed=False)}

    def scalars(self, step: int) -> dict[str, Any]:
        beta1, beta2 = self.betas
        return {"bias_correction1": 1 - beta1**step, "bias_correction2_sqrt": (1 - beta2**step) ** 0.5}

    def update(self, grad: Tensor, weight: Tensor, state: Any, h: Any) -> Update:
        beta1, beta2 = self.betas
        state.exp_avg = state.exp_avg.lerp(grad, 1 - beta1)
        state.exp_avg_sq = torch.addcmul(state.exp_avg_sq * beta2, grad, grad, value=1 - beta2)
        denominator = state.exp_avg_sq.sqrt() / h.bias_correction2_sqrt + self.eps
        update = (state.exp_avg / h.bias_correction1 / denominator).add(weight, alpha=h.weight_decay)

        weights, updates = yield Sum(weight * weight, scope="tensor"), Sum(update * update, scope="tensor")
        trust = torch.where((weights > 0) & (updates > 0), weights.sqrt() / updates.sqrt(), 1.0)
        return weight - update * (h.lr * trust)
