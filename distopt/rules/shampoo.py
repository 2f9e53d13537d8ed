"""Shampoo: a preconditioner per side of a matrix (Gupta et al., 2018, arXiv 1802.09568; Shi et al., 2023, 2309.06497)."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor

from distopt.matrix.inverse_root import RootMethod, inverse_root
from distopt.rule import Back, Rule, Shape, State, Update, Whole, require

GRAFTINGS = (None, "sgd", "adagrad", "adam")
# No product of a gradient with itself or with a factor's inverse root overflows below this entry, at any size.
LARGEST_ENTRY = 2.0**32


@dataclass(frozen=True)
class Shampoo(Rule):
    """W ← W − lr L^(−1/4) M R^(−1/4), where L and R are running means of G Gᵀ and Gᵀ G with weight 1 − betas[1], and M
    one of G with 1 − betas[0], all of them bias-corrected. Weight decay is decoupled.

    The variant is Meta's DistributedShampoo(betas=(0, .99), precondition_frequency=1, start_preconditioning_step=1)
    without blocks: roots of the factors with this step's gradient in them, at `start_preconditioning_step` and at every
    later multiple of `precondition_frequency`; `eps` is added to a factor's diagonal. Before the first roots G itself,
    or the grafted step, is taken. With `root="qr"` a root reuses the last eigenbasis; "newton" needs products only.

    lr: without grafting, a step has about the spectral norm lr where the gradient repeats itself and up to √(1/(1 −
    betas[1])) less where it is noise. `grafting` takes the Frobenius norm of each step from another rule, and lr's
    units with it: "sgd" (M), "adagrad" (M / (√Σg² + grafting_eps)) or "adam" (√ of a running mean instead).

    Deviations: a side longer than `max_precond_dim` keeps the identity, and the other one then takes the root −1/2;
    where no side is left, and on vectors, the step is the grafted rule's, or M / √(mean of g² + eps), Shampoo's diagonal.
    Gradients with entries above 2³² are scaled down to that. A root that cannot be computed keeps the last one.
    Compute is matrix by matrix, since inverse roots amplify the rounding of a batched product.
    """

    lr: float = 1e-2
    betas: tuple[float, float] = (0.0, 0.99)
    eps: float = 1e-12
    weight_decay: float = 0.0
    precondition_frequency: int = 1
    start_preconditioning_step: int = 1
    max_precond_dim: int = 10000
    _: KW_ONLY
    root: RootMethod = "eigh"
    grafting: str | None = None
    grafting_beta2: float = 0.999
    grafting_eps: float = 1e-8

    reach: ClassVar = "matrix"
    batched: ClassVar = False
    create_defaults: ClassVar = {"grafting": "adam"}

    def check(self) -> None:
        super().check()
        require(self.eps > 0, "eps must be above 0: a singular factor has no root without it")
        require(self.root in get_args(RootMethod), f"root: one of {get_args(RootMethod)}, got {self.root!r}")
        require(self.grafting in GRAFTINGS, f"grafting: one of {GRAFTINGS}, got {self.grafting!r}")
        require(0 <= self.grafting_beta2 < 1, f"grafting_beta2 must lie in [0, 1), got {self.grafting_beta2}")
        require(self.grafting_eps > 0, f"grafting_eps must be above 0, got {self.grafting_eps}")
        for name in ("precondition_frequency", "start_preconditioning_step", "max_precond_dim"):
            require(getattr(self, name) >= 1, f"{name} must be ≥ 1, got {getattr(self, name)}")

    def refuse(self, shape: Shape) -> str | None:
        return None

    def sides(self, shape: Shape) -> dict[str, int]:
        """The sides that have a factor, with their lengths."""
        lengths = {"left": shape.rows, "right": shape.cols} if shape.is_matrix else {}
        return {side: length for side, length in lengths.items() if length <= self.max_precond_dim}

    def states(self, shape: Shape) -> dict[str, State]:
        sides = self.sides(shape)
        whole = State("owner", (shape.rows, shape.cols)) if sides else State("like")
        states = {"exp_avg": whole} if self.betas[0] else {}
        if self.grafting in ("adagrad", "adam") or not (sides or self.grafting):
            states["exp_avg_sq"] = whole
        for side, length in sides.items():
            states[f"factor_{side}"] = states[f"root_{side}"] = State("owner", (length, length))
            if self.root == "qr":
                states[f"basis_{side}"] = State("owner", (length, length))
        return states

    def scalars(self, step: int) -> dict[str, Any]:
        first, every = self.start_preconditioning_step, self.precondition_frequency
        return {
            "correction1": 1 - self.betas[0] ** step,
            "correction2": 1 - self.betas[1] ** step,
            "grafting_correction2": 1 - self.grafting_beta2**step,
            "refreshing": step == first or (step > first and step % every == 0),
        }

    def phases(self) -> dict[str, tuple[int, float]]:
        first, every = self.start_preconditioning_step, self.precondition_frequency
        refresh = (first // every + 1) * every
        return {"refresh": (refresh, 1 / every)} | ({"step": (refresh + 1, 1 - 1 / every)} if every > 1 else {})

    def update(self, grad: Tensor, weight: Tensor, state: Any, h: Any) -> Update:
        sides = self.sides(h.shape)
        if sides:
            g = yield Whole(grad)
            g = g * (LARGEST_ENTRY / g.abs().amax((-2, -1), keepdim=True)).clamp(max=1)
            for side, length in sides.items():
                self.accumulate(side, g @ g.mT if side == "left" else g.mT @ g, len(sides), state, h)
            m = self.first_moment(g, state, h)
            grafted = self.grafted(g, m, state, h)
            if h.step < self.start_preconditioning_step:
                direction = grafted
            else:
                direction = self.precondition(m, state)
                if self.grafting:
                    norm, own = (torch.linalg.matrix_norm(x, keepdim=True) for x in (grafted, direction))
                    direction = direction * (norm / (own + 1e-16))
            direction = yield Back(direction)
        else:
            m = self.first_moment(grad, state, h)
            direction = self.grafted(grad, m, state, h)
        return weight * (1 - h.lr * h.weight_decay) - h.lr * direction
