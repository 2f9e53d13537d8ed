"""8-bit floating point: e4m3 for signed states, e5m2, which reaches further down, for others."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from distopt.state.codecs.base import Codec

TINY = 2.0**-16
"""The smallest positive e5m2."""


class Fp8(Codec):
    """The share of the tile's largest magnitude times the format's largest number; a positive number of a state that is
    never negative has the smallest positive code at least."""

    bits: ClassVar = 8

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return torch.float8_e4m3fn if self.signed else torch.float8_e5m2

    def encode(self, x: Tensor, scale: Tensor, noise: Tensor) -> Tensor:
        largest = torch.finfo(self.dtype).max
        values = x / scale * largest
        if not self.signed:
            values = torch.where(x > 0, values.clamp(min=TINY), values)
        return values.to(self.dtype)

    def decode(self, codes: Tensor, scale: Tensor) -> Tensor:
        return codes.float() / torch.finfo(self.dtype).max * scale
