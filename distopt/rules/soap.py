"""SOAP: Adam in Shampoo's eigenbasis (Vyas et al., 2024, arXiv 2409.11321, algorithm 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from distopt.matrix.eigenbasis import Basis, counted, eigenbasis, refresh, reorder
from distopt.rule import Back, Shape, State, TwoSided, Update, Whole, require

SIDES = (("left", -2), ("right", -1))


@dataclass(frozen=True)
class SOAP(TwoSided):
    """Adam on the gradient rotated into the eigenbases of its running covariances L = ⟨G Gᵀ⟩ and R = ⟨Gᵀ G⟩.

    The variant of github.com/nikhilvyas/SOAP: the first step only initializes L, R and their bases; weight decay comes
    after the update; every `precondition_frequency` steps, after the step, a basis is refreshed by one power iteration
    and a QR decomposition, columns sorted by estimated eigenvalue: all bases in the same step with `synchronous`, as
    published; else side by side in turns, so that every step costs the same. A side longer than `max_precond_dim` keeps
    the identity. On vectors it is Adam. Adam's first moment is kept in the rotated basis, and is rotated over
    when the basis changes.

    lr is what Adam's is: the size of a step in each rotated coordinate where the gradient keeps its sign. Compute is
    matrix by matrix, since eigenbases amplify the rounding of a batched product. Deviation: entries above 2³² scale their
    gradient down to it, so that no square overflows.

    Start: lr 3e-3, betas (0.95, 0.95), a refresh every 10 steps (github.com/nikhilvyas/SOAP); at 130M parameters lr
    1.6e-2, betas (0.95, 0.99) (arXiv 2509.02046).
    """

    lr: float = 3e-3
    betas: tuple[float, float] = (0.95, 0.95)
    shampoo_beta: float = -1
    eps: float = 1e-8
    weight_decay: float = 0.01
    precondition_frequency: int = 10
    max_precond_dim: int = 10000

    reach: ClassVar = "matrix"
    batched: ClassVar = False

    def check(self) -> None:
        super().check()
        require(self.shampoo_beta < 1, f"shampoo_beta must be < 1 (negative: beta2), got {self.shampoo_beta}")

    def refuse(self, shape: Shape) -> str | None:
        return None

    def states(self, shape: Shape) -> dict[str, State]:
        if not shape.is_matrix:
            return {"exp_avg": State("like"), "exp_avg_sq": State("like", signed=False)}
        whole = (shape.rows, shape.cols)
        states = {"exp_avg": State("owner", whole), "exp_avg_sq": State("owner", whole, signed=False)}
        for side, size in self.sides(shape).items():
            states[f"gram_{side}"] = State("owner", (size, size), symmetric=True)
            states[f"basis_{side}"] = State("owner", (size, size))
        return states | self.failures(shape)

    def scalars(self, step: int) -> dict[str, Any]:
        beta1, beta2 = self.betas
        adam_step = max(step - 1, 1)  # the first step does not count
        return {"step_size": self.lr * (1 - beta2**adam_step) ** 0.5 / (1 - beta1**adam_step)}

    def update(self, grad: Tensor, weight: Tensor, state: Any, h: Any) -> Update:
        g = grad
        if h.shape.is_matrix:
            g = yield Whole(grad)
            g = g * (2.0**32 / g.abs().amax((-2, -1), keepdim=True)).clamp(max=1)
        if h.step > 1:
            rotated = rotate(g, state)
            state.exp_avg = state.exp_avg.lerp(rotated, 1 - self.betas[0])
            state.exp_avg_sq = state.exp_avg_sq.lerp(rotated.square(), 1 - self.betas[1])
            direction = rotate_back(state.exp_avg / (state.exp_avg_sq.sqrt() + self.eps), state)
        else:
            direction = torch.zeros_like(g)
        if h.shape.is_matrix:
            self.precondition(g, state, h)
            direction = yield Back(direction)
        if h.step == 1:
            return weight
        return weight.add(direction, alpha=-h.step_size) * (1 - h.lr * h.weight_decay)

    def precondition(self, g: Tensor, state: Any, h: Any) -> None:
        """Add the gradient's covariances, and refresh the bases where it is time."""
        beta = self.betas[1] if self.shampoo_beta < 0 else self.shampoo_beta
        first = rotate_back(state.exp_avg, state) if h.due else None
        for side, dim in SIDES:
            if not hasattr(state, f"gram_{side}"):  # longer than max_precond_dim
                continue
            gram = getattr(state, f"gram_{side}").lerp(g @ g.mT if side == "left" else g.mT @ g, 1 - beta)
            setattr(state, f"gram_{side}", gram)
            if h.step == 1:
                setattr(state, f"basis_{side}", eigenbasis(gram).q)
            elif side in h.due:
                new: Basis = refresh(gram, getattr(state, f"basis_{side}"))
                setattr(state, f"basis_{side}", new.q)
                setattr(state, f"failures_{side}", counted(getattr(state, f"failures_{side}"), new.ok))
                state.exp_avg_sq = reorder(state.exp_avg_sq, new.order, dim)
        if first is not None:
            state.exp_avg = rotate(first, state)


def rotate(x: Tensor, state: Any) -> Tensor:
    """Qₗᵀ X Qᵣ, with the identity for a side that has no basis."""
    if hasattr(state, "basis_left"):
        x = state.basis_left.mT @ x
    return x @ state.basis_right if hasattr(state, "basis_right") else x


def rotate_back(x: Tensor, state: Any) -> Tensor:
    """Qₗ X Qᵣᵀ, the inverse of `rotate`."""
    if hasattr(state, "basis_left"):
        x = state.basis_left @ x
    return x @ state.basis_right.mT if hasattr(state, "basis_right") else x
