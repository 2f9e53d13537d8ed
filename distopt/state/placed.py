"""fp32 parameters that a compiled kernel steps where they are: no copies, whatever their number."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import compress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distopt.kernels.elementwise import told
from distopt.kernels.exact import exact_kernel
from distopt.kernels.jobs import GRAD, NUMEL, STATES, TILES, WEIGHT, WIDTH, Table
from distopt.kernels.native import Kernel
from distopt.layouts import local_tensor
from distopt.plan.tiles import BLOCK
from distopt.rule import Rule
from distopt.state.lying import Lying, squares
from distopt.state.windows import Window


class Placed:
    """The table of some windows. `numbers` are their positions in the group, `states` the names of the rule's states."""

    def __init__(self, kernel: Kernel, numbers: list[int], windows: list[Window], states: tuple[str, ...]) -> None:
        self.kernel, self.numbers, self.windows = kernel, numbers, windows
        self.params = [window.param for window in windows]
        self.holders = np.array([window.holders for window in windows])
        self.rows = np.zeros((len(windows), WIDTH), np.int64)
        self.rows[:, NUMEL] = [window.numel for window in windows]
        self.rows[:, TILES] = -(-self.rows[:, NUMEL] // BLOCK)
        self._states = [[window.state[name] for window in windows] for name in states]
        self._find_states()
        self._local = [local_tensor(param).numel() for param in self.params]

    def collect(self, grads: list[Tensor | None], lying: Lying | None) -> None:
        """Take the gradients; those that are None are zeros. `lying`: where all of the group lie, if that is known.

        Raises:
            ValueError: a parameter has another size, or lies elsewhere, than when it was bound, or has no memory.
        """
        found: list[Any] = [grads[number] for number in self.numbers]
        self._direct = lying is not None
        if lying is not None:
            self.rows[:, GRAD], self.rows[:, WEIGHT] = lying.grads[self.numbers], lying.weights[self.numbers]
        else:
            device = torch.device("cpu")
            every = zip(self.windows, found, self._local)
            found = [window.grad_at_address(grad, numel, device).float() for window, grad, numel in every]
            self.rows[:, GRAD] = list(map(Tensor.data_ptr, found))
        self._grads: list[Tensor] = found
        self._scale = 1.0

    def _find_states(self) -> None:
        """Note where states lie. Whoever shares them with other processes moves them."""
        self._storages = {
            s.untyped_storage().data_ptr(): s.untyped_storage() for states in self._states for s in states
        }
        for place, states in enumerate(self._states):
            self.rows[:, STATES + 3 * place] = list(map(Tensor.data_ptr, states))

    def scale(self, factor: float) -> None:
        """Multiply the gradients last collected, and those of the parameters: as they are stepped, where they lie plainly and
        apart."""
        self._scale *= factor
        if not self._direct or self._overlap():
            self._scale_now()
            for window, grad in zip(self.windows, self._grads):
                window.set_grad(grad)

    def _overlap(self) -> bool:
        """Whether gradients share memory."""
        order = np.argsort(self.rows[:, GRAD])
        starts = self.rows[order, GRAD]
        return bool((starts[1:] < starts[:-1] + 4 * self.rows[order[:-1], NUMEL]).any())

    def _scale_now(self) -> None:
        if self._scale != 1.0:
            torch._foreach_mul_(self._grads, self._scale)
        self._scale = 1.0

    def squares(self) -> list[tuple[float, int]]:
        """Sums of squares of the gradients last collected, with the number of ranks that hold one copy."""
        return squares(self.rows[:, GRAD].copy(), self.rows[:, NUMEL].copy(), self.holders)

    def step(self, rule: Rule, h: Any, inert: set[int], factor: float) -> bool:
        """Step all that are not `inert`, with the gradients last collected times `factor`. False, and nothing is done, where
        there is no kernel for what the rule does now: an option such as `nesterov` may be another than at bind."""
        known, kernel = told(rule, h), exact_kernel(rule)
        if known is None or kernel is None:
            self._scale_now()
            return False
        weights: list[Tensor] = self.params
        if not self._direct:
            weights = [window.weight() for window in self.windows]
            self.rows[:, WEIGHT] = list(map(Tensor.data_ptr, weights))
        if any(storage.data_ptr() != address for address, storage in self._storages.items()):
            self._find_states()
        rows = self.rows
        if inert:
            stepping = [number not in inert for number in self.numbers]
            rows, weights = rows[stepping], list(compress(weights, stepping))
        if len(rows):
            torch.autograd.graph.increment_version(weights)  # what was saved for a backward pass is another number soon
            if self._scale != 1.0:  # those made in inference mode do not count
                torch.autograd.graph.increment_version([grad for grad in self._grads if not grad.is_inference()])
            kernel(Table(rows, False, torch.device("cpu")), known.scalars, False, factor, self._scale)
        if not self._direct:
            self.finish()
        return True

    def parts(self, inert: set[int], factor: float) -> Iterator[tuple[Tensor, Tensor, dict[str, Tensor]]]:
        """Weights, gradients times `factor` and states, flat, of all that are not `inert`; `finish` after writing to them."""
        for number, window, grad in zip(self.numbers, self.windows, self._grads):
            if number not in inert:
                yield window.weight(), grad.view(-1) * factor, window.state

    def release(self) -> None:
        """Forget the gradients last collected."""
        self._grads = []

    def finish(self) -> None:
        """Write back weights whose storage is not contiguous."""
        for window in self.windows:
            window.finish()
