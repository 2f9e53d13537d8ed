"""Buckets in flight: while one bucket's bytes travel, the next one is prepared and the previous one computed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Barrier:
    """A bucket's partial sums (1-D) for requests of optimizer scope: nobody goes on before all have arrived."""

    partial: Tensor
    op: str


Run = Generator[dist.Work | Barrier | None, Any, None]


def run_pipelined(runs: Iterable[Run], depth: int) -> None:
    """Drive bucket runs to their end, at most `depth` in flight, in an order that is the same on every rank."""
    waiting: deque[tuple[Run, dist.Work]] = deque()
    for run in runs:
        _advance(run, waiting)
        while len(waiting) >= depth:
            _resume(waiting)
    while waiting:
        _resume(waiting)


def _resume(waiting: deque[tuple[Run, dist.Work]]) -> None:
    oldest, work = waiting.popleft()
    work.wait()
    _advance(oldest, waiting)


def _advance(run: Run, waiting: deque[tuple[Run, dist.Work]]) -> None:
    """Run on to the next work that has to be waited for, or to the end."""
    for work in run:
        if work is not None:
            assert not isinstance(work, Barrier)
            waiting.append((run, work))
            return


def run_in_step(
    runs: Sequence[Run], total: Callable[[Tensor, str], Tensor], barriers: Sequence[tuple[str, int]]
) -> None:
    """Drive bucket runs of requests of optimizer scope to their end, all together.

    `barriers` lists the (operation, values) that the rule will ask for, in order; `total` adds the partial sums over
    ranks, also on a rank that has no run at all.
    """
    answer: Tensor | None = None
    for op, values in barriers:
        partials = [event.partial for event in (_to_barrier(run, answer) for run in runs) if event is not None]
        neutral = torch.full((values,), 0.0 if op == "sum" else -torch.inf)
        stacked = torch.stack(partials) if partials else neutral[None]
        answer = total(stacked.sum(0) if op == "sum" else stacked.amax(0), op)
    for run in runs:
        end = _to_barrier(run, answer)
        assert end is None


def _to_barrier(run: Run, answer: Tensor | None) -> Barrier | None:
    """Run on to the next barrier; None at the end."""
    try:
        event = run.send(answer)
        while not isinstance(event, Barrier):
            if event is not None:
                event.wait()
            event = run.send(None)
    except StopIteration:
        return None
    return event
