"""How a page moves between the place where it lies and its slot on the device. Reads and writes are started, and later
finished; what was started first is through first."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distopt.plan.pages import Page
from distopt.state.pages.file import PageError, PageFile, aligned
from distopt.state.pages.pool import Pool, pin

THREADS = 2
"""Transfers at once: one in, one out."""


@dataclass(eq=False)
class Slot:
    """Room for a page on the device; `work` is what moves it."""

    buffer: Tensor
    work: Future[None] | None = None
    staging: Tensor | None = None
    ready: Any = None
    free: Any = None


class HostMover:
    """The device is this machine's memory: threads copy, or read and write files."""

    def __init__(self, places: Mapping[str, Pool | PageFile]) -> None:
        self.places = places
        self.threads = ThreadPoolExecutor(THREADS, thread_name_prefix="distopt-pages")
        self._written: dict[Page, Future[None]] = {}
        self._process = os.getpid()

    def slot(self, nbytes: int) -> Slot:
        """Room for a page of at most so many bytes."""
        return Slot(aligned(nbytes))

    def start_read(self, page: Page, slot: Slot) -> None:
        """Bring a page."""
        slot.work = self._submit(self._load, page, slot.buffer, self._written.get(page))

    def trouble(self) -> str | None:
        """Why nothing can be moved from here, or what happened to a place, if so."""
        if os.getpid() != self._process:
            return f"they are of process {self._process}, which this one was forked from"
        return next((found for place in self.places.values() if (found := place.trouble()) is not None), None)

    def _submit(self, work: Callable[..., None], *args: Any) -> Future[None]:
        if os.getpid() != self._process:  # where these threads do not run
            raise PageError(f"pages of states cannot be moved: {self.trouble()}")
        return self.threads.submit(work, *args)

    def _load(self, page: Page, into: Tensor, written: Future[None] | None) -> None:
        if written is not None:  # it was submitted before, so it runs, or is done
            written.result()
        self.places[page.tier].load(page, into)

    def _save(self, page: Page, source: Tensor, written: Future[None] | None) -> None:
        if written is not None:  # two writes of a page at once would leave either
            written.result()
        self.places[page.tier].save(page, source)

    def start_fresh(self, slot: Slot) -> None:
        """A slot whose bytes will be written on the device."""

    def start_write(self, page: Page, slot: Slot) -> None:
        """Take a page away."""
        slot.work = self._written[page] = self._submit(self._save, page, slot.buffer, self._written.get(page))

    def let_go(self, slot: Slot) -> None:
        """A slot that is not written back."""

    def finish(self, slot: Slot) -> None:
        """Wait for what was started last."""
        if slot.work is not None:
            slot.work.result()
            slot.work = None

    finish_read = finish_write = finish

    def close(self) -> None:
        """End the threads, and the places; in the process that made them."""
        if os.getpid() != self._process:
            return
        self.threads.shutdown()
        for place in self.places.values():
            place.close()


class CudaMover(HostMover):
    """The device is a GPU: pinned memory goes over two streams of its own, nothing waits on the host; files go through
    pinned staging, read and written by threads."""

    def __init__(self, places: Mapping[str, Pool | PageFile], device: torch.device) -> None:
        super().__init__(places)
        self.device = device
        self.inward, self.outward = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self.staged = any(isinstance(place, PageFile) for place in places.values())

    def slot(self, nbytes: int) -> Slot:
        slot = Slot(torch.empty(nbytes, dtype=torch.uint8, device=self.device))
        slot.ready, slot.free = torch.cuda.Event(), torch.cuda.Event()
        if self.staged:
            slot.staging = aligned(nbytes)
            pin(slot.staging)
        return slot

    def start_read(self, page: Page, slot: Slot) -> None:
        place = self.places[page.tier]
        if isinstance(place, Pool):
            # What was last written to the pool is through: writes are in this order, on the stream that is waited for.
            self.inward.wait_stream(self.outward)
            self._copy_in(place.view(page), slot)
            return
        slot.work = self._submit(self._read_file, page, slot, self._written.get(page))

    def _read_file(self, page: Page, slot: Slot, written: Future[None] | None) -> None:
        assert slot.staging is not None
        slot.free.synchronize()
        self._load(page, slot.staging, written)
        self._copy_in(slot.staging[: page.nbytes], slot)

    def _copy_in(self, source: Tensor, slot: Slot) -> None:
        with torch.cuda.stream(self.inward):
            self.inward.wait_event(slot.free)
            slot.buffer[: source.numel()].copy_(source, non_blocking=True)
            slot.ready.record(self.inward)

    def finish_read(self, slot: Slot) -> None:
        self.finish(slot)
        torch.cuda.current_stream(self.device).wait_event(slot.ready)

    def start_write(self, page: Page, slot: Slot) -> None:
        place = self.places[page.tier]
        self.outward.wait_stream(torch.cuda.current_stream(self.device))
        target = place.view(page) if isinstance(place, Pool) else slot.staging
        assert target is not None
        with torch.cuda.stream(self.outward):
            target[: page.nbytes].copy_(slot.buffer[: page.nbytes], non_blocking=True)
            slot.free.record(self.outward)
        if isinstance(place, PageFile):
            slot.work = self._written[page] = self._submit(self._write_file, page, slot, self._written.get(page))

    def _write_file(self, page: Page, slot: Slot, written: Future[None] | None) -> None:
        assert slot.staging is not None
        slot.free.synchronize()
        self._save(page, slot.staging, written)

    def start_fresh(self, slot: Slot) -> None:
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(slot.ready)
        stream.wait_event(slot.free)

    def let_go(self, slot: Slot) -> None:
        slot.free.record(torch.cuda.current_stream(self.device))

    def close(self) -> None:
        if os.getpid() == self._process:
            torch.cuda.synchronize(self.device)
        super().close()
