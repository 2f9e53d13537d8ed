"""Scion: steps to the boundary of a norm ball (Pethick et al., 2025, arXiv 2502.07529, algorithms 1 and 2)."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from distopt.matrix.newton_schulz import Method, Orthogonalize
from distopt.rule import Back, Mean, Rule, Shape, State, Through, Update, Whole, require


@dataclass(frozen=True)
class Scion(Rule):
    """W ← (1 − lr) W − lr · scale · lmo(M), where M is a running mean of gradients and lmo(M) the point of the unit ball
    that lies furthest along M: weights never leave the ball of radius `scale`, and there is no other weight decay. With
    `unconstrained` the factor 1 − lr is left out.

    The ball of a matrix, by `norm`: "spectral", √(rows/cols) times the nearest semi-orthogonal matrix, for hidden
    layers; "sign", sign(M) / cols, for embeddings and the output head, by a group of its own. Vectors have the root
    mean square. The authors train GPT-2 with scale 50 and 3000.

    lr: the share of the way to that point, so the operator norm of a step between RMS norms is at most 2 · lr · scale.
    ns and ns_dtype are Muon's. `momentum` is one minus the authors'. A convolution is one matrix (out, rest).

    It pays where one lr is to serve several widths, which is what its norms are for. In public comparisons its spectral
    layers are Muon's up to decay, and so is their gain: at most 1.4 times over a tuned AdamW at 0.1B parameters, about
    1.1 at 1.2B (arXiv 2509.02046).

    Start: lr 2.4e-4, momentum 0.9, scale 50, and 3000 for the head, at 124M parameters (the README of
    github.com/LIONS-EPFL/scion, whose momentum is 1 − ours).
    """

    lr: float = 1e-3
    momentum: float = 0.9
    norm: str = "spectral"
    scale: float = 50.0
    unconstrained: bool = False
    _: KW_ONLY
    eps: float = 1e-7
    ns_steps: int = 5
    ns: Method = "quintic"
    ns_dtype: torch.dtype | None = None

    reach: ClassVar = "matrix"

    def check(self) -> None:
        super().check()
        require(self.norm in ("spectral", "sign"), f"norm: spectral or sign, got {self.norm!r}")
        require(self.ns in ("quintic", "polar_express", "gram"), f"ns: quintic, polar_express or gram, got {self.ns!r}")
        require(0 <= self.momentum < 1, f"momentum must lie in [0, 1), got {self.momentum}")
        require(self.scale > 0, f"scale must be above 0, got {self.scale}")
        require(1 <= self.ns_steps < 100, f"ns_steps must lie in 1 … 99, got {self.ns_steps}")

    def refuse(self, shape: Shape) -> str | None:
        return None

    def states(self, shape: Shape) -> dict[str, State]:
        return {"momentum_buffer": State("like")}

    def update(self, grad: Tensor, weight: Tensor, state: Any, h: Any) -> Update:
        m = state.momentum_buffer = state.momentum_buffer.lerp(grad, 1 - self.momentum)
        if not h.shape.is_matrix:
            square = yield Mean(m * m)
            extreme = m / (square.sqrt() + 1e-8)
        elif self.norm == "sign":
            extreme = m.sign() / h.shape.cols
        else:
            dtype = self.ns_dtype or (torch.bfloat16 if h.gpu else torch.float32)
            matrix = yield Whole(m.to(dtype))
            orthogonal = yield Through(matrix, Orthogonalize(self.ns, self.ns_steps, eps=self.eps, dtype=dtype))
            orthogonal = yield Back(orthogonal)
            extreme = orthogonal.to(weight.dtype) * (h.shape.rows / h.shape.cols) ** 0.5
        kept = weight if self.unconstrained else weight * (1 - h.lr)
        return kept.add(extreme, alpha=-h.lr * self.scale)
