"""Jobs: what a kernel that steps many tensors at once is handed, one row of addresses per tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Coding:
    """One state of a tensor as it is stored: codes, flat; a scale per tile, or None; and, where ranks have to agree on
    scales, `agreed` (tiles,): the kernel's scales are at least that, and when it only looks it writes its maxima there."""

    codes: Tensor
    scales: Tensor | None
    agreed: Tensor | None = None


@dataclass(frozen=True)
class Job:
    """One tensor to step: flat `weight` and `grad`; `starts` (tiles + 1,) int64, where tiles begin, or None where all have
    BLOCK elements; the number of `tiles`; what `weight` lacks of fp32, or None; its states, in the order of the rule's."""

    weight: Tensor
    grad: Tensor
    starts: Tensor | None
    tiles: int
    rest: Tensor | None
    states: tuple[Coding, ...]


CodedKernel = Callable[[list[Job], tuple[float, ...], bool], None]
"""Steps jobs with a rule's scalars; with True, only looks at the maxima of tiles."""

WIDTH = 12
"""Columns of the table: weight, grad, starts, tiles, elements, then codes, scales, agreed of each of two states, rest."""


def table(jobs: list[Job]) -> Tensor:
    """The jobs as int64 (jobs, WIDTH) on the host; an address of 0 is nothing."""
    rows = []
    for job in jobs:
        row = [job.weight.data_ptr(), job.grad.data_ptr(), _address(job.starts), job.tiles, job.weight.numel()]
        for state in job.states:
            row += [state.codes.data_ptr(), _address(state.scales), _address(state.agreed)]
        row += [0] * (WIDTH - 1 - len(row))
        rows.append([*row, _address(job.rest)])
    return torch.tensor(rows, dtype=torch.int64)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
