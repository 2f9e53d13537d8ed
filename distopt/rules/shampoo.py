"""Shampoo: a preconditioner per side of a matrix (Gupta et al., 2018, arXiv 1802.09568; Shi et al., 2023, 2309.06497)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, get_args

from torch import Tensor
from torch.linalg import matrix_norm as norm

from distopt.matrix.eigenbasis import counted
from distopt.matrix.inverse_root import RootMethod, inverse_root
from distopt.rule import Back, Shape, State, TwoSided, Update, Whole, require


@dataclass(frozen=True)
class Shampoo(TwoSided):
    """W ← W − lr L^(−1/4) M R^(−1/4), where L and R are running means of G Gᵀ and Gᵀ G with weight 1 − betas[1], and M
    one of G with 1 − betas[0], all bias-corrected. Weight decay is decoupled. The variant is Meta's DistributedShampoo(
    betas=(0, .99), precondition_frequency=1, start_preconditioning_step=1), with blocks where there is a `block_size`
    (each grafted by itself) and convolutions merged to (out, rest): roots of factors that have this step's gradient in
    them, at step 1 and every multiple of `precondition_frequency` (with `synchronous`; else side by side in turns), `eps`
    added to the diagonal, by "eigh", "newton" or "qr" (from the last eigenbasis).

    lr: without grafting, a step's spectral norm is about lr. `grafting` gives each step the Frobenius norm, and so lr
    the units, of another rule: "sgd" (M), "adagrad" (M / (√Σg² + grafting_eps)), "adam" (mean with betas[1] for sum).

    Deviations: a side longer than `max_precond_dim` keeps the identity, the other one then takes the root −1/2. Without
    any side, and on vectors, the step is the grafted rule's, "adam" if there is none. Entries above 2³² scale their
    gradient down to it. A root that fails keeps the last one; where there is none, the step is 0. One matrix at a time.

    Start: grafting "adam" with Adam's lr, betas (0.9, 0.999) (Shi et al., 2023, arXiv 2309.06497).
    """

    lr: float = 1e-2
    betas: tuple[float, float] = (0.0, 0.99)
    eps: float = 1e-12
    weight_decay: float = 0.0
    precondition_frequency: int = 1
    max_precond_dim: int = 10000
    root: RootMethod = "eigh"
    grafting: str | None = None
    grafting_eps: float = 1e-8

    reach: ClassVar = "matrix"
    batched: ClassVar = False
    create_defaults: ClassVar = {"grafting": "adam"}

    def check(self) -> None:
        super().check()
        require(
            self.grafting in (None, "sgd", "adagrad", "adam"), f"no grafting {self.grafting!r}: sgd, adagrad or adam"
        )
        require(self.root in get_args(RootMethod), f"root: one of {get_args(RootMethod)}, got {self.root!r}")
        require(self.eps > 0 and self.grafting_eps > 0, "eps and grafting_eps must be above 0: zeros are divided by it")

    def refuse(self, shape: Shape) -> str | None:
        return None

    def states(self, shape: Shape) -> dict[str, State]:
        moment = State("owner", (shape.rows, shape.cols)) if shape.is_matrix else State("like")
        states = {"exp_avg": moment} if self.betas[0] else {}
        if self.grafting != "sgd" and (self.grafting or not self.sides(shape)):
            states["exp_avg_sq"] = replace(moment, signed=False)
        kept = ("factor", "root", "basis") if self.root == "qr" else ("factor", "root")
        for side, n in self.sides(shape).items():
            states |= {f"{name}_{side}": State("owner", (n, n), symmetric=name != "basis") for name in kept}
        return states | self.failures(shape)

    def scalars(self, step: int) -> dict[str, Any]:
        decay = 1.0 if self.grafting == "adagrad" else self.betas[1]
        return {
            "corrections": [1 - beta**step for beta in self.betas],
            "squares": (decay, (1 - decay) or 1.0, (1 - decay**step) or 1.0),
        }

    def due(self, step: int, turn: int) -> bool:
        return step == 1 or (step - turn) % self.precondition_frequency == 0

    def update(self, grad: Tensor, weight: Tensor, state: Any, h: Any) -> Update:
        g = grad
        if h.shape.is_matrix:
            g = yield Whole(grad)
            g = g * (2.0**32 / g.abs().amax((-2, -1), keepdim=True)).clamp(max=1)
        direction = m = g
        if self.betas[0]:
            state.exp_avg = state.exp_avg.lerp(g, 1 - self.betas[0])
            direction = m = state.exp_avg / h.corrections[0]
        if hasattr(state, "exp_avg_sq"):
            decay, fresh, correction = h.squares
            state.exp_avg_sq = state.exp_avg_sq * decay + g.square() * fresh
            direction = m / ((state.exp_avg_sq / correction).sqrt() + self.grafting_eps)
        if sides := self.sides(h.shape):
            for side in sides:
                self.accumulate(side, g @ g.mT if side == "left" else g.mT @ g, 2 * len(sides), state, h)
            grafted, direction = direction, self.precondition(m, state)
            if self.grafting:
                direction = direction * (norm(grafted, keepdim=True) / (norm(direction, keepdim=True) + 1e-16))
        if h.shape.is_matrix:
            direction = yield Back(direction)
        return weight * (1 - h.lr * h.weight_decay) - h.lr * direction

    def accumulate(self, side: str, product: Tensor, p: int, state: Any, h: Any) -> None:
        """Add G Gᵀ or Gᵀ G to its factor and, where it is time, take the factor's root (… + eps)^(−1/p)."""
        factor = getattr(state, f"factor_{side}").lerp(product, 1 - self.betas[1])
        setattr(state, f"factor_{side}", factor)
        if side in h.due:
            basis = getattr(state, f"basis_{side}") if self.root == "qr" and h.step > 1 else None
            last, mean = getattr(state, f"root_{side}"), factor / h.corrections[1]
            found = inverse_root(mean, p, method=self.root, eps=self.eps, previous=last, basis=basis)
            setattr(state, f"root_{side}", found.root)
            setattr(state, f"failures_{side}", counted(getattr(state, f"failures_{side}"), found.ok))
            if self.root == "qr":
                setattr(state, f"basis_{side}", found.basis)

    def precondition(self, m: Tensor, state: Any) -> Tensor:
        """L^(−1/4) M R^(−1/4)."""
        m = state.root_left @ m if hasattr(state, "root_left") else m
        return m @ state.root_right if hasattr(state, "root_right") else m
