"""The parameters of an optimizer as one vector, of which every rank holds its part.

Vectors are local and flat; what has to be known of whole ones, dot products and maxima, is reduced: all that one round
asks for in one all-reduce of fp64 numbers.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from distopt.bound import Bound
from distopt.layouts import local_tensor
from distopt.options import ENGINE_OPTIONS, GROUP_OPTIONS
from distopt.rules import rule_class
from distopt.state.windows import Window

SLICE = 1 << 20
"""Elements per partial product, which are added in fp64."""


class Vectors:
    """Reads layouts, and is collective where parameters are sharded.

    Args:
        group: the one parameter group.
        words: what else every rank must have alike.
        process_group: the ranks over which the loss is a mean, where these are more than those that hold the parameters.

    Raises:
        ValueError: ranks disagree; parameters of another dtype than fp32 and fp64, or of both.
    """

    def __init__(self, group: dict[str, Any], words: dict[str, Any], process_group: dist.ProcessGroup | None) -> None:
        # A rule without states: only the layouts are wanted.
        plain = {**asdict(rule_class("sgd")()), **GROUP_OPTIONS, "rule": "sgd"}
        engine = {**ENGINE_OPTIONS, **words, "norm_group": process_group, "nonfinite": None}
        self.bound = Bound([{**plain, **{k: v for k, v in group.items() if k in ("params", "param_names")}}], engine)
        dtypes = {param.dtype for param in self.bound.params}
        if dtypes not in ({torch.float32}, {torch.float64}):
            raise ValueError(
                f"parameters are {sorted(map(str, dtypes))}; line searches and differences of gradients need all of them in "
                "float32, or all in float64"
            )
        self.dtype, self.device = dtypes.pop(), self.bound.device
        self.windows = self.bound.groups[0].windows
        self.sizes = [window.numel for window in self.windows]
        self.local_numel = sum(self.sizes)
        self.numel = sum(_numel(window) for window in self.windows)
        # Runs of elements (start, stop, share) that have equally many copies among the ranks: each counts once.
        self.runs: list[tuple[int, int, float]] = []
        start = 0
        for window in self.windows:
            share = window.holders / self.bound.union.size
            if self.runs and self.runs[-1][2] == share:
                self.runs[-1] = (self.runs[-1][0], start + window.numel, share)
            else:
                self.runs.append((start, start + window.numel, share))
            start += window.numel

    def zeros(self, *rows: int) -> Tensor:
        """`rows` zero vectors (…, local elements)."""
        return torch.zeros((*rows, self.local_numel), dtype=self.dtype, device=self.device)

    def weights(self) -> Tensor:
        """A copy of the weights."""
        return torch.cat([window.weight() for window in self.windows])

    def assign(self, x: Tensor) -> None:
        """Make `x` the weights."""
        for window, part in zip(self.windows, x.split(self.sizes)):
            window.weight().copy_(part)
            window.finish()

    def gradient(self) -> tuple[Tensor, bool]:
        """A copy of the gradient, zero where it is missing, and whether there is any."""
        grads = [window.grad() for window in self.windows]
        parts = [
            torch.zeros(size, dtype=self.dtype, device=self.device) if grad is None else grad
            for grad, size in zip(grads, self.sizes)
        ]
        return torch.cat(parts), any(grad is not None for grad in grads)

    def products(self, left: Tensor, right: Tensor) -> Tensor:
        """This rank's part of all dot products of rows of `left` (p, n) and `right` (q, n): (p, q) in fp64."""
        total = torch.zeros((len(left), len(right)), dtype=torch.float64, device=self.device)
        for start, stop, share in self.runs:
            for a in range(start, stop, SLICE):
                b = min(a + SLICE, stop)
                total.add_((left[:, a:b] @ right[:, a:b].T).double(), alpha=share)
        return total

    def absolute_sum(self, x: Tensor) -> Tensor:
        """This rank's part of the sum of magnitudes, (1,) in fp64."""
        parts = [x[start:stop].abs().sum(dtype=torch.float64) * share for start, stop, share in self.runs]
        return torch.stack(parts).sum().view(1)

    def reduce(
        self, sums: list[Tensor], maxima: list[Tensor] | None = None, loss: float | None = None
    ) -> tuple[list[Tensor], list[float], float]:
        """One round: sums of fp64 tensors over the ranks that hold the parameters, the largest magnitude in each of
        `maxima` (each rank has a slot for its own in the same all-reduce), and the mean of the ranks' losses.

        Returns:
            The sums on the CPU in their shapes; the maxima; the mean loss, 0 where none was given.
        """
        union, searched = self.bound.union, self.bound.norm
        slots = torch.zeros((len(maxima or ()), union.size), dtype=torch.float64, device=self.device)
        for row, values in zip(slots, maxima or ()):
            if values.numel():
                row[union.me] = values.abs().amax()
        mean = torch.tensor([0.0 if loss is None else loss / searched.size], dtype=torch.float64, device=self.device)
        alike = union.ranks == searched.ranks
        flat = torch.cat([*(part.double().flatten() for part in sums), slots.flatten(), mean if alike else mean[:0]])
        for domain, buffer in ((union, flat), (searched, mean if not alike and loss is not None else mean[:0])):
            work = domain.all_reduce(buffer)
            if work is not None:
                work.wait()
        found = flat.cpu()
        totals, start = [], 0
        for part in sums:
            totals.append(found[start : start + part.numel()].view(part.shape))
            start += part.numel()
        largest = found[start : start + slots.numel()].view(slots.shape)
        return totals, largest.amax(1).tolist() if maxima else [], float(found[-1] if alike else mean)

    def full(self, x: Tensor) -> Tensor:
        """The whole vector (numel,) on every rank, in fp64 on the CPU; for small ones."""
        whole = torch.zeros(self.numel, dtype=torch.float64, device=self.device)
        for start, stop, share in self.runs:
            whole[self.positions[start:stop]] = x[start:stop].double() * share
        return self.reduce([whole])[0][0]

    def local(self, whole: Tensor) -> Tensor:
        """This rank's part of a whole vector."""
        return whole.to(self.device, self.dtype)[self.positions]

    @property
    def positions(self) -> Tensor:
        """Where the local elements lie in the whole vector, (local elements,)."""
        found, offset = [], 0
        for window in self.windows:
            layout, here = window.spec.layout, torch.empty(window.numel, dtype=torch.int64)
            cols = layout.shape[-1] if layout.shape else 1
            for rect in layout.rects(window.spec.index, max(len(layout.shape) - 1, 0)):
                rows = torch.arange(rect.r0, rect.r1)[:, None] * cols
                numbers = offset + rows + torch.arange(rect.c0, rect.c1)
                here.as_strided(numbers.shape, (rect.stride, 1), rect.offset).copy_(numbers)
            found.append(here)
            offset += _numel(window)
        return torch.cat(found).to(self.device)

    def face(self, number: int, slab: Tensor) -> Tensor:
        """What a slab of vectors (…, local elements) keeps for parameter `number`, as a view that lies as the parameter
        does: a DTensor (…, *shape) where that is one."""
        start = sum(self.sizes[:number])
        param, lead = self.windows[number].param, slab.shape[:-1]
        local = slab[..., start : start + self.sizes[number]].view((*lead, *local_tensor(param).shape))
        if not isinstance(param, DTensor):
            return local
        shape = torch.Size((*lead, *param.shape))
        return DTensor.from_local(
            local,
            param.device_mesh,
            [_shifted(placement, len(lead)) for placement in param.placements],
            run_check=False,
            shape=shape,
            stride=torch.empty(shape, device="meta").stride(),
        )


def _shifted(placement: Any, dims: int) -> Any:
    if isinstance(placement, _StridedShard):
        return _StridedShard(placement.dim + dims, split_factor=placement.split_factor)
    return Shard(placement.dim + dims) if isinstance(placement, Shard) else placement


def _numel(window: Window) -> int:
    return torch.Size(window.spec.layout.shape).numel()
