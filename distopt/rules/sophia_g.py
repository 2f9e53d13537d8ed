"""Sophia-G: steps by a diagonal Gauss–Newton estimate, clipped (Liu et al., 2023, arXiv 2305.14342, algorithm 3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from distopt.rule import Rule, Shape, State, require


@dataclass(frozen=True)
class SophiaG(Rule):
    """W ← (1 − lr · weight_decay) W − lr · sign(M) · min(|M| / (rho · bs · H), 1), where M is a running mean of gradients
    with weight 1 − betas[0] and H one of squared sampled gradients with 1 − betas[1]: those of the loss against labels
    that are drawn from the model's own predictions (Gauss–Newton–Bartlett), `bs` of them in the mean. The variant is
    github.com/Liuhong99/Sophia, without bias correction; 1e-15 is added to the denominator.

    Every few steps (the authors: 10): clear the gradients, `(loss on sampled labels).backward()`,
    `optimizer.observe("hessian")`, clear again. Before the first one H is 0, so the step is signSGD's with momentum.

    lr: the largest step of a coordinate, taken where curvature is small against the gradient; rho sets how often that
    is (the authors choose it so that 10 to 50 % of coordinates are not clipped), and take an lr a little below AdamW's.

    Its authors report half the steps of AdamW. Third parties do not confirm it: gains over a tuned AdamW of at most 1.4
    times at 0.1B parameters for any rule (arXiv 2509.02046), and Sophia unstable on long runs (arXiv 2509.01440). The
    estimate costs a forward and a backward pass each time.

    Start: lr 0.8 of AdamW's, betas (0.965, 0.99), rho 0.04, an estimate every 10 steps (github.com/Liuhong99/Sophia).
    """

    lr: float = 1e-4
    betas: tuple[float, float] = (0.965, 0.99)
    rho: float = 0.04
    weight_decay: float = 0.1
    bs: float = 5120

    reach: ClassVar = "elementwise"
    observes: ClassVar[Mapping[str, Literal["like", "row"]]] = {"hessian": "like"}

    def check(self) -> None:
        super().check()
        require(self.rho > 0, f"rho must be above 0, got {self.rho}")
        require(self.bs > 0, f"bs, the labels in a batch, must be above 0, got {self.bs}")

    def states(self, shape: Shape) -> dict[str, State]:
        return {"exp_avg": State("like"), "hessian": State("like", signed=False)}

    def update(self, grad: Tensor, weight: Tensor, state: Any, h: Any) -> Tensor:
        m = state.exp_avg = state.exp_avg.lerp(grad, 1 - self.betas[0])
        ratio = (m.abs() / (state.hessian.clamp(min=0) * (self.rho * self.bs) + 1e-15)).clamp(max=1)
        return (weight * (1 - h.lr * h.weight_decay)).addcmul(m.sign(), ratio, value=-h.lr)

    def observe(self, name: str, value: Tensor, state: Any, h: Any) -> None:
        state.hessian = state.hessian.lerp(value * value, 1 - self.betas[1])
