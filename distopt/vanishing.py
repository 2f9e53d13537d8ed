"""Updates that rounding swallows: bfloat16 and float16 weights without master bits, whose steps are below half an ulp."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from distopt.bound import Bound
from distopt.deferred import Reading
from distopt.layouts import local_tensor

EVERY = 100
"""Steps from one look to the next. The first ones of a warmup may vanish without harm, and the copies cost."""
SAMPLE = 4096
"""Elements of each parameter that are looked at, the first ones on this rank."""
MOST = 0.5
"""Share of updates that may vanish."""


class Vanishing:
    """Looks at a sample of the weights on every hundredth step, and warns once. Counts stay on the device until the step
    after that, so that nothing waits for them. What is stepped in backward is not looked at."""

    def __init__(self) -> None:
        self._steps = 0
        self._before: list[Tensor] = []
        self._counts: Reading | None = None

    def before(self, bound: Bound, groups: list[dict[str, Any]]) -> None:
        """Before a step: report what the last look has found, and copy where it is time for another."""
        if self._counts is not None:
            kept, total = self._counts.tolist()
            self._counts = None
            if kept > MOST * total:
                self._steps = -1
                warnings.warn(
                    f"{kept / total:.0%} of the updates of bfloat16 or float16 weights vanish (of {total:,.0f} that were "
                    "looked at on this rank): they are below half an ulp, and rounding to nearest leaves the weight as it "
                    "was; keep what is rounded away, with master_codec='bits8' (1 byte per parameter) or 'bits16'",
                    stacklevel=4,
                )
        if self._steps >= 0:
            self._steps += 1
            if self._steps % EVERY == 0:
                self._before = [weight.clone() for weight, _ in _sample(bound, groups)]

    def after(self, bound: Bound, groups: list[dict[str, Any]], stepped: bool) -> None:
        """After it: count, on the device, the updates that left a weight as it was though it has a gradient."""
        before, self._before = self._before, []
        if not stepped or not before:
            return
        counts = [
            torch.stack([((weight == old) & (grad != 0)).sum(), (grad != 0).sum()])
            for old, (weight, grad) in zip(before, _sample(bound, groups))
            if grad is not None
        ]
        self._counts = Reading(torch.stack(counts).sum(0).double()) if counts else None

    def forget(self) -> None:
        """The last step was not taken."""
        self._counts = None


def _sample(bound: Bound, groups: list[dict[str, Any]]) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Weights and gradients (n,), of which master bits keep nothing."""
    for group, options in zip(bound.groups, groups):
        if options["master_codec"] != "none" or not options["lr"]:
            continue
        for window in group.windows:
            local = local_tensor(window.param).detach()
            if local.dtype in (torch.bfloat16, torch.float16) and local.is_contiguous():
                grad = window.grad()
                weight = local.view(-1)[window.start : window.stop][:SAMPLE]
                yield weight, None if grad is None else grad[:SAMPLE]
