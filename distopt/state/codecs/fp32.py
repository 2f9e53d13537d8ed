"""32 bits: the numbers themselves, for a state that stays exact beside states that are coded."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from distopt.state.codecs.base import Codec


class FP32(Codec):
    """float32 as it is."""

    bits: ClassVar = 32
    dtype: ClassVar = torch.float32
    scaled: ClassVar = False

    def encode(self, x: Tensor, scale: Tensor, noise: Tensor) -> Tensor:
        return x

    def decode(self, codes: Tensor, scale: Tensor) -> Tensor:
        return codes.clone()
