"""Writing what a step has computed, where the device decides whether the step is taken."""

from __future__ import annotations

import torch
from torch import Tensor


def put(target: Tensor, value: Tensor, ok: Tensor | None) -> None:
    """Write a value in place. `ok` (0-D, bool, on the device): unless it holds, what is there is written once more; None:
    the host knows that the step is taken."""
    if ok is None:
        target.copy_(value)
        return
    value = value.to(target.dtype)
    if target.dtype.itemsize == 1:  # not every device chooses between floats of 8 bits
        target, value = target.view(torch.uint8), value.view(torch.uint8)
    torch.where(ok, value, target, out=target)
