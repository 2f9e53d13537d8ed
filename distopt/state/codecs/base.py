"""What a codec is: numbers to codes and back, such that encoding what was decoded gives the same codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

FLOOR = 2.0**-90
"""The smallest scale: the smallest code of any codec, decoded, is a normal number with it, and so is found again."""


@dataclass(frozen=True)
class Codec:
    """Base of every codec. `signed` is False for states that are never negative; of those no code of a positive number
    may decode to zero, because rules divide by their roots.

    Tensors may have any shape; `scale` broadcasts. A scale is the largest magnitude of its tile, at least FLOOR, and
    the code of that element decodes to the scale exactly: so decoded tiles have the same scale, and then the same codes.

    Class attributes: `dtype` of the codes; `scaled`: tiles have scales; `stochastic` says that
    encoding takes random bits; `bits` per element.
    """

    signed: bool = True

    dtype: ClassVar[torch.dtype]
    bits: ClassVar[int]
    scaled: ClassVar[bool] = True
    stochastic: ClassVar[bool] = False

    def code_bytes(self, numel: int) -> int:
        """Bytes of the codes of a run of elements."""
        return -(-numel * self.bits // 8)

    def encode(self, x: Tensor, scale: Tensor, noise: Tensor) -> Tensor:
        """Codes of fp32 numbers, one each. `noise` holds 16 random bits per element where the codec is stochastic."""
        raise NotImplementedError

    def decode(self, codes: Tensor, scale: Tensor) -> Tensor:
        """The numbers in fp32."""
        raise NotImplementedError

    def pack(self, codes: Tensor) -> Tensor:
        """Codes of a run as they are stored, flat in and out."""
        return codes

    def unpack(self, stored: Tensor, numel: int) -> Tensor:
        """The reverse of `pack`."""
        return stored
