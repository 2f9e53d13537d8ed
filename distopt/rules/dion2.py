"""Dion2: Muon on the rows that matter most in this step (Ahn et al., 2025, arXiv 2512.16928)."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from math import ceil
from typing import Any, ClassVar

import torch
from torch import Tensor

from distopt.matrix.newton_schulz import Method, orthogonalize
from distopt.rule import Back, Rule, Shape, State, Update, Whole, require
from distopt.rules.muon import SCALES, apply


@dataclass(frozen=True)
class Dion2(Rule):
    """M ← M + G; orthogonalize the `fraction` of M's rows that have the largest L1 norms, move those rows of the weight
    by the result, and multiply them in M by `ef_decay` (error feedback): what was not selected waits and grows. A
    matrix that has fewer columns than rows is selected by columns.

    The variant of github.com/microsoft/dion with selection_scope="global": the selection is that of the whole logical
    matrix, so that it is the same on every layout (their default selects per shard, and sends less).

    lr is the spectral norm of the step, times a factor for the whole matrix's shape: "spectral" √(rows/cols), the
    default there and here; the others, ns and ns_dtype are Muon's. Deviations: M is fp32 and lives with whoever
    computes the matrix; fp32 is what is selected from and, on CPU, orthogonalized. Compute is matrix by matrix, and never
    in slices, since rounding can change a selection.

    Start: lr 0.01, fraction 0.25, ef_decay 0.95 (the defaults of github.com/microsoft/dion).
    """

    lr: float = 1e-2
    weight_decay: float = 0.01
    fraction: float = 0.25
    ef_decay: float = 0.95
    eps: float = 1e-8
    ns_steps: int = 5
    adjust_lr_fn: str | None = "spectral"
    _: KW_ONLY
    ns: Method = "polar_express"
    ns_dtype: torch.dtype | None = None

    reach: ClassVar = "matrix"
    batched: ClassVar = False
    create_defaults: ClassVar = {"adjust_lr_fn": "match_rms_adamw"}

    def check(self) -> None:
        super().check()
        require(self.adjust_lr_fn is None or self.adjust_lr_fn in SCALES, f"adjust_lr_fn: one of {list(SCALES)}")
        require(self.ns in ("quintic", "polar_express", "gram"), f"ns: quintic, polar_express or gram, got {self.ns!r}")
        require(0 < self.fraction <= 1, f"fraction must lie in (0, 1], got {self.fraction}")
        require(0 <= self.ef_decay < 1, f"ef_decay must lie in [0, 1), got {self.ef_decay}")
        require(1 <= self.ns_steps < 100, f"ns_steps must lie in 1 … 99, got {self.ns_steps}")

    def states(self, shape: Shape) -> dict[str, State]:
        return {"momentum_buffer": State("owner", (shape.rows, shape.cols))}

    def update(self, grad: Tensor, weight: Tensor, state: Any, h: Any) -> Update:
        rows, cols = h.shape.rows, h.shape.cols
        dtype = self.ns_dtype or (torch.bfloat16 if h.gpu else torch.float32)
        g = yield Whole(grad)
        buffer = state.momentum_buffer + g

        across, along = (-2, -1) if rows <= cols else (-1, -2)  # selected across, measured along
        norms = buffer.abs().sum(along, keepdim=True)
        chosen = norms.topk(ceil(self.fraction * min(rows, cols)), dim=across, sorted=False).indices.sort(across).values
        chosen = chosen.expand(-1, -1, cols) if across == -2 else chosen.expand(-1, rows, -1)
        selected = buffer.gather(across, chosen)
        state.momentum_buffer = buffer.scatter(across, chosen, selected * self.ef_decay)
        orthogonal = orthogonalize(selected, method=self.ns, steps=self.ns_steps, eps=self.eps, dtype=dtype)

        direction = yield Back(torch.zeros_like(buffer, dtype=dtype).scatter(across, chosen, orthogonal))
        scale = SCALES[self.adjust_lr_fn or "original"](rows, cols)
        return h.run(apply, weight, direction, 1 - h.lr * h.weight_decay, -h.lr * scale)
