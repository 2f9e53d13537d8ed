"""Memory for states, and huge pages for what a step reads."""

from __future__ import annotations

import ctypes
import mmap
import sys
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

LARGE = 1 << 22
"""Bytes from which a tensor surely has a huge page in it."""
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
MADV_COLLAPSE = 25
"""Of Linux 6.1 and later: move what lies there to huge pages now."""


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


def collapse(tensor: Tensor) -> None:
    """Move a large tensor on the CPU to huge pages where it lies, as far as the system has them; its address and numbers stay.
    Takes 2 to 3 s per GB, once: what is in huge pages already is not moved again."""
    if not tensor.is_cpu or tensor.nbytes < LARGE or not sys.platform.startswith("linux"):
        return
    with suppress(OSError):
        if "[never]" in HUGE_PAGES.read_text():
            return
    start, stop = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    start, stop = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, stop // mmap.PAGESIZE * mmap.PAGESIZE
    # A kernel that cannot says so, and nothing has changed.
    ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), MADV_COLLAPSE)
