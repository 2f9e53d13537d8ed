"""Jobs: what a kernel that steps many tensors at once is handed, one row of addresses per tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Coding:
    """One state of a tensor as it is stored: codes, flat; a scale per tile, or None; where ranks have to agree on scales,
    `agreed` (tiles,): the kernel's scales are at least that, and when it only looks it writes its maxima there; `key`, what
    stochastic rounding starts from; `packed`: two codes of 4 bits per byte."""

    codes: Tensor
    scales: Tensor | None
    agreed: Tensor | None = None
    key: int = 0
    packed: bool = False


@dataclass(frozen=True)
class Job:
    """One tensor to step: flat `weight` and `grad`; `starts` (tiles + 1,) int64, where tiles begin, or None where all have
    BLOCK elements; the number of `tiles`; what `weight` lacks of fp32, or None; its states, in the order of the rule's; the
    `numbers` (tiles,) int64 of the first elements of tiles in the group, where rounding is stochastic."""

    weight: Tensor
    grad: Tensor
    starts: Tensor | None
    tiles: int
    rest: Tensor | None
    states: tuple[Coding, ...]
    numbers: Tensor | None = None


@dataclass(frozen=True)
class Table:
    """Jobs as they are handed over: `rows` int64 (jobs, WIDTH) on the host, where an address of 0 is nothing; whether any state
    has `agreed` scales; the `device` of what the addresses point to; whether gradients are fp32 (`wide`); `ok` (0-D, bool):
    unless it holds, all stays as it is; None: it holds; `factor` (0-D, fp32, there): of the gradients."""

    rows: np.ndarray
    agreed: bool
    device: torch.device
    wide: bool = True
    ok: Tensor | None = None
    factor: Tensor | None = None


CodedKernel = Callable[[Table, tuple[float, ...], bool], None]
"""Steps jobs with a rule's scalars; with True, only looks at the maxima of tiles."""

WIDTH = 16
WEIGHT, GRAD, STARTS, TILES, NUMEL, STATES, REST, NUMBERS, KEYS = 0, 1, 2, 3, 4, 5, 11, 12, 13
"""Columns: from STATES on codes, scales and agreed of one state, then of the next; from KEYS on a key per state. Codes of 4
bits are counted in half bytes, so that they may begin within one."""


def table(jobs: list[Job]) -> Table:
    """The table of some jobs."""
    rows = []
    for job in jobs:
        row = [job.weight.data_ptr(), job.grad.data_ptr(), _address(job.starts), job.tiles, job.weight.numel()]
        for state in job.states:
            row += [state.codes.data_ptr() << state.packed, _address(state.scales), _address(state.agreed)]
        row += [0] * (REST - len(row))
        keys = [state.key for state in job.states]
        rows.append([*row, _address(job.rest), _address(job.numbers), *keys, *[0] * (3 - len(keys))])
    agreed = any(state.agreed is not None for job in jobs for state in job.states)
    return Table(np.asarray(rows, np.int64), agreed, jobs[0].weight.device, jobs[0].grad.dtype == torch.float32)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
