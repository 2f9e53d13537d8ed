"""Dion: low-rank orthonormal updates (Ahn et al., 2025, arXiv 2504.05295, algorithm 2)."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from math import ceil
from typing import Any, ClassVar

import torch
from torch import Tensor

from distopt.matrix.projection import gaussian
from distopt.rule import Back, Rule, Shape, State, Update, Whole, require
from distopt.rules.muon import SCALES


@dataclass(frozen=True)
class Dion(Rule):
    """M ← M + G; one power iteration from the last basis Q gives M ≈ P Rᵀ, P orthonormal with `rank_fraction` of the
    shorter side as its rank; W ← W − lr P Qᵀ with the columns of R made unit vectors for Q; and M ← M − (1 − mu) P Rᵀ,
    so that what the rank leaves out waits (error feedback). A wide matrix is transposed.

    lr: the spectral norm of the step is about lr, times a factor for the shape: "spectral" √(rows/cols), the default of
    github.com/microsoft/dion and here; the others are Muon's.

    Deviations: Householder QR instead of a randomized Cholesky QR, which it equals up to rounding; Q begins with normal
    numbers from `seed`, the same for matrices of one shape; M is fp32 and lives with whoever computes the matrix, and
    gradients travel whole, where the authors can send P and R instead. Compute is matrix by matrix.

    It pays at small rank fractions of large matrices, where Newton–Schulz costs more than the QR. At full rank it
    approximates what Muon computes; the authors' later Dion2 selects rows instead. No third party's figure is known to
    us.

    Start: lr 0.01, mu 0.95 (the defaults of github.com/microsoft/dion).
    """

    lr: float = 1e-2
    mu: float = 0.95
    weight_decay: float = 0.01
    rank_fraction: float = 1.0
    eps: float = 1e-8
    adjust_lr_fn: str | None = "spectral"
    _: KW_ONLY
    seed: int = 0

    reach: ClassVar = "matrix"
    batched: ClassVar = False
    create_defaults: ClassVar = {"adjust_lr_fn": "match_rms_adamw"}

    def check(self) -> None:
        super().check()
        require(self.adjust_lr_fn is None or self.adjust_lr_fn in SCALES, f"adjust_lr_fn: one of {list(SCALES)}")
        require(0 < self.rank_fraction <= 1, f"rank_fraction must lie in (0, 1], got {self.rank_fraction}")
        require(0 <= self.mu < 1, f"mu must lie in [0, 1), got {self.mu}")
        require(0 <= self.seed < 2**62, f"seed must lie in 0 … 2⁶², got {self.seed}")

    def states(self, shape: Shape) -> dict[str, State]:
        short = min(shape.rows, shape.cols)
        basis = State("owner", (short, ceil(self.rank_fraction * short)))
        return {"momentum_buffer": State("owner", (shape.rows, shape.cols)), "basis": basis}

    def update(self, grad: Tensor, weight: Tensor, state: Any, h: Any) -> Update:
        g = yield Whole(grad)
        wide = h.shape.rows < h.shape.cols
        buffer = state.momentum_buffer + g
        basis = state.basis
        if h.step == 1:
            basis = gaussian(basis.shape[-2], basis.shape[-1], self.seed, g.device).expand_as(basis)
        m = buffer.mT if wide else buffer
        left = torch.linalg.qr(m @ basis)[0]
        right = m.mT @ left
        captured = left @ right.mT
        state.momentum_buffer = buffer.add(captured.mT if wide else captured, alpha=self.mu - 1)
        # A matrix without gradients yet has no directions: its basis waits, and it does not move.
        alive = (buffer != 0).any(-1, keepdim=True).any(-2, keepdim=True)
        unit = right / (torch.linalg.vector_norm(right, dim=-2, keepdim=True) + self.eps)
        state.basis = torch.where(alive, unit, basis)
        direction = left @ unit.mT * alive
        direction = yield Back(direction.mT if wide else direction)
        scale = SCALES[self.adjust_lr_fn or "original"](h.shape.rows, h.shape.cols)
        return (weight * (1 - h.lr * h.weight_decay)).add(direction, alpha=-h.lr * scale)
