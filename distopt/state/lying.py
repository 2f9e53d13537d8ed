"""Where the weights and gradients of many plain parameters lie, found without a call of Python per tensor."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from distopt.kernels.native import DEVICES, TYPES, Many, build_many
from distopt.state.windows import Window

MANY = 64
"""Parameters of a group from which it is worth building: below, Python's calls cost as little."""


class Lying:
    """Of the windows of a group, in order: `weights`, `grads` (windows,) int64, the addresses last found; `numels`."""

    def __init__(self, many: Many, windows: list[Window]) -> None:
        self._many, self._device = many, windows[0].param.device
        self.params = [window.param for window in windows]
        self.numels = np.array([window.numel for window in windows], np.int64)
        self._types = np.array([TYPES[window.param.dtype] for window in windows], np.int64)
        self.weights, self.grads = np.zeros_like(self.numels), np.zeros_like(self.numels)
        self._holders = np.array([window.holders for window in windows])
        self._single = np.flatnonzero(self.numels == 1).tolist()
        self.wide = all(param.dtype == torch.float32 and param.is_cpu for param in self.params)

    def find(self, grads: list[Tensor | None]) -> bool:
        """Whether every parameter is what it was when it was bound and has a gradient like it, both plain in memory; then their
        addresses are known."""
        if self._differ(self.params, self.weights) or self._differ(grads, self.grads):
            return False
        # The sign of an imaginary part may not be in memory. Those of several elements are not contiguous.
        return not any(grads[i].is_neg() for i in self._single)  # type: ignore[union-attr]

    def _differ(self, tensors: list[Any], addresses: np.ndarray) -> int:
        return self._many.look(tensors, self._device, self.numels, self._types, addresses)

    def squares(self) -> list[tuple[float, int]]:
        """Sums of squares of the gradients, fp32 and on the CPU (`wide`), with the number of ranks that hold one copy."""
        return squares(self.grads, self.numels, self._holders)


def squares(addresses: np.ndarray, numels: np.ndarray, holders: np.ndarray) -> list[tuple[float, int]]:
    """Sums of squares of fp32 tensors, by the number of ranks that hold one copy; there is a compiler."""
    many = build_many()
    assert many is not None
    found = many.squares(addresses, numels)
    return [(float(found[holders == count].sum()), int(count)) for count in np.unique(holders)]


def make_lying(windows: list[Window]) -> Lying | None:
    """None where there are few parameters, ones of other kinds, or no compiler."""
    served = len(windows) >= MANY and all(
        window.whole and not isinstance(param, DTensor) and param.device.type in DEVICES and param.dtype in TYPES
        for window in windows
        for param in [window.param]
    )
    many = build_many() if served else None
    return None if many is None else Lying(many, windows)
