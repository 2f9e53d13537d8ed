"""fp32 parameters that a compiled kernel steps where they are: no copies, whatever their number."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distopt.kernels.elementwise import told
from distopt.kernels.jobs import GRAD, NUMEL, STATES, TILES, WEIGHT, WIDTH, Table
from distopt.kernels.native import Kernel
from distopt.layouts import local_tensor
from distopt.plan.tiles import BLOCK
from distopt.rule import Rule
from distopt.state.windows import Window

MANY = 64
"""Parameters of a group from which a compiled kernel is worth building: below, torch's fused one costs as little."""

IS_CPU, DTYPE = attrgetter("is_cpu"), attrgetter("dtype")


class Placed:
    """The table of some windows. `numbers` are their positions in the group, `states` the names of the rule's states."""

    def __init__(self, kernel: Kernel, numbers: list[int], windows: list[Window], states: tuple[str, ...]) -> None:
        self.kernel, self.numbers, self.windows = kernel, numbers, windows
        self.params = [window.param for window in windows]
        self.holders = np.array([window.holders for window in windows])
        self.sizes = [window.numel for window in windows]
        self.rows = np.zeros((len(windows), WIDTH), np.int64)
        self.rows[:, NUMEL] = self.sizes
        self.rows[:, TILES] = -(-self.rows[:, NUMEL] // BLOCK)
        for place, name in enumerate(states):
            self.rows[:, STATES + 3 * place] = [window.state[name].data_ptr() for window in windows]
        self._simple = all(window.simple for window in windows)

    def collect(self, missing: set[int]) -> None:
        """Find the gradients; missing ones are zero.

        Raises:
            ValueError: a parameter has another size, or lies elsewhere, than when it was bound.
        """
        grads: list[Any] = [param.grad for param in self.params]
        self._direct = self._simple and self._as_bound(self.params) and all(map(IS_CPU, self.params))
        if not self._direct:
            for window in self.windows:
                self._check(window, local_tensor(window.param).numel() if window.whole else window.numel)
        known = self._direct and not missing and set(map(DTYPE, grads)) == {torch.float32}
        if not (known and self._as_bound(grads)):
            grads = [self._flat(number, window, missing) for number, window in zip(self.numbers, self.windows)]
        self._grads: list[Tensor] = grads
        self.rows[:, GRAD] = list(map(Tensor.data_ptr, grads))

    def _as_bound(self, tensors: list[Any]) -> bool:
        """Whether these are as many elements, in order, as were bound."""
        return list(map(Tensor.numel, tensors)) == self.sizes and all(map(Tensor.is_contiguous, tensors))

    def _flat(self, number: int, window: Window, missing: set[int]) -> Tensor:
        grad = None if number in missing else window.grad()
        if grad is None:
            return torch.zeros(window.numel)
        self._check(window, grad.numel())
        return grad.float()

    def _check(self, window: Window, numel: int) -> None:
        device = window.param.device
        if numel != window.numel or device.type != "cpu":
            raise ValueError(
                f"{window.spec.name!r} had {window.numel} elements on cpu here when the optimizer was bound, and has {numel} "
                f"on {device.type} now; build the optimizer after the model is moved or sharded"
            )

    def squares(self) -> list[tuple[float, int]]:
        """Sums of squares of the gradients last collected, with the number of ranks that hold one copy."""
        found = self.kernel.squares(self.rows)
        return [(float(found[self.holders == count].sum()), int(count)) for count in np.unique(self.holders)]

    def step(self, rule: Rule, h: Any, inert: set[int], factor: float) -> None:
        """Step all that are not `inert`, with the gradients last collected times `factor`."""
        known = told(rule, h)
        assert known is not None
        weights = self.params if self._direct else [window.weight() for window in self.windows]
        self.rows[:, WEIGHT] = list(map(Tensor.data_ptr, weights))
        rows = self.rows if not inert else self.rows[[number not in inert for number in self.numbers]]
        if len(rows):
            self.kernel(Table(rows, False, torch.device("cpu")), known.scalars, False, factor)
        if not self._direct:
            for window in self.windows:
                window.finish()
