"""LARS (You, Gitman and Ginsburg, 2017, arXiv 1708.03888, algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from distopt.rule import Rule, Shape, State, Sum, Update, require


@dataclass(frozen=True)
class LARS(Rule):
    """SGD with momentum whose gradients are scaled, tensor by tensor, to `trust_coeff` times the norm of the weights.

    lr · trust_coeff is the length of a tensor's step relative to its weights, before momentum. The variant is timm's
    Lars: the scaled gradient goes into the momentum, which lr multiplies, where the paper has lr inside the momentum;
    the first buffer is the first gradient. Vectors and scalars are SGD, without scaling, as is usual for biases and
    norms: give them a group with an lr of their own.

    Start: trust_coeff 1e-3, momentum 0.9, a sweep of lr from 1.0 (the paper has the coefficient).
    """

    lr: float = 1.0
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    trust_coeff: float = 1e-3
    eps: float = 1e-8

    reach: ClassVar = "reduce"

    def check(self) -> None:
        super().check()
        require(self.trust_coeff > 0, f"trust_coeff must be > 0, got {self.trust_coeff}")
        plain = self.momentum > 0 and self.dampening == 0
        require(not self.nesterov or plain, "Nesterov momentum requires a momentum and zero dampening")

    def states(self, shape: Shape) -> dict[str, State]:
        return {"momentum_buffer": State("like")} if self.momentum else {}

    def update(self, grad: Tensor, weight: Tensor, state: Any, h: Any) -> Update:
        update = grad.add(weight, alpha=h.weight_decay)
        if h.shape.is_matrix:
            weights, grads = yield Sum(weight * weight, scope="tensor"), Sum(grad * grad, scope="tensor")
            norm = weights.sqrt()
            trust = self.trust_coeff * norm / (grads.sqrt() + norm * h.weight_decay + self.eps)
            update = update * torch.where((weights > 0) & (grads > 0), trust, 1.0)
        if self.momentum:
            if h.step == 1:
                state.momentum_buffer = update
            else:
                state.momentum_buffer = (state.momentum_buffer * self.momentum).add(update, alpha=1 - self.dampening)
            update = update.add(state.momentum_buffer, alpha=self.momentum) if self.nesterov else state.momentum_buffer
        return weight.add(update, alpha=-h.lr)
