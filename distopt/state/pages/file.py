"""A page file: scratch of one run and rank, which nobody reads after it.

It has a stable name, `rank00000-0.pages`, and is locked while its process lives: another process that is given the same
directory is refused, and what a killed one has left behind (its head names another run) is made anew, never read. All of
its space is claimed when it is made, so that a disk that is full says so before training starts. Every page is checked
against the sum of what was last written to it, which is kept in memory.
"""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import secrets
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distopt.plan.pages import SECTOR, Page

MAGIC = "distopt pages 1"


class PageError(ValueError):
    """A page is not what was written, or could not be written. The states of this optimizer are lost: make it anew and load
    the last checkpoint."""


class PageFile:
    """See the module.

    Raises:
        ValueError: a directory that cannot be written, is used by another process, or has too little space.
    """

    def __init__(self, directory: str, rank: int, nbytes: int) -> None:
        self.run = secrets.token_hex(8)
        self._sums: dict[int, int] = {}
        self._handle = -1
        try:
            Path(directory).mkdir(parents=True, exist_ok=True, mode=0o700)
            self.path, self._handle = _claim(Path(directory).resolve(), rank)
            os.ftruncate(self._handle, 0)  # what another run has left
            os.posix_fallocate(self._handle, 0, nbytes)
        except OSError as error:
            self.close()
            raise ValueError(_cause(error, directory, nbytes)) from error
        self.nbytes = nbytes
        head = json.dumps({"format": MAGIC, "run": self.run, "pid": os.getpid(), "rank": rank, "bytes": nbytes})
        buffer = mmap.mmap(-1, SECTOR)
        buffer.write(head.encode())
        os.pwrite(self._handle, buffer, 0)

    def trouble(self) -> str | None:
        """What happened to the file that can be seen without reading it."""
        found = os.fstat(self._handle)
        if found.st_size < self.nbytes:
            return f"{self.path} was cut to {found.st_size} bytes, it had {self.nbytes}"
        if found.st_nlink == 0:
            return f"{self.path} was deleted"
        return None

    def load(self, page: Page, into: Tensor) -> None:
        """Read a page into bytes of memory.

        Raises:
            PageError: it is not what was written last.
        """
        view = into.numpy().data[: page.nbytes]
        try:
            done = 0
            while done < page.nbytes:
                count = os.preadv(self._handle, [view[done:]], page.offset + done)
                if not count:
                    break
                done += count
        except OSError as error:
            raise PageError(f"{self.path}: the page at byte {page.offset} cannot be read: {error}") from error
        if done < page.nbytes or zlib.crc32(view) != self._sums[page.offset]:
            raise PageError(
                f"{self.path}: the page of {page.nbytes} bytes at byte {page.offset} is not what run {self.run} wrote "
                "there: damaged, stale, or another's. Build the optimizer anew and load the last checkpoint"
            )

    def save(self, page: Page, source: Tensor) -> None:
        """Write a page.

        Raises:
            PageError: the disk refused.
        """
        view = source.numpy().data[: page.nbytes]
        self._sums[page.offset] = zlib.crc32(view)
        try:
            done = 0
            while done < page.nbytes:
                done += os.pwritev(self._handle, [view[done:]], page.offset + done)
        except OSError as error:
            raise PageError(f"{self.path}: the page at byte {page.offset} cannot be written: {error}") from error

    def close(self) -> None:
        """Delete the file, unless somebody did and another has its name by now, and let go of it."""
        if self._handle >= 0:
            if _is_at(self._handle, self.path):
                self.path.unlink()
            os.close(self._handle)
            self._handle = -1


def aligned(nbytes: int) -> Tensor:
    """Bytes that begin where direct I/O wants them to."""
    buffer = torch.from_numpy(np.empty(nbytes + SECTOR, np.uint8))
    start = -buffer.data_ptr() % SECTOR
    return buffer[start : start + nbytes]


def _claim(directory: Path, rank: int) -> tuple[Path, int]:
    """The first file of this rank that no optimizer of this process has, open and locked; without the page cache if it can be."""
    for number in range(1000):
        path = directory / f"rank{rank:05d}-{number}.pages"
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            handle = os.open(path, flags | os.O_DIRECT, 0o600)
        except OSError as error:
            if error.errno != errno.EINVAL:  # a file system that knows no direct I/O
                raise
            handle = os.open(path, flags, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            owner = _owner(path)
            if owner != os.getpid():
                raise ValueError(
                    f"offload: {path} is in use by process {owner}, another run; give each run a directory of its own"
                ) from None
            continue
        if not _is_at(handle, path):  # whoever had it has deleted it in between
            os.close(handle)
            return _claim(directory, rank)
        return path, handle
    raise ValueError(f"offload: a thousand optimizers of this process page to {directory}")


def _is_at(handle: int, path: Path) -> bool:
    """Whether this is the file of this name."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat(follow_symlinks=False))
    except FileNotFoundError:
        return False


def _owner(path: Path) -> int | None:
    """The process that the head of a page file names."""
    try:
        return int(json.loads(path.read_bytes()[:SECTOR].rstrip(b"\0"))["pid"])
    except (OSError, ValueError, KeyError):
        return None


def _cause(error: OSError, directory: str, nbytes: int) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        parent = os.statvfs(directory)
        free = parent.f_bavail * parent.f_frsize
        return (
            f"offload: pages take {nbytes} bytes, '{directory}' has {free} free: {error.strerror}. Free space, name another "
            "disk, or pass a state_codec of fewer bits"
        )
    return f"offload: '{directory}' cannot be written: {error.strerror}; name a directory of a local disk"
