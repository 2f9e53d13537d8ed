"""Ranks that act as one on a checkpoint: they exchange JSON, and a failure of one becomes the same error on all.

Nothing is pickled: what goes over the wire is UTF-8 text in uint8 tensors.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from distopt.state.manifest import CheckpointError


class Ranks:
    """The ranks of a process group, or this process alone.

    Attributes:
        rank: This process among them.
        size: How many they are.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        """Take `group`; None is the default group where torch.distributed is initialised, else this process alone.

        Raises:
            ValueError: This process is not in the group.
        """
        self._alone = group is None and not (dist.is_available() and dist.is_initialized())
        self._group = group
        self.rank = 0 if self._alone else dist.get_rank(group)
        self.size = 1 if self._alone else dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError(f"group: rank {dist.get_rank()} is not in it; call this on the group's ranks only")

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block of which a failure on any rank is the same error on all. Collective where it ends.

        The block itself holds no collectives: a rank that fails leaves it early.

        Raises:
            CheckpointError: Naming the first rank that failed and what it said; on that rank with the failure as its
                cause. Also where a rank cannot be reached.
        """
        failure = None
        try:
            yield
        except Exception as error:  # whatever it is, the others wait for it
            failure = error
        answers = self.all_gather(_describe(failure))
        failed = [rank for rank, answer in enumerate(answers) if answer is not None]
        if not failed:
            return
        message = answers[failed[0]]
        if self.size > 1:
            message = f"rank {failed[0]}: {message}"
        if len(failed) > 1:
            message += f" ({len(failed)} of {self.size} ranks failed)"
        raise CheckpointError(message) from failure

    def all_gather(self, value: Any) -> list[Any]:
        """Every rank's value, which is anything that JSON holds.

        Raises:
            CheckpointError: A rank cannot be reached.
        """
        if self._alone:
            return [value]
        try:
            mine, lengths = self._padded(value)
            received = [torch.empty_like(mine) for _ in lengths]
            dist.all_gather(received, mine, group=self._group)
        except RuntimeError as error:
            raise _lost(error) from error
        return [_decode(data, length) for data, length in zip(received, lengths)]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value on rank 0, an empty list elsewhere; `value` is anything that JSON holds.

        Raises:
            CheckpointError: A rank cannot be reached.
        """
        if self._alone:
            return [value]
        try:
            mine, lengths = self._padded(value)
            received = [torch.empty_like(mine) for _ in lengths] if self.rank == 0 else None
            dist.gather(mine, received, group=self._group, group_dst=0)
        except RuntimeError as error:
            raise _lost(error) from error
        return [_decode(data, length) for data, length in zip(received or [], lengths)]

    def _padded(self, value: Any) -> tuple[torch.Tensor, list[int]]:
        """`value` as bytes, zeros up to the longest rank's; and every rank's length."""
        text = json.dumps(value).encode()
        device = self._device()
        length = torch.tensor([len(text)], device=device)
        lengths = [torch.empty_like(length) for _ in range(self.size)]
        dist.all_gather(lengths, length, group=self._group)
        sizes = [int(each.item()) for each in lengths]
        data = torch.zeros(max(sizes), dtype=torch.uint8)
        data[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        return data.to(device), sizes

    def _device(self) -> torch.device:
        """Where the group's collectives run: the CPU if it has a backend for it, else the current accelerator."""
        if "cpu:" in dist.get_backend_config(self._group):
            return torch.device("cpu")
        return torch.device("cuda", torch.cuda.current_device())


def _decode(data: torch.Tensor, length: int) -> Any:
    return json.loads(data[:length].cpu().numpy().tobytes())


def _describe(failure: Exception | None) -> str | None:
    if failure is None or isinstance(failure, CheckpointError):
        return None if failure is None else str(failure)
    return f"{type(failure).__name__}: {failure}"


def _lost(error: RuntimeError) -> CheckpointError:
    return CheckpointError(f"a rank died or stopped answering in the middle of a checkpoint: {error}")
