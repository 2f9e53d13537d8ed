"""NorMuon: Muon with a step size per neuron (Li et al., 2025, arXiv 2510.05491, algorithm 1)."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from distopt.matrix.newton_schulz import Method, orthogonalize
from distopt.rule import Back, Rule, Shape, State, Update, Whole, require
from distopt.rules.muon import SCALES, apply, prepare


@dataclass(frozen=True)
class NorMuon(Rule):
    """Orthogonalizes the momentum of a hidden matrix, as Muon does, and then divides each row by the root of a running
    mean of its squares, so that no neuron moves more than the others. A 3-D tensor is a stack of matrices, a
    convolution one matrix (out, rest).

    lr: with `adjust_lr_fn="rms"`, the paper's algorithm 1 and the default, the step has an RMS of 0.2·lr exactly, and
    AdamW's lr and weight decay carry over. Otherwise the division keeps the Frobenius norm that the orthogonal matrix
    had, and lr is multiplied as in Muon: "original" (None is the same) with `nesterov=True` is the authors' code
    (github.com/zichongli5/NorMuon), "spectral" with `ns="polar_express"` is github.com/microsoft/dion.

    Deviations: the quintic divides by max(‖M‖_F, 1e-7), and the mean of squares is kept in fp32 with whoever computes
    the matrix, from whole rows; dion keeps one per shard. ns and ns_dtype are Muon's.

    A matrix is always computed as a whole: after the iteration come means over rows and a norm over all of it, which
    sums over slices would round differently wherever the slices differ. Muon has none, and may be computed in slices.

    Start: AdamW's lr and weight decay, momentum and beta2 0.95 (the paper, algorithm 1).
    """

    lr: float = 1e-3
    weight_decay: float = 0.1
    momentum: float = 0.95
    beta2: float = 0.95
    nesterov: bool = False
    eps: float = 1e-8
    ns_steps: int = 5
    adjust_lr_fn: str | None = "rms"
    _: KW_ONLY
    ns: Method = "quintic"
    ns_dtype: torch.dtype | None = None

    reach: ClassVar = "matrix"

    def check(self) -> None:
        super().check()
        names = ["rms", *SCALES]
        require(self.adjust_lr_fn is None or self.adjust_lr_fn in names, f"adjust_lr_fn: one of {names} or None")
        require(self.ns in ("quintic", "polar_express", "gram"), f"ns: quintic, polar_express or gram, got {self.ns!r}")
        require(0 <= self.momentum < 1, f"momentum must lie in [0, 1), got {self.momentum}")
        require(0 <= self.beta2 < 1, f"beta2 must lie in [0, 1), got {self.beta2}")
        require(self.eps > 0, "eps must be above 0: a row without gradients is divided by it")
        require(1 <= self.ns_steps < 100, f"ns_steps must lie in 1 … 99, got {self.ns_steps}")

    def states(self, shape: Shape) -> dict[str, State]:
        return {"momentum_buffer": State("like"), "row_sq": State("owner", (shape.rows, 1), signed=False)}

    def update(self, grad: Tensor, weight: Tensor, state: Any, h: Any) -> Update:
        dtype = self.ns_dtype or (torch.bfloat16 if h.gpu else torch.float32)
        state.momentum_buffer, update = h.run(prepare, grad, state.momentum_buffer, self.momentum, self.nesterov, dtype)
        matrix = yield Whole(update)
        orthogonal = orthogonalize(matrix, method=self.ns, steps=self.ns_steps, dtype=dtype).float()
        state.row_sq = state.row_sq.lerp(orthogonal.square().mean(-1, keepdim=True), 1 - self.beta2)
        normalized = orthogonal / (state.row_sq.sqrt() + self.eps)
        if self.adjust_lr_fn == "rms":
            norm, scale = 0.2 * h.shape.numel**0.5, 1.0
        else:
            norm = torch.linalg.matrix_norm(orthogonal, keepdim=True)
            scale = SCALES[self.adjust_lr_fn or "original"](h.shape.rows, h.shape.cols)
        normalized = normalized * (norm / torch.linalg.matrix_norm(normalized, keepdim=True).clamp(min=self.eps))

        direction = yield Back(normalized.to(dtype))
        return h.run(apply, weight, direction, 1 - h.lr * h.weight_decay, -h.lr * scale)
