"""APOLLO: gradients scaled as AdamW scales a random projection of them (Zhu et al., 2024, arXiv 2412.05270)."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.linalg import vector_norm

from distopt.matrix.projection import gaussian
from distopt.rule import Back, Shape, State, Update, Whole, require
from distopt.rules.galore import GaLore

GROWTH = 1.01
"""How much longer than the last one a scaled gradient may be (Fira's limiter, arXiv 2410.01623)."""


@dataclass(frozen=True)
class APOLLO(GaLore):
    """W ← W − lr · √scale · G S, where S scales each column or row of G along the longer side ("channel"), or all of G
    ("tensor"), by ‖Adam(R)‖ / ‖R‖ of its part of R = Pᵀ G; P is Gaussian, `rank` by the shorter side (at most that),
    drawn anew every `update_proj_gap` steps. G S may grow by 1 % per step (`disable_nl`: without limit), measured
    after √scale with `scale_front`. On vectors it is AdamW. Names and defaults are apollo_torch's, eps 1e-6, weight
    decay after the update.

    lr: a step of a matrix has an RMS of about lr · √(scale · rank / short) where the gradient keeps its sign, since R has
    as many coordinates as P; the authors take lr 1e-2, and scale 128 for the Mini variant.

    Deviations: P comes from a generator seeded with `seed` + its number, so matrices of one shape share it (the package
    seeds by the parameter's position, and keeps P; here P is drawn again in every step, and states are 2·long·rank
    numbers).

    It pays where AdamW's states do not fit and GaLore's decompositions cost too much. Its authors
    report perplexities on C4 not above AdamW's; no third party's figure is known to us.

    Start: lr 1e-2, rank a quarter of the width, update_proj_gap 200 (github.com/zhuhanqing/APOLLO).
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    weight_decay: float = 0.0
    rank: int = 256
    update_proj_gap: int = 200
    scale: float = 1.0
    scale_type: str = "channel"
    scale_front: bool = False
    disable_nl: bool = False
    _: KW_ONLY
    seed: int = 1

    batched: ClassVar = True

    def check(self) -> None:
        super().check()
        require(self.scale_type in ("channel", "tensor"), f"scale_type: channel or tensor, got {self.scale_type!r}")
        require(0 <= self.seed < 2**62, f"seed must lie in 0 … 2⁶², got {self.seed}")

    def states(self, shape: Shape) -> dict[str, State]:
        states = super().states(shape)
        if shape.is_matrix:
            states["scaled_norm"] = State("owner", (1, 1), signed=False)
            del states["basis"]
        return states

    def scalars(self, step: int) -> dict[str, Any]:
        return {**super().scalars(step), "seed": self.seed + (step - 1) // self.update_proj_gap}

    def phases(self) -> dict[str, tuple[int, float]]:
        return {"step": (2, 1.0)}

    def update(self, grad: Tensor, weight: Tensor, state: Any, h: Any) -> Update:
        if h.shape.is_matrix:
            g = yield Whole(grad)
            direction = yield Back(self.scaled(g, state, h))
        else:
            direction = self.adam(grad, state)
        return weight.add(direction, alpha=-h.step_size) * (1 - h.lr * h.weight_decay)

    def scaled(self, g: Tensor, state: Any, h: Any) -> Tensor:
        """The gradient with the lengths that Adam gives to its projection, growing slowly."""
        rows, cols, rank = h.shape.rows, h.shape.cols, state.exp_avg.shape[-2]
        if rows >= cols:
            projected = gaussian(rank, cols, h.seed, g.device) / rank**0.5 @ g.mT
        else:
            projected = (gaussian(rows, rank, h.seed, g.device) / rank**0.5).mT @ g
        dims = (-2,) if self.scale_type == "channel" else (-2, -1)
        adapted = vector_norm(self.adam(projected, state), dim=dims, keepdim=True)
        factor = adapted / (vector_norm(projected, dim=dims, keepdim=True) + 1e-8)
        scaled = g * (factor.mT if rows >= cols else factor)
        if self.scale_front:
            scaled = scaled * self.scale**0.5
        if not self.disable_nl:
            norm = vector_norm(scaled, dim=(-2, -1), keepdim=True)
            if h.step > 1:
                limiter = (norm / (state.scaled_norm + 1e-8)).clamp(min=GROWTH) / GROWTH
                scaled, norm = scaled / limiter, norm / limiter
            state.scaled_norm = norm
        return scaled if self.scale_front else scaled * self.scale**0.5
