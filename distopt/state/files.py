"""Writing a native checkpoint: every rank its own shards, rank 0 the manifest, and one rename that makes it real.

Where `path` is the checkpoint, three kinds of directory exist beside it while it is being written:

    path.tmp-<save>   being written, or being deleted. Never offered to a reader; safe to delete.
    path              committed.
    path.old-<save>   the previous checkpoint of that name, moved aside for the instant between two renames. While there
                      is no `path` it *is* the checkpoint (`committed` finds it), and afterwards it is deleted.

So a process killed at any moment leaves the previous checkpoint or the new one readable.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import warnings
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file

from distopt.state.agreement import Ranks
from distopt.state.manifest import (
    DTYPES,
    FORMAT,
    MANIFEST,
    SHARD,
    CheckpointError,
    Contents,
    Entry,
    Manifest,
    Rect,
    ShardFile,
    area,
    check_json,
    check_rect,
    check_tensor,
    contents_from_json,
    contents_to_json,
    encode,
    key,
    merge,
)

# A rank's shard is written when this much is waiting, which bounds the host memory that a save needs. The number of
# pieces is bounded too, because safetensors refuses headers over 100 MB.
SHARD_BYTES = 1 << 30
SHARD_PIECES = 1 << 15

_SIDELINED = re.compile(r"(?P<name>.+)\.(?P<kind>tmp|old)-[0-9a-f]{16}")


@dataclass(frozen=True)
class Piece:
    """A rectangle of a named logical tensor, held by this rank.

    Attributes:
        name: Of the logical tensor, such as `"state/layers.0.mlp.up.weight/exp_avg"`.
        shape: The whole logical tensor's.
        rect: `(r0, r1, c0, c1)` in the 2-D view `(prod(shape[:-1]), shape[-1])`, which is `(1, n)` for a vector and
            `(1, 1)` for a scalar. An empty rectangle is allowed: it says that the tensor exists.
        tensor: `(r1 - r0, c1 - c0)`, of any dtype in `manifest.DTYPES`, any strides, on any device.
    """

    name: str
    shape: tuple[int, ...]
    rect: Rect
    tensor: torch.Tensor


def write(
    path: str | os.PathLike[str],
    pieces: Iterable[Piece],
    document: Mapping[str, Any],
    *,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Write a checkpoint. Collective: every rank of `group` calls it with the pieces that it holds.

    A checkpoint that is already at `path` is replaced in one step. On an error, on any rank, it is untouched and what
    was written so far is removed.

    Args:
        path: The directory to make, on a file system that all ranks share. Its parents are made where they are missing.
        pieces: This rank's, each held by one rank only (of equal rectangles on several ranks the lowest rank's is
            kept, and the others' are written in vain). Together the ranks' pieces must cover every tensor. Consumed to
            its end even after a failed write, so that a generator may be collective; its tensors must not change before
            `write` returns.
        document: Any JSON of str keys and finite numbers. Rank 0's is written. Tuples come back as lists.
        group: None is the default group where torch.distributed is initialised, else this process alone.

    Raises:
        CheckpointError: On every rank with the same text: a bad piece or document, a tensor that is not covered, a disk
            that is full or read-only, a `path` that is no checkpoint, a rank that died.
    """
    path = Path(os.path.abspath(path))
    ranks = Ranks(group)
    save = ranks.all_gather(secrets.token_hex(8))[0]
    temporary = path.with_name(f"{path.name}.tmp-{save}")
    try:
        with ranks.together():
            if ranks.rank == 0:
                check_json(dict(document))
                _make_room(path)
                os.mkdir(temporary, 0o700)
        with ranks.together():
            part = _write_shards(temporary, ranks.rank, save, pieces)
        parts = ranks.gather(contents_to_json(part))
        with ranks.together():
            if ranks.rank == 0:
                contents = merge([contents_from_json(**each) for each in parts])
                _drop_unused(temporary, contents)
                _write_manifest(temporary, Manifest(save, dict(document), contents))
                _commit(temporary, path)
    except BaseException:  # also KeyboardInterrupt, and SystemExit out of a handler of SIGTERM
        if ranks.rank == 0:
            discard(temporary)
        raise


def check_writable(directory: str | os.PathLike[str]) -> None:
    """Find out at start-up, not after the first hours, that checkpoints cannot be written to `directory`.

    Makes the directory where it is missing, and makes, renames and removes a small file in it. Not collective.

    Raises:
        CheckpointError: The directory is a symbolic link, or it or its file system cannot be written.
    """
    directory = Path(os.path.abspath(directory))
    if directory.is_symlink():
        raise CheckpointError(f"'{directory}' is a symbolic link; give the directory itself: '{directory.resolve()}'")
    probe = directory / f"probe.tmp-{secrets.token_hex(8)}"
    try:
        _make_directories(directory)
        os.mkdir(probe, 0o700)
        try:
            with open(probe / "probe", "wb") as file:
                file.write(bytes(4096))
                os.fsync(file.fileno())
        finally:
            discard(probe)
    except OSError as error:
        raise CheckpointError(
            f"checkpoints cannot be written to '{directory}': {error}; choose a writable directory"
        ) from error


def committed(path: str | os.PathLike[str]) -> Path:
    """Where the checkpoint called `path` lies: there, or aside if an overwrite was killed between its two renames."""
    path = Path(path)
    aside = _sidelined(path, "old") if not os.path.lexists(path) else []
    return aside[0] if len(aside) == 1 else path


def split_name(name: str) -> tuple[str, str]:
    """`("step-7", "tmp")` for `"step-7.tmp-0123456789abcdef"`, and `(name, "")` for a name without such an ending."""
    match = _SIDELINED.fullmatch(name)
    return (match["name"], match["kind"]) if match else (name, "")


def foreign_entry(directory: Path) -> str | None:
    """The name of something in a checkpoint directory that was not written by `write`; None if there is nothing."""
    with os.scandir(directory) as entries:
        for entry in entries:
            ours = entry.name == MANIFEST or SHARD.fullmatch(entry.name)
            if not ours or not entry.is_file(follow_symlinks=False):
                return entry.name
    return None


def discard(directory: Path) -> None:
    """Delete a checkpoint directory, which no reader is offered from the first moment on. What fails is a warning."""
    try:
        name, kind = split_name(directory.name)
        if kind != "tmp":
            doomed = directory.with_name(f"{name}.tmp-{secrets.token_hex(8)}")
            os.rename(directory, doomed)
            directory = doomed
        for entry in os.listdir(directory):
            os.unlink(directory / entry)
        os.rmdir(directory)
    except FileNotFoundError:  # another rank or process was faster
        pass
    except OSError as error:
        warnings.warn(f"'{directory}' could not be removed ({error}); remove it by hand", stacklevel=2)


def _make_room(path: Path) -> None:
    """Check the target, make its parents, and clear what killed saves of the same name have left."""
    if split_name(path.name)[1]:
        raise CheckpointError(f"'{path}' has the name of a temporary directory; choose another name")
    if path.is_symlink():
        raise CheckpointError(f"'{path}' is a symbolic link; give the path of the directory itself")
    if path.exists():
        if not path.is_dir():
            raise CheckpointError(f"'{path}' is a file; a checkpoint is a directory")
        foreign = foreign_entry(path)
        if foreign is not None:
            raise CheckpointError(
                f"'{path}' contains '{foreign}', which is not of a checkpoint and would be lost; move it away or "
                "choose another path"
            )
    _make_directories(path.parent)
    for leftover in _sidelined(path, "tmp"):
        discard(leftover)


def _write_shards(temporary: Path, rank: int, save: str, pieces: Iterable[Piece]) -> Contents:
    shards = _Shards(temporary, rank, save)
    failure: Exception | None = None
    for piece in pieces:
        if failure is None:
            try:
                shards.add(piece)
            except Exception as error:  # raised below: other ranks may be in a collective of the generator
                failure = error
    if failure is not None:
        raise failure
    shards.flush()
    return shards.contents


class _Shards:
    """The shards of one rank, written as pieces come in."""

    def __init__(self, directory: Path, rank: int, save: str) -> None:
        self.contents = Contents([], {})
        self._directory = directory
        self._rank = rank
        self._save = save
        self._waiting: dict[str, torch.Tensor] = {}
        self._storages: set[int] = set()
        self._bytes = 0

    def add(self, piece: Piece) -> None:
        """Note a piece, and write a shard if enough of them are waiting."""
        _check_piece(piece)
        entry = self.contents.tensors.setdefault(piece.name, Entry(tuple(piece.shape), piece.tensor.dtype, []))
        if (entry.shape, entry.dtype) != (tuple(piece.shape), piece.tensor.dtype):
            raise CheckpointError(
                f"'{piece.name}' is {entry.dtype} {entry.shape} in one piece and {piece.tensor.dtype} "
                f"{tuple(piece.shape)} in another"
            )
        if area(piece.rect) == 0:
            return
        if any(rect == piece.rect for _, rect in entry.pieces):
            raise CheckpointError(f"'{piece.name}': the rectangle {piece.rect} comes twice on one rank")
        host = piece.tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
        # safetensors refuses tensors that share memory, which views of one slab do.
        if host.untyped_storage().data_ptr() in self._storages:
            host = host.clone()
        self._storages.add(host.untyped_storage().data_ptr())
        self._waiting[key(piece.name, piece.rect)] = host
        entry.pieces.append((len(self.contents.files), piece.rect))
        self._bytes += host.nbytes
        if self._bytes >= SHARD_BYTES or len(self._waiting) >= SHARD_PIECES:
            self.flush()

    def flush(self) -> None:
        """Write what is waiting."""
        if not self._waiting:
            return
        file = self._directory / f"rank-{self._rank:05d}-{len(self.contents.files):04d}.safetensors"
        try:
            save_file(self._waiting, file, metadata={"format": FORMAT, "save": self._save})
        except SafetensorError as error:
            raise CheckpointError(f"'{file}' cannot be written: {error}{_explain_absence(self._directory)}") from error
        os.chmod(file, 0o600)
        # Both let go of the interpreter lock: together they take as long as the slower one.
        with open(file, "rb") as written, ThreadPoolExecutor(1) as pool:
            synced = pool.submit(os.fsync, written.fileno())
            digest = hashlib.file_digest(written, "sha256").hexdigest()
            synced.result()
            self.contents.files.append(ShardFile(file.name, os.fstat(written.fileno()).st_size, digest))
        self._waiting, self._storages, self._bytes = {}, set(), 0


def _check_piece(piece: Piece) -> None:
    check_tensor(piece.name, piece.shape)
    check_rect(piece.name, piece.shape, piece.rect)
    tensor = piece.tensor
    r0, r1, c0, c1 = piece.rect
    if tuple(tensor.shape) != (r1 - r0, c1 - c0):
        raise CheckpointError(f"'{piece.name}': a tensor of shape {tuple(tensor.shape)} for the rectangle {piece.rect}")
    if tensor.dtype not in DTYPES or tensor.layout != torch.strided or tensor.is_meta:
        raise CheckpointError(
            f"'{piece.name}': a {tensor.layout} tensor of {tensor.dtype} on {tensor.device.type} has no place in a "
            f"safetensors file; dense tensors of {', '.join(str(dtype) for dtype in DTYPES)} have"
        )


def _explain_absence(directory: Path) -> str:
    if directory.exists():
        return ""
    return "; the directory is gone: do all ranks share this file system, and does only one run save to this path?"


def _drop_unused(temporary: Path, contents: Contents) -> None:
    """Remove shards of which every piece was also written by a lower rank."""
    listed = {file.name for file in contents.files}
    for name in os.listdir(temporary):
        if name not in listed:
            os.unlink(temporary / name)


def _write_manifest(temporary: Path, manifest: Manifest) -> None:
    data = encode(manifest)
    descriptor = os.open(temporary / MANIFEST, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(descriptor)
    _sync_directory(temporary)


def _commit(temporary: Path, path: Path) -> None:
    """Put the temporary directory in the place of `path`, and delete what was there."""
    # There is never more than one set aside while `path` is missing, or nobody could tell which is the newer.
    if path.exists():
        for leftover in _sidelined(path, "old"):
            discard(leftover)
    aside = path.with_name(temporary.name.replace(".tmp-", ".old-"))
    try:
        if path.exists():
            os.rename(path, aside)
        os.rename(temporary, path)
    except BaseException:
        if aside.exists() and not path.exists():
            os.rename(aside, path)
        raise
    _sync_directory(path.parent)
    for leftover in _sidelined(path, "old"):
        discard(leftover)


def _sidelined(path: Path, kind: str) -> list[Path]:
    """The directories of one kind, `tmp` or `old`, that belong to `path`."""
    if not path.parent.is_dir():
        return []
    return [path.with_name(name) for name in os.listdir(path.parent) if split_name(name) == (path.name, kind)]


def _make_directories(directory: Path) -> None:
    missing = [each for each in (directory, *directory.parents) if not each.exists()]
    for each in reversed(missing):
        each.mkdir(mode=0o700, exist_ok=True)
        _sync_directory(each.parent)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
