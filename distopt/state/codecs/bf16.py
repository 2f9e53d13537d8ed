"""16 bits: the upper half of fp32, rounded to nearest or stochastically."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from distopt.state.codecs.base import Codec


class BF16(Codec):
    """bfloat16, rounded to nearest. A running mean whose steps are below half an ulp (0.2 %) stands still: with betas of
    0.99 and more `bf16_sr` follows where this does not."""

    bits: ClassVar = 16
    dtype: ClassVar = torch.bfloat16
    scaled: ClassVar = False

    def encode(self, x: Tensor, scale: Tensor, noise: Tensor) -> Tensor:
        return x.to(torch.bfloat16)

    def decode(self, codes: Tensor, scale: Tensor) -> Tensor:
        return codes.float()


class BF16Stochastic(BF16):
    """bfloat16, rounded up with the probability of the part that is cut off: right in the mean, so that running means
    with small steps move."""

    stochastic: ClassVar = True

    def encode(self, x: Tensor, scale: Tensor, noise: Tensor) -> Tensor:
        bits = x.view(torch.int32)
        rounded = (bits + noise).bitwise_and_(-65536).view(torch.float32)
        return torch.where(x.isfinite(), rounded, x).to(torch.bfloat16)
