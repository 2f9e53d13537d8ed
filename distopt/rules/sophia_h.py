"""Sophia-H: steps by a diagonal Hessian estimate, clipped (Liu et al., 2023, arXiv 2305.14342, algorithm 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from distopt.rule import Shape, State
from distopt.rules.sophia_g import SophiaG


@dataclass(frozen=True)
class SophiaH(SophiaG):
    """Sophia-G with Hutchinson's estimate of the Hessian's diagonal for H: u ⊙ (∇²L u) with random signs u, which is what
    `.grad` holds when `optimizer.observe("hessian")` is called; `bs` is 1 for a mean loss. Where H is negative the step is
    clipped. rho is the authors' γ for this estimate.

    lr, evidence and deviations are Sophia-G's; the estimate needs a product with the Hessian: a second backward pass
    through the first, or two gradients at W ± ε u.

    Start: lr 0.8 of AdamW's, betas (0.96, 0.99), rho 0.01, an estimate every 10 steps (the paper).
    """

    betas: tuple[float, float] = (0.96, 0.99)
    rho: float = 0.01
    bs: float = 1

    def states(self, shape: Shape) -> dict[str, State]:
        return {"exp_avg": State("like"), "hessian": State("like")}

    def observe(self, name: str, value: Tensor, state: Any, h: Any) -> None:
        state.hessian = state.hessian.lerp(value, 1 - self.betas[1])
