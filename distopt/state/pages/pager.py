"""The pager: brings pages into slots before they are needed, and takes them away behind the step.

A page is in use between `opened` and the end of that block, one at a time. `expect` tells which pages are next; of these
the next few are fetched while one is in use. With SLOTS slots that is: at most SLOTS − 2 fetched ahead, one in use, and
the others on their way back.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from distopt.plan.buckets import GroupPlan
from distopt.plan.hosting import STEPPED
from distopt.plan.pages import SLOTS, Page, slot_bytes
from distopt.state.pages.file import PageError, PageFile
from distopt.state.pages.movers import CudaMover, HostMover, Slot
from distopt.state.pages.pool import Pool


class Pager:
    """The pages of all groups of an optimizer on one rank.

    Attributes:
        bytes_read, bytes_written: of pages that moved to the device and from it.

    Raises:
        ValueError: a place cannot hold its pages; see `PageFile` and `Pool`.
    """

    def __init__(self, plans: Sequence[GroupPlan], device: torch.device, rank: int) -> None:
        pages = [page for plan in plans for found in plan.pages.values() for page in found]
        tiers = sorted({page.tier for page in pages} - {"device", STEPPED})
        self.bytes_read = self.bytes_written = 0
        self._here: dict[Page, Tensor] = {}
        self.failure: str | None = None
        self._device = device
        places: dict[str, Pool | PageFile] = {}
        try:
            for tier in tiers:
                nbytes = max(page.offset + page.nbytes for page in pages if page.tier == tier)
                if tier == "cpu":
                    places[tier] = Pool(nbytes, pinned=device.type == "cuda")
                else:
                    places[tier] = PageFile(tier.removeprefix("disk:"), rank, nbytes)
            cuda = device.type == "cuda" and bool(tiers)
            self._mover = CudaMover(places, device) if cuda else HostMover(places)
            self._free = [self._mover.slot(slot_bytes(plans)) for _ in range(SLOTS if tiers else 0)]
        except ValueError:
            for place in places.values():
                place.close()
            raise
        for page in pages:
            if page.tier in ("device", STEPPED):
                where = device if page.tier == "device" else torch.device("cpu")
                self._here[page] = torch.empty(page.nbytes, dtype=torch.uint8, device=where)
        self._ahead: deque[Page] = deque()
        self._coming: dict[Page, Slot] = {}
        self._going: deque[Slot] = deque()
        self._finalizer = weakref.finalize(self, self._mover.close)

    def alarm(self) -> str | None:
        """Why no step can be taken, if so."""
        if self.failure is None:
            self.failure = self._mover.trouble()
        if self.failure is None:
            return None
        return f"pages of states are lost: {self.failure}. Build the optimizer anew and load the last checkpoint"

    def expect(self, pages: Iterable[Page]) -> None:
        """Begin to fetch these, which are wanted next, in this order; each once, however often it is named."""
        for page in list(self._coming):
            self._drop(page)
        self._ahead = deque(page for page in dict.fromkeys(pages) if page not in self._here)
        self._fetch_ahead()

    @contextmanager
    def opened(self, page: Page, *, write: bool, fresh: bool) -> Iterator[Tensor]:
        """The bytes of a page, on the device. With `write` they are kept; `fresh` ones are not read first.

        Raises:
            PageError: the page is not what was written to it, or an earlier one could not be written.
        """
        if page in self._here:
            yield self._here[page]
            return
        try:
            slot = self._blank(page) if fresh else self._fetched(page)
            self._fetch_ahead()
        except PageError as error:
            self.failure = str(error)
            raise
        written = False
        try:
            yield slot.buffer[: page.nbytes]
            written = write
        finally:
            if written:
                self._mover.start_write(page, slot)
                self._going.append(slot)
                self.bytes_written += page.nbytes
            else:
                self._mover.let_go(slot)
                self._free.append(slot)

    def settle(self) -> None:
        """Wait until everything is where it lies.

        Raises:
            PageError: something could not be written.
        """
        while self._going:
            self._free.append(self._returned())

    def _blank(self, page: Page) -> Slot:
        """A slot for what will be written anew."""
        if page in self._coming:
            self._drop(page)
        slot = self._take()
        self._mover.start_fresh(slot)
        return slot

    def _fetched(self, page: Page) -> Slot:
        slot = self._coming.pop(page, None)
        if slot is None:
            if page in self._ahead:
                self._ahead.remove(page)
            slot = self._read(page, self._take())
        self._mover.finish_read(slot)
        return slot

    def _read(self, page: Page, slot: Slot) -> Slot:
        self._mover.start_read(page, slot)
        self.bytes_read += page.nbytes
        return slot

    def _fetch_ahead(self) -> None:
        while self._ahead and len(self._coming) < SLOTS - 2:
            if not self._free:
                if not self._going or not self._is_back(self._going[0]):
                    return
                self._free.append(self._returned())
            page = self._ahead.popleft()
            self._coming[page] = self._read(page, self._free.pop())

    def _take(self) -> Slot:
        """A slot that nothing is in; waits for one on its way back, else gives up a page that was fetched ahead."""
        if not self._free and self._going:
            self._free.append(self._returned())
        if not self._free:
            last = next(reversed(self._coming))
            self._drop(last)
            self._ahead.appendleft(last)
        return self._free.pop()

    @staticmethod
    def _is_back(slot: Slot) -> bool:
        return slot.work is None or slot.work.done()

    def _returned(self) -> Slot:
        slot = self._going.popleft()
        self._mover.finish_write(slot)
        return slot

    def _drop(self, page: Page) -> None:
        slot = self._coming.pop(page)
        try:
            self._mover.finish_read(slot)
        except PageError as error:  # whoever wants it will hear of it again
            self.failure = str(error)
        self._free.append(slot)


def make_pager(plans: Sequence[GroupPlan], device: torch.device, rank: int) -> Pager | None:
    """The pager of these plans, if any state is paged."""
    return Pager(plans, device, rank) if any(plan.pages for plan in plans) else None
