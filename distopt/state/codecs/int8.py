"""8 bits: squares for signed states, fourth powers for others, of the share of the tile's largest magnitude.

The maps were chosen by measurement (Adam on 8,192 coordinates of log-normal scales, σ = 1.2, 200 steps; largest update
against fp32's, mean error of updates): squares and fourth powers 1.12 and 0.09; a linear signed map 2.09 and 0.37; squares
for both 1.86 and 0.19; squares and third powers 1.67 and 0.11.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from distopt.state.codecs.base import Codec


class Int8(Codec):
    """Codes −127 … 127 or 0 … 255; a positive number never has code 0."""

    bits: ClassVar = 8

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return torch.int8 if self.signed else torch.uint8

    def encode(self, x: Tensor, scale: Tensor, noise: Tensor) -> Tensor:
        if self.signed:
            root = (x.abs() / scale).sqrt() * 127
            return root.round().copysign(x).to(torch.int8)
        codes = ((x / scale).sqrt().sqrt() * 255).round()
        return torch.where(x > 0, codes.clamp(min=1), 0).to(torch.uint8)

    def decode(self, codes: Tensor, scale: Tensor) -> Tensor:
        if self.signed:
            root = codes.float() / 127
            return root * root.abs() * scale
        square = (codes.float() / 255).square()
        return square * square * scale
