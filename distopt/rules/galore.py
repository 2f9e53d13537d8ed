"""GaLore: AdamW on the gradient's principal subspace (Zhao et al., 2024, arXiv 2403.03507, algorithm 2)."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from distopt.matrix.projection import principal_basis
from distopt.rule import Back, Rule, Shape, State, Update, Whole, require


@dataclass(frozen=True)
class GaLore(Rule):
    """W ← W − lr · scale · P Adam(Pᵀ G), where P are the first `rank` singular vectors of the gradient (at most all) on
    the shorter side of the matrix, anew at step 1 and every `update_proj_gap` steps: of all matrices in the same step with
    `synchronous`, as published, else of each in its turn, so that every step costs the same. On vectors it is AdamW. The
    variant is galore_torch.GaLoreAdamW: moments stay as they are when P changes, weight decay comes after the update
    and is not scaled.

    lr: a step has a coordinate of scale · lr in each direction of the subspace where the gradient keeps its sign; so
    lr is about 1 / scale times AdamW's.

    Deviations: of ±u the singular vector is the one whose largest entry is positive (the package keeps what its solver
    answers, so that moments may meet their negatives after a refresh). Compute is matrix by matrix.

    It pays where states do not fit: (2·long + short)·rank numbers instead of 2·short·long. The paper's C4 perplexities
    stay behind full rank (130M, rank 256: 25.36 to 25.08; 1B, rank 512: 15.64 to 15.56), and its AdamW was tuned less
    than others tuned it.

    Start: lr 1e-2, scale 0.25, rank a quarter of the width, update_proj_gap 200 (the paper, section 5).
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    weight_decay: float = 0.0
    rank: int = 128
    update_proj_gap: int = 200
    scale: float = 0.25
    _: KW_ONLY
    synchronous: bool = False

    reach: ClassVar = "matrix"
    batched: ClassVar = False

    def check(self) -> None:
        super().check()
        require(self.rank >= 1, f"rank must be ≥ 1, got {self.rank}")
        require(self.update_proj_gap >= 1, f"update_proj_gap must be ≥ 1, got {self.update_proj_gap}")
        require(self.scale > 0, f"scale must be above 0, got {self.scale}")

    def refuse(self, shape: Shape) -> str | None:
        return None

    def states(self, shape: Shape) -> dict[str, State]:
        if not shape.is_matrix:
            return {"exp_avg": State("like"), "exp_avg_sq": State("like", signed=False)}
        short, long = sorted((shape.rows, shape.cols))
        rank = min(self.rank, short)
        moment, square = State("owner", (rank, long)), State("owner", (rank, long), signed=False)
        return {"exp_avg": moment, "exp_avg_sq": square, "basis": State("owner", (short, rank))}

    def scalars(self, step: int) -> dict[str, Any]:
        beta1, beta2 = self.betas
        return {
            "step_size": self.lr * (1 - beta2**step) ** 0.5 / (1 - beta1**step),
        }

    def recurring(self, shape: Shape) -> dict[str, float]:
        short, long = sorted((shape.rows, shape.cols))
        return {"basis": float(short) ** 2 * long} if shape.is_matrix else {}

    def turns(self) -> int:
        return 1 if self.synchronous else self.update_proj_gap

    def due(self, step: int, turn: int) -> bool:
        return step == 1 or (step - 1 - turn) % self.update_proj_gap == 0

    def phases(self) -> dict[str, tuple[int, float]]:
        gap = self.update_proj_gap
        return {"refresh": (gap + 1, 1 / gap), "step": (gap + 2, 1 - 1 / gap)}

    def update(self, grad: Tensor, weight: Tensor, state: Any, h: Any) -> Update:
        if h.shape.is_matrix:
            g = yield Whole(grad)
            tall = h.shape.rows >= h.shape.cols
            g = g.mT if tall else g
            if h.due:
                state.basis = principal_basis(g, state.basis.shape[-1], state.basis)
            direction = state.basis @ self.adam(state.basis.mT @ g, state) * self.scale
            direction = yield Back(direction.mT if tall else direction)
        else:
            direction = self.adam(grad, state)
        return weight.add(direction, alpha=-h.step_size) * (1 - h.lr * h.weight_decay)

    def adam(self, g: Tensor, state: Any) -> Tensor:
        """Adam's direction, up to the correction of biases."""
        beta1, beta2 = self.betas
        state.exp_avg = state.exp_avg.lerp(g, 1 - beta1)
        state.exp_avg_sq = torch.addcmul(state.exp_avg_sq * beta2, g, g, value=1 - beta2)
        return state.exp_avg / (state.exp_avg_sq.sqrt() + self.eps)
