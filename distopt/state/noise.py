"""Random bits that depend on what they are for and on nothing else, so that every layout rounds alike."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

from torch import Tensor

GOLDEN, FIRST, SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15
"""The constants of splitmix64 (Steele, Lea and Flood, 2014, "Fast splittable pseudorandom number generators")."""


@dataclass(frozen=True)
class Key:
    """Whose bits: the seed of the group, the step, the state."""

    seed: int
    step: int
    state: str

    @property
    def start(self) -> int:
        """What the counter starts from, as int64."""
        return _signed(_mix(_mix(self.seed) ^ self.step) ^ zlib.crc32(self.state.encode()))

    def bits(self, elements: Tensor) -> Tensor:
        """16 random bits per element number (int64), as int32."""
        x = elements * GOLDEN + self.start
        x = (x ^ (x >> 30 & (1 << 34) - 1)) * FIRST
        x = (x ^ (x >> 27 & (1 << 37) - 1)) * SECOND
        return (x >> 48 & 0xFFFF).int()


def _mix(x: int) -> int:
    """splitmix64's output for one integer."""
    x = (x + 1) * GOLDEN & (1 << 64) - 1
    x = (x ^ x >> 30) * FIRST & (1 << 64) - 1
    x = (x ^ x >> 27) * SECOND & (1 << 64) - 1
    return x ^ x >> 31


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x
