"""CASPR: the two sides of a matrix combined by a Kronecker sum (Duvvuri et al., ICLR 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from distopt.rules.shampoo import Shampoo


@dataclass(frozen=True)
class CASPR(Shampoo):
    """Shampoo with ((L^(−1/4) ⊗ I + I ⊗ R^(−1/4)) / 2)² in the place of L^(−1/4) ⊗ R^(−1/4), which lies nearer to
    full-matrix AdaGrad: W ← W − lr (L^(−1/2) M + 2 L^(−1/4) M R^(−1/4) + M R^(−1/2)) / 4.

    lr, options and deviations are Shampoo's: running means, bias-corrected, in the place of the paper's sums, a step of
    about the spectral norm lr, grafting by Frobenius norm. As there, a matrix with one side that is longer than
    `max_precond_dim` has the root −1/2 of the other, and vectors have the diagonal.

    Start: as Shampoo, grafting "adam" with Adam's lr (arXiv 2309.06497).
    """

    def precondition(self, m: Tensor, state: Any) -> Tensor:
        """Both sides, one after the other, twice."""
        if not (hasattr(state, "root_left") and hasattr(state, "root_right")):
            return super().precondition(m, state)
        for _ in range(2):
            m = (state.root_left @ m + m @ state.root_right) / 2
        return m
