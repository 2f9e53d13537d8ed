"""Process groups by their ranks, and what went over them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class Traffic:
    """Bytes that this rank handed to, and got from, the optimizer's own collectives since the last reset.

    An all-reduce of n bytes counts n sent and n received, whatever algorithm the backend uses; an all-to-all and a
    broadcast count what leaves and enters the rank, without self-traffic.
    """

    sent: int = 0
    received: int = 0
    calls: int = 0

    def count(self, sent: int, received: int) -> None:
        """Add one collective."""
        self.sent += sent
        self.received += received
        self.calls += 1


@dataclass
class Domain:
    """The ranks that jointly hold one copy of some parameters, and how this rank reaches them.

    Attributes:
        ranks: global ranks, ascending; positions in this tuple are what owners are counted in.
        me: this rank's position.
        group: None where the domain is this rank alone.
    """

    ranks: tuple[int, ...]
    me: int
    group: dist.ProcessGroup | None
    traffic: Traffic = field(default_factory=Traffic)

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.ranks)

    def all_reduce(self, buffer: Tensor, op: str = "sum") -> dist.Work | None:
        """Start an all-reduce in place; None where there is nobody to talk to."""
        if self.group is None or buffer.numel() == 0:
            return None
        self.traffic.count(buffer.nbytes, buffer.nbytes)
        return dist.all_reduce(buffer, getattr(dist.ReduceOp, op.upper()), group=self.group, async_op=True)

    def all_to_all(self, received: Tensor, sent: Tensor, receive: list[int], send: list[int]) -> dist.Work | None:
        """Start an all-to-all of flat buffers with the given splits in elements, by position; None where there is nobody to
        talk to."""
        if self.group is None:
            return None
        self.traffic.count(sent.nbytes, received.nbytes)
        return dist.all_to_all_single(received, sent, receive, send, group=self.group, async_op=True)

    def meet(self, deadline: timedelta) -> bool:
        """Wait until every rank has come here; False where one has not in time. Not counted as traffic."""
        if self.group is None:
            return True
        device = dist.distributed_c10d._get_pg_default_device(self.group)
        work = dist.all_reduce(torch.zeros(1, device=device), group=self.group, async_op=True)
        assert work is not None
        try:
            return bool(work.wait(deadline))
        except RuntimeError:  # a timeout, or a rank that is gone: backends do not tell one from the other
            return False

    def broadcast(self, buffer: Tensor, source: int) -> dist.Work | None:
        """Start a broadcast from the rank at position `source`."""
        assert self.group is not None
        mine = source == self.me
        self.traffic.count(buffer.nbytes * (self.size - 1) if mine else 0, 0 if mine else buffer.nbytes)
        return dist.broadcast(buffer, group=self.group, group_src=source, async_op=True)

    def all_gather_ints(self, values: list[int], device: torch.device) -> list[list[int]]:
        """Every rank's list of integers (all of one length), by position. Set-up only; not counted as traffic."""
        if self.group is None:
            return [values]
        mine = torch.tensor(values, dtype=torch.int64, device=device)
        out = [torch.empty_like(mine) for _ in self.ranks]
        dist.all_gather(out, mine, group=self.group)
        return [row.tolist() for row in out]


class Domains:
    """All domains of one optimizer. Groups that torch already has are reused; others are made in ascending order of
    their ranks, the same order everywhere, so that creation cannot deadlock."""

    def __init__(self, known: Iterable[dist.ProcessGroup] = ()) -> None:
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.traffic = Traffic()
        self._domains: dict[tuple[int, ...], Domain] = {}
        self._groups: dict[tuple[int, ...], dist.ProcessGroup] = {}
        if dist.is_initialized():
            assert dist.group.WORLD is not None
            for group in (*known, dist.group.WORLD):
                self._groups.setdefault(tuple(dist.get_process_group_ranks(group)), group)

    def create(self, wanted: Iterable[tuple[int, ...]]) -> None:
        """Make the domains of these sets of ranks; collective among the members of each."""
        for ranks in sorted({tuple(sorted(ranks)) for ranks in wanted}):
            if ranks in self._domains:
                continue
            group = None
            if len(ranks) > 1:
                group = self._groups.get(ranks) or dist.new_group(list(ranks), use_local_synchronization=True)
                self._groups[ranks] = group
            self._domains[ranks] = Domain(ranks, ranks.index(self.rank), group, self.traffic)

    def __getitem__(self, ranks: tuple[int, ...]) -> Domain:
        return self._domains[tuple(sorted(ranks))]
