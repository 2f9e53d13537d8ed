"""KL-Shampoo: Shampoo's factors as a covariance fitted by KL divergence (Lin et al., 2025, arXiv 2509.03378)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from distopt.matrix.eigenbasis import counted, eigenbasis
from distopt.rule import Back, Shape, State, TwoSided, Update, Whole, require
from distopt.rules.soap import rotate, rotate_back


@dataclass(frozen=True)
class KLShampoo(TwoSided):
    """W ← W − lr S_L^(−1/2) M S_R^(−1/2), where each factor is a running mean of the gradient's covariance in the metric
    of the other one, S_L ← ⟨G S_R^(−1) Gᵀ⟩ / cols and S_R ← ⟨Gᵀ S_L^(−1) G⟩ / rows, and M a running mean of G.

    The variant with QR and a running mean of eigenvalues (github.com/yorkerlin/KL-Methods): between refreshes, every
    `precondition_frequency` steps, bases stay and eigenvalues follow each gradient; a refresh is one power iteration
    and a QR decomposition, after the step, of all bases at once with `synchronous`, else side by side in turns.
    Eigenvalues begin at `init_factor` and do not fall below 1 / max(10, min(n, 4000))² for a side of n. The first step
    only initializes. Nothing is bias-corrected. Weight decay comes after the update.

    lr: the size of a step in each rotated coordinate where the gradient keeps its sign, as Adam's.

    Deviations: fp32 where the authors take bf16; a side longer than `max_precond_dim` keeps the identity for its basis,
    with eigenvalues of its own; entries above 2³² scale their gradient down to it; a refresh that fails keeps the last
    basis. Compute is matrix by matrix, since bases amplify rounding.

    Start: SOAP's lr, since the units are the same; betas (0.9, 0.98), a refresh every 10 steps
    (github.com/yorkerlin/KL-Methods).
    """

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    weight_decay: float = 0.01
    precondition_frequency: int = 10
    max_precond_dim: int = 10000
    init_factor: float = 0.1

    reach: ClassVar = "matrix"
    batched: ClassVar = False

    def check(self) -> None:
        super().check()
        require(self.init_factor > 0, f"init_factor must be above 0, got {self.init_factor}")

    def states(self, shape: Shape) -> dict[str, State]:
        states = {"exp_avg": State("owner", (shape.rows, shape.cols))}
        for side, size in (("left", shape.rows), ("right", shape.cols)):
            states[f"eigenvalues_{side}"] = State("owner", (size, 1), fill=self.init_factor, signed=False)
            if size <= self.max_precond_dim:
                states[f"factor_{side}"] = State("owner", (size, size), symmetric=True)
                states[f"basis_{side}"] = State("owner", (size, size))
        return states | self.failures(shape)

    def update(self, grad: Tensor, weight: Tensor, state: Any, h: Any) -> Update:
        g = yield Whole(grad)
        g = g * (2.0**32 / g.abs().amax((-2, -1), keepdim=True)).clamp(max=1)
        direction, halves = torch.zeros_like(g), {"left": g, "right": g.mT}
        if h.step > 1:
            left, right = state.eigenvalues_left.sqrt(), state.eigenvalues_right.sqrt().mT
            state.exp_avg = state.exp_avg.lerp(g, 1 - self.betas[0])
            direction = rotate_back(rotate(state.exp_avg, state) / (left * right + self.eps), state)
            rotated = rotate(g, state)
            halves["left"] = (g @ state.basis_right if hasattr(state, "basis_right") else g) / right
            halves["right"] = ((state.basis_left.mT @ g if hasattr(state, "basis_left") else g) / left).mT
            state.eigenvalues_left = self.followed(state.eigenvalues_left, rotated / right)
            state.eigenvalues_right = self.followed(state.eigenvalues_right, (rotated / left).mT)
        for side, half in halves.items():
            if hasattr(state, f"factor_{side}"):
                self.accumulate(side, half @ half.mT / half.shape[-1], state, h)
        direction = yield Back(direction)
        if h.step == 1:
            return weight
        return weight.add(direction, alpha=-h.lr) * (1 - h.lr * h.weight_decay)

    def followed(self, eigenvalues: Tensor, whitened: Tensor) -> Tensor:
        """Eigenvalues (n, 1) with the rows of a gradient in them that the other factor has whitened."""
        size = whitened.shape[-2]
        mean = eigenvalues.lerp(whitened.square().mean(-1, keepdim=True), 1 - self.betas[1])
        return mean.clamp(min=max(10, min(size, 4000)) ** -2)

    def accumulate(self, side: str, product: Tensor, state: Any, h: Any) -> None:
        """Add to a factor, and refresh its basis where it is time."""
        factor = getattr(state, f"factor_{side}").lerp(product, 1 - self.betas[1])
        setattr(state, f"factor_{side}", factor)
        if h.step == 1:
            setattr(state, f"basis_{side}", eigenbasis(factor).q)
        elif side in h.due:
            old = getattr(state, f"basis_{side}")
            new = torch.linalg.qr(factor @ old)[0]
            ok = new.isfinite().flatten(1).all(1)
            setattr(state, f"basis_{side}", torch.where(ok[:, None, None], new, old))
            setattr(state, f"failures_{side}", counted(getattr(state, f"failures_{side}"), ok))
