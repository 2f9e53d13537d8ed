"""Pages in host memory: pinned where a GPU is to reach them."""

from __future__ import annotations

import torch
from torch import Tensor

from distopt.plan.pages import Page


class Pool:
    """One run of bytes.

    Raises:
        ValueError: there is too little memory, or it cannot be pinned.
    """

    def __init__(self, nbytes: int, *, pinned: bool) -> None:
        try:
            self.bytes = torch.empty(nbytes, dtype=torch.uint8)
        except RuntimeError as error:
            raise ValueError(f"offload: {nbytes} bytes of host memory for pages are not to be had: {error}") from error
        self._pinned = False
        if pinned:
            pin(self.bytes)
            self._pinned = True

    def view(self, page: Page) -> Tensor:
        """Where a page lies."""
        return self.bytes[page.offset : page.offset + page.nbytes]

    def load(self, page: Page, into: Tensor) -> None:
        """Copy a page out."""
        into[: page.nbytes].copy_(self.view(page))

    def save(self, page: Page, source: Tensor) -> None:
        """Copy a page in."""
        self.view(page).copy_(source[: page.nbytes])

    def trouble(self) -> None:
        """Memory has none."""

    def close(self) -> None:
        """Unpin."""
        if self._pinned:
            torch.cuda.synchronize()
            torch.cuda.cudart().cudaHostUnregister(self.bytes.data_ptr())
            self._pinned = False


def pin(buffer: Tensor) -> None:
    """Lock memory in place. Not by torch's allocator of pinned memory, which rounds up to powers of two.

    Raises:
        ValueError: the system refuses.
    """
    refused = int(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0))
    if refused:
        raise ValueError(
            f"offload: {buffer.nbytes} bytes of host memory cannot be pinned (CUDA error {refused}): raise the limit of locked "
            "memory (ulimit -l), offload a smaller share, or offload to 'disk:/path'"
        )
