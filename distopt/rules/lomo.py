"""LOMO: gradient descent that keeps nothing (Lv et al., 2023, arXiv 2306.09782)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from distopt.rule import Rule


@dataclass(frozen=True)
class LOMO(Rule):
    """W ← W − lr G: SGD without momentum, exactly. What saves memory is when it is done, with each gradient freed as soon
    as it was used; the mathematics is this line. Clip by max_grad_norm.

    lr multiplies the raw gradient.

    It pays for fine-tuning where not even the gradients fit. Without momentum and without adaptation it lags behind
    AdamW, which is why its authors followed it with AdaLomo.

    Start: lr 0.03 with a global clip at 1.0 for fine-tuning (args_lomo.yaml of
    github.com/OpenLMLab/LOMO).
    """

    lr: float = 1e-3

    reach: ClassVar = "elementwise"

    def update(self, grad: Tensor, weight: Tensor, state: Any, h: Any) -> Tensor:
        return weight.add(grad, alpha=-h.lr)
