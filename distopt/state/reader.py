"""Finding, verifying and reading native checkpoints, on any layout and world size."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open

from distopt.state.agreement import Ranks
from distopt.state.files import committed, discard, foreign_entry, split_name
from distopt.state.manifest import (
    DTYPES,
    MANIFEST,
    MAX_BYTES,
    CheckpointError,
    Entry,
    Manifest,
    Rect,
    check_rect,
    key,
    parse,
    view_2d,
)

_STEP = re.compile(r"step-([0-9]{1,18})")


class Reader:
    """A committed checkpoint, opened for reading. Not collective, except `verify` with a group.

    Opening reads the manifest and compares the files' sizes; `verify` compares their contents. A shard is opened at the
    first read from it, and of a tensor only the asked-for rectangle is read.

    Attributes:
        path: Where the checkpoint lies.
        document: What was given to `write`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open the checkpoint at `path`.

        Raises:
            CheckpointError: Naming the file: there is no checkpoint, its save was never finished, its manifest is
                damaged or of another version, or a shard is missing, truncated or no regular file.
        """
        self.path = committed(path)
        self._manifest = _read_manifest(self.path)
        self.document: dict[str, Any] = self._manifest.document
        self._files = self._manifest.contents.files
        self._handles: dict[int, Any] = {}
        for file in self._files:
            size = _size(self.path / file.name)
            if size != file.num_bytes:
                raise CheckpointError(f"'{self.path / file.name}' has {size} bytes instead of {file.num_bytes}")
        self._expected: list[list[tuple[str, Rect]]] = [[] for _ in self._files]
        for name, entry in self._manifest.contents.tensors.items():
            for index, rect in entry.pieces:
                self._expected[index].append((name, rect))

    def names(self) -> list[str]:
        """The logical tensors, in alphabetical order."""
        return list(self._manifest.contents.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """The whole logical tensor's."""
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """As it was written."""
        return self._entry(name).dtype

    def read(self, name: str, rect: Rect | None = None) -> torch.Tensor:
        """A rectangle of a logical tensor, assembled from all pieces that overlap it.

        Args:
            name: One of `names()`.
            rect: `(r0, r1, c0, c1)` in the 2-D view `(prod(shape[:-1]), shape[-1])`; None is all of it.

        Returns:
            `(r1 - r0, c1 - c0)`, contiguous, on the CPU, in memory of its own.

        Raises:
            CheckpointError: There is no such tensor or rectangle, or a shard is not the one the manifest speaks of.
        """
        entry = self._entry(name)
        rows, cols = view_2d(entry.shape)
        r0, r1, c0, c1 = rect = (0, rows, 0, cols) if rect is None else rect
        check_rect(name, entry.shape, rect)
        out = torch.empty(r1 - r0, c1 - c0, dtype=entry.dtype)
        for index, piece in entry.pieces:
            top, bottom = max(r0, piece[0]), min(r1, piece[1])
            left, right = max(c0, piece[2]), min(c1, piece[3])
            if top < bottom and left < right:
                stored = self._open(index).get_slice(key(name, piece))
                part = stored[top - piece[0] : bottom - piece[0], left - piece[2] : right - piece[2]]
                out[top - r0 : bottom - r0, left - c0 : right - c0] = part
        return out

    def verify(self, group: dist.ProcessGroup | None = None) -> None:
        """Read all shards and compare them with the manifest: call it before the first state is touched.

        Args:
            group: None: this process checks all of them, alone. A group: collective, each rank checks its share, and a
                failure on any is the same error on all.

        Raises:
            CheckpointError: Naming the file that is damaged or that belongs to another save.
        """
        if group is None:
            for index in range(len(self._files)):
                self._verify(index)
            return
        ranks = Ranks(group)
        with ranks.together():
            for index in range(ranks.rank, len(self._files), ranks.size):
                self._verify(index)

    def close(self) -> None:
        """Let go of the files."""
        self._handles.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _entry(self, name: str) -> Entry:
        tensors = self._manifest.contents.tensors
        if name not in tensors:
            close = get_close_matches(name, tensors, 1)
            hint = f"; did you mean '{close[0]}'?" if close else ""
            raise CheckpointError(f"'{self.path}' has no tensor '{name}'{hint}")
        return tensors[name]

    def _verify(self, index: int) -> None:
        self._open(index)
        path = self.path / self._files[index].name
        try:
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise CheckpointError(f"'{path}' cannot be read: {error}") from error
        if digest != self._files[index].sha256:
            raise CheckpointError(f"'{path}' is damaged: its sha256 is not that in {MANIFEST}; use another checkpoint")

    def _open(self, index: int) -> Any:
        """A shard, whose header has been compared with the manifest."""
        if index in self._handles:
            return self._handles[index]
        path = self.path / self._files[index].name
        try:
            handle = safe_open(path, framework="pt", device="cpu")
            save = (handle.metadata() or {}).get("save")
            if save != self._manifest.save:
                raise CheckpointError(
                    f"'{path}' belongs to the save {save}, {MANIFEST} to the save {self._manifest.save}: "
                    "files of two checkpoints are mixed"
                )
            for name, rect in self._expected[index]:
                stored = handle.get_slice(key(name, rect))
                expected = (DTYPES[self.dtype(name)], [rect[1] - rect[0], rect[3] - rect[2]])
                if (stored.get_dtype(), stored.get_shape()) != expected:
                    raise CheckpointError(
                        f"'{path}' holds {stored.get_dtype()} {stored.get_shape()} as '{key(name, rect)}', "
                        f"{MANIFEST} says {expected[0]} {expected[1]}"
                    )
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"'{path}' is damaged or not the shard that was written: {error}") from error
        self._handles[index] = handle
        return handle


def latest(directory: str | os.PathLike[str]) -> Path | None:
    """The newest valid checkpoint among the children `step-<n>` of a directory; None if there is none.

    Valid means committed, with a manifest that parses and shards of the right sizes. `Reader.verify` knows more.
    The path ends in `step-<n>.old-…` where the overwriting of a checkpoint was killed between its two renames.
    """
    return next((path for _, path in _valid(Path(directory))), None)


def prune(directory: str | os.PathLike[str], keep: int) -> None:
    """Delete all but the newest `keep` valid checkpoints `step-<n>`, and what killed saves of older steps have left.

    Deletes nothing that it does not recognise: a directory with a file that `write` did not write, and a checkpoint
    that is not valid, are left to the user. Call it on one rank, when no save of an older step is under way.

    Raises:
        ValueError: `keep` is less than 1.
    """
    if keep < 1:
        raise ValueError(f"keep={keep}: at least one checkpoint has to be kept")
    directory = Path(directory)
    valid = list(_valid(directory))
    for _, path in valid[keep:]:
        if foreign_entry(path) is None:
            discard(path)
    newest = valid[0][0] if valid else -1
    whole = {path.name for _, path in valid}
    for step, path in _steps(directory):
        name, kind = split_name(path.name)
        if (kind == "tmp" and step < newest) or (kind == "old" and name in whole):
            discard(path)


def _read_manifest(path: Path) -> Manifest:
    file = path / MANIFEST
    if not path.is_dir():
        raise CheckpointError(f"'{path}': there is no checkpoint directory here")
    if not os.path.lexists(file):
        raise CheckpointError(f"'{path}' has no {MANIFEST}: it is not a checkpoint, or its save was never finished")
    if _size(file) > MAX_BYTES:
        raise CheckpointError(f"'{file}' is larger than {MAX_BYTES} bytes")
    try:
        return parse(file.read_bytes())
    except (CheckpointError, OSError) as error:
        raise CheckpointError(f"'{file}' cannot be used: {error}") from error


def _size(file: Path) -> int:
    """Bytes of a regular file; links and devices are refused, because following them leaves the checkpoint."""
    try:
        status = os.lstat(file)
    except OSError as error:
        raise CheckpointError(f"'{file}' is missing: {error}") from error
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"'{file}' is not a regular file")
    return status.st_size


def _valid(directory: Path) -> Iterator[tuple[int, Path]]:
    """The valid checkpoints and their steps, newest first, each step once."""
    last = -1
    for step, path in sorted(_steps(directory), key=lambda item: (-item[0], split_name(item[1].name)[1])):
        if split_name(path.name)[1] == "tmp" or step == last:
            continue
        try:
            Reader(path).close()
        except CheckpointError:
            continue
        last = step
        yield step, path


def _steps(directory: Path) -> list[tuple[int, Path]]:
    """The directories `step-<n>` and those that a killed save has left beside them."""
    if not directory.is_dir():
        return []
    with os.scandir(directory) as entries:
        found = [(_STEP.fullmatch(split_name(entry.name)[0]), entry) for entry in entries]
        return [
            (int(match[1]), Path(entry.path)) for match, entry in found if match and entry.is_dir(follow_symlinks=False)
        ]
