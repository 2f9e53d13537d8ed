"""Memory for states."""

from __future__ import annotations

import ctypes
import mmap
import sys

import torch
from torch import Tensor

HUGE_PAGE = 1 << 21


def allocate(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A flat tensor that nobody has written to. On Linux, on the CPU, it lies in huge pages as far as the system gives them on
    request (`always` or `madvise` in /sys/kernel/mm/transparent_hugepage/enabled): with fewer page walks it is read faster."""
    found = torch.empty(numel, dtype=dtype, device=device)
    if found.is_cpu and sys.platform.startswith("linux"):
        start, stop = (
            -(-found.data_ptr() // HUGE_PAGE) * HUGE_PAGE,
            (found.data_ptr() + found.nbytes) // HUGE_PAGE * HUGE_PAGE,
        )
        if start < stop:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), mmap.MADV_HUGEPAGE)
    return found
