"""Verdicts that nobody waits for. They stay on the device, where every write of the step asks them; the host hears of them by
its next step.

Where one process has everything, no other rank has to be asked whether to go on, and missing gradients are known without the
device. So `Bound.step` queues the whole step, and counts it. What the gradients were like travels to the host meanwhile,
and is looked at before anything else is done with the optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distopt.comm.groups import Domain
from distopt.state.counters import Counters
from distopt.verdict import Verdict

SKIP = "Pass nonfinite='skip' to skip such steps"


def defers(device: torch.device, union: Domain, norm: Domain) -> bool:
    """Whether steps of parameters on this device, of these ranks, do not wait for their verdict."""
    return device.type != "cpu" and union.size == norm.size == 1


class Reading:
    """Numbers on their way to the host, behind what is queued on the device."""

    def __init__(self, values: Tensor) -> None:
        self._values, self._arrived = values, None
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def tolist(self) -> list[Any]:
        """The numbers; waits until they are here."""
        if self._arrived is not None:
            self._arrived.synchronize()
        found: list[Any] = self._values.tolist()
        return found


@dataclass(frozen=True)
class Judged:
    """A verdict on the device; all 0-D but `squares`.

    Attributes:
        ok: bool, whether the step is taken.
        factor: fp32, of the gradients: 1 unless `ok`; None where they stay as they are.
        norm: fp64, of the gradients before clipping, without the scale of a gradient scaler.
        squares: (n,) fp64, sums of squares, as the groups gave them one after the other; empty where nobody looks.
    """

    ok: Tensor
    factor: Tensor | None
    norm: Tensor
    squares: Tensor

    def reading(self) -> Reading:
        """`ok`, `norm` and `squares` in this order."""
        return Reading(torch.cat([torch.stack([self.ok.double(), self.norm]), self.squares]))


def judge(
    squares: Sequence[Tensor],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    limit: float | None,
    device: torch.device,
) -> Judged:
    """Of sums of squares (fp64) and of what a gradient scaler found; `limit` is that of the norm."""
    found = torch.cat([torch.zeros(0, dtype=torch.float64, device=device), *squares])
    total = found.sum()
    ok = total.isfinite()
    if found_inf is not None:
        ok = ok & (found_inf.to(device, non_blocking=True) == 0)
    factor, norm = None, total.sqrt()
    if grad_scale is not None:
        scale = grad_scale.to(device, torch.float64, non_blocking=True)
        factor, norm = scale.reciprocal(), norm / scale
    if limit is not None:
        clipped = (limit / (norm + 1e-6)).clamp(max=1.0)
        factor = clipped if factor is None else factor * clipped
    if factor is not None:
        factor = torch.where(ok, factor, 1.0).float()
    return Judged(ok, factor, norm, found)


@dataclass(frozen=True)
class Pending:
    """A step that was taken unless the device said no: its verdict, who was counted, and what is to be done.

    Attributes:
        reading: of the verdict, as `Judged.reading` has it.
        counted: counters that went ahead, with who rested.
        checked: whether gradients were looked at, so that there is a norm.
        raises: whether a gradient that is not finite is an error.
    """

    reading: Reading
    counted: list[tuple[Counters, set[int]]]
    checked: bool
    raises: bool

    def settle(self, groups: Sequence[Any], names: Sequence[str]) -> Verdict:
        """See `Bound.settle`; of its groups and the names of their parameters."""
        ok, norm, *squares = self.reading.tolist()
        if ok:
            return Verdict(norm if self.checked else None, True, frozenset(), frozenset())
        for counters, inert in self.counted:
            counters.retreat(inert)
        if self.raises:
            name = names[_first_culprit(groups, squares)]
            raise ValueError(
                f"in the last step the gradient of {name!r} was not finite; nothing was changed by it. {SKIP}"
            )
        return Verdict(math.inf if self.checked else None, False, frozenset(), frozenset())


def _first_culprit(groups: Sequence[Any], squares: list[float]) -> int:
    """Which parameter was the first whose gradient was not finite, of the sums that the groups `found`."""
    start = taken = 0
    for group in groups:
        found = group.not_finite(squares[taken : taken + group.sums])
        if found:
            return start + int(min(found))
        start, taken = start + len(group.windows), taken + group.sums
    raise AssertionError("no sum is other than finite")
