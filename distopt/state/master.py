"""Master weights: what fp32 weights have beyond parameters of lower precision, kept as 1, 2 or 4 bytes per element.

Rules see and return fp32 weights; the parameter is their rounding, and the rest is a state ("master" in state dicts,
where it stands for the fp32 weight itself). A parameter that somebody else wrote to counts as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Master:
    """Base: `bits` per element of what is kept. A codec as far as that is stored, as it is."""

    bits: int
    dtype: torch.dtype

    scaled: ClassVar[bool] = False
    stochastic: ClassVar[bool] = False

    def code_bytes(self, numel: int) -> int:
        """Bytes of what is kept for a run of elements."""
        return numel * self.bits // 8

    def split(self, x: Tensor, low: torch.dtype) -> tuple[Tensor, Tensor]:
        """The parameter in its dtype `low`, and the rest, of fp32 weights."""
        raise NotImplementedError

    def join(self, param: Tensor, rest: Tensor) -> Tensor:
        """The fp32 weights."""
        raise NotImplementedError


class Copy(Master):
    """fp32 weights beside the parameter."""

    def split(self, x: Tensor, low: torch.dtype) -> tuple[Tensor, Tensor]:
        return x.to(low), x

    def join(self, param: Tensor, rest: Tensor) -> Tensor:
        return torch.where(rest.to(param.dtype) == param, rest, param.float())


class ErrorBits(Master):
    """The next `bits` bits of the weight after those of the parameter, as a signed share of the parameter's own ulp. With
    bfloat16 16 bits make fp32 exactly and 8 bits a float of 24 bits; weights are rounded to nearest."""

    def split(self, x: Tensor, low: torch.dtype) -> tuple[Tensor, Tensor]:
        if low != torch.bfloat16:
            param = x.clamp(torch.finfo(low).min, torch.finfo(low).max).to(low)
            # Less than half an ulp, as fp32 can tell: a tie would round to another parameter the next time.
            most = (1 << self.bits - 1) - max(1, 1 << self.bits >> 13)
            rest = ((x - param.float()) / _ulp(param) * (1 << self.bits)).round().clamp(-most, most)
            return param, rest.to(self.dtype)
        # Floats of one sign are ordered as their bits are, so the rest is a difference of integers.
        shift = 16 - self.bits
        bits = x.view(torch.int32)
        if shift:
            bits = (bits + (1 << shift - 1)) >> shift << shift
        upper = (bits + (1 << 15)) >> 16
        rest = (bits - (upper << 16)) >> shift
        rest = torch.where(upper & 0x7FFF == 0, 0, rest)  # what rounds to zero is zero: below it there are no floats
        return upper.to(torch.int16).view(low), rest.to(self.dtype)

    def join(self, param: Tensor, rest: Tensor) -> Tensor:
        if param.dtype != torch.bfloat16:
            return param.float() + rest.float() * (_ulp(param) / (1 << self.bits))
        upper = param.view(torch.int16).int()
        rest = torch.where(upper & 0x7FFF == 0, 0, rest.int())
        return ((upper << 16) + (rest << 16 - self.bits)).view(torch.float32)


def _ulp(param: Tensor) -> Tensor:
    """The distance of a float16 number to the next larger one in magnitude."""
    exponent = torch.frexp(param.float()).exponent.clamp(min=-13)
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent - 11)


MASTERS: dict[str, Master | None] = {
    "none": None,
    "fp32": Copy(32, torch.float32),
    "bits16": ErrorBits(16, torch.int16),
    "bits8": ErrorBits(8, torch.int8),
}
