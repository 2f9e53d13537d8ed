"""Memory for states."""

from __future__ import annotations

import mmap
import sys
from contextlib import suppress

import torch
from torch import Tensor

LARGE = 1 << 22
"""Bytes from which a tensor surely has a huge page in it."""


def allocate(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A flat tensor that nobody has written to. A large one on the CPU has, on Linux, memory of its own in huge pages as far as
    the system gives them on request (`always` or `madvise` in /sys/kernel/mm/transparent_hugepage/enabled): with fewer page walks
    it is read faster. What malloc gives may have been touched before, page by page."""
    if device.type != "cpu" or numel * dtype.itemsize < LARGE or not sys.platform.startswith("linux"):
        return torch.empty(numel, dtype=dtype, device=device)
    memory = mmap.mmap(-1, numel * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype)
