"""APOLLO-Mini: APOLLO with one number per matrix from one random direction (Zhu et al., 2024, arXiv 2412.05270)."""

from __future__ import annotations

from dataclasses import dataclass

from distopt.rules.apollo import APOLLO


@dataclass(frozen=True)
class APOLLOMini(APOLLO):
    """APOLLO with rank 1, `scale_type` "tensor" and scale 128, the authors' setting: the gradient of a matrix, scaled by
    one number, from 2·long + 1 numbers of state.

    lr, options, deviations and evidence are APOLLO's.

    Start: lr 1e-2, scale 128 (github.com/zhuhanqing/APOLLO).
    """

    rank: int = 1
    scale: float = 128.0
    scale_type: str = "tensor"
