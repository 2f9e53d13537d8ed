"""The manifest of a native checkpoint: what it says, how it is written, and the strict reading of it.

    {"format": "distopt checkpoint", "version": 1, "sha256": <of the body>, "body": {
        "save": <16 hex digits, also in the metadata of every shard>,
        "document": <the caller's JSON>,
        "files": [[<shard>, <bytes>, <sha256>], …],
        "tensors": {<name>: {"dtype": "float32", "shape": […], "pieces": [[<index of file>, r0, r1, c0, c1], …]}}}}

A tensor is cut in its 2-D view `(prod(shape[:-1]), shape[-1])`. Its pieces are rectangles of that, rows r0 to r1 and
columns c0 to c1: disjoint, not empty, together the whole. In its shard a piece is stored under `key(name, rect)`.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Rect = tuple[int, int, int, int]

FORMAT = "distopt checkpoint"
VERSION = 1
MANIFEST = "manifest.json"
SHARD = re.compile(r"rank-[0-9]{5,7}-[0-9]{4,6}\.safetensors")

# What no honest checkpoint reaches. They bound what a manifest made by somebody else can make a reader do.
MAX_BYTES = 1 << 28
MAX_COMMAS = 1 << 25
MAX_DEPTH = 64
MAX_NAME = 1024
MAX_NDIM = 32
MAX_ELEMENTS = 1 << 60

# Every dtype that safetensors writes and slices, with its code there.
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, which UTF-8 and so safetensors cannot write
_BY_NAME = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}


class CheckpointError(ValueError):
    """A checkpoint cannot be written, or what is on disk cannot be trusted. The message names the file."""


@dataclass(frozen=True)
class ShardFile:
    """A safetensors file of the checkpoint, by its name in the directory."""

    name: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Entry:
    """A logical tensor and where its pieces lie: `(index of the file, rectangle)`."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: list[tuple[int, Rect]]


@dataclass(frozen=True)
class Contents:
    """Files and the tensors in them: of one rank while a checkpoint is being written, of the checkpoint afterwards."""

    files: list[ShardFile]
    tensors: dict[str, Entry]


@dataclass(frozen=True)
class Manifest:
    """All that a checkpoint's manifest says."""

    save: str
    document: dict[str, Any]
    contents: Contents


def view_2d(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a logical tensor's 2-D view; `(1, n)` for a vector, `(1, 1)` for a scalar."""
    return (math.prod(shape[:-1]), shape[-1]) if shape else (1, 1)


def key(name: str, rect: Rect) -> str:
    """What a piece is called in its shard."""
    r0, r1, c0, c1 = rect
    return f"{name}[{r0}:{r1},{c0}:{c1}]"


def area(rect: Rect) -> int:
    """Number of elements of a rectangle."""
    r0, r1, c0, c1 = rect
    return (r1 - r0) * (c1 - c0)


def check_tensor(name: Any, shape: Any) -> None:
    """Refuse a name or a shape that a manifest may not hold.

    Raises:
        CheckpointError: Naming the tensor.
    """
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME or _SURROGATE.search(name):
        raise CheckpointError(f"{str(name)[:80]!r} is not a name of 1 to {MAX_NAME} characters")
    if len(shape) > MAX_NDIM or not all(type(size) is int and size >= 0 for size in shape):
        raise CheckpointError(f"'{name}': {list(shape)[:MAX_NDIM]} is not a shape of at most {MAX_NDIM} dims")
    if math.prod(shape) > MAX_ELEMENTS:
        raise CheckpointError(f"'{name}': shape {list(shape)} has more than {MAX_ELEMENTS} elements")


def check_rect(name: str, shape: Sequence[int], rect: Rect) -> None:
    """Refuse a rectangle that does not lie in the tensor's 2-D view.

    Raises:
        CheckpointError: Naming the tensor and the rectangle.
    """
    rows, cols = view_2d(shape)
    r0, r1, c0, c1 = rect
    if not (0 <= r0 <= r1 <= rows and 0 <= c0 <= c1 <= cols):
        raise CheckpointError(f"'{name}': rectangle {rect} is outside the 2-D view ({rows}, {cols}) of {tuple(shape)}")


def check_json(value: Any, where: str = "document", depth: int = 1) -> None:
    """Refuse what JSON would not give back as it was, tuples excepted (they come back as lists).

    Raises:
        CheckpointError: Naming the place, as in `document['schedule']['lr']`.
    """
    if depth > MAX_DEPTH:
        raise CheckpointError(f"{where[:80]}… is nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, Mapping):
        for name, item in value.items():
            if not isinstance(name, str):
                raise CheckpointError(f"{where}: the key {name!r} is a {type(name).__name__}; JSON keys are strings")
            check_json(item, f"{where}[{name!r}]", depth + 1)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            check_json(item, f"{where}[{index}]", depth + 1)
    elif isinstance(value, float) and not math.isfinite(value):
        raise CheckpointError(f"{where} is {value}, which JSON has no number for; write None or a string")
    elif not isinstance(value, str | int | float | None):
        raise CheckpointError(f"{where} is a {type(value).__name__}; use str, int, float, bool, None, list or dict")


def merge(parts: Sequence[Contents]) -> Contents:
    """The contents of a checkpoint out of what each rank wrote, in the order of ranks.

    A rectangle that several ranks wrote is taken from the first; a file of which nothing is left is not listed.

    Raises:
        CheckpointError: Two ranks differ about a tensor's shape or dtype, pieces overlap in another way, or a tensor is
            not covered; naming the tensor and the files.
    """
    files: list[ShardFile] = []
    tensors: dict[str, Entry] = {}
    first: dict[str, int] = {}
    taken: set[tuple[str, Rect]] = set()
    for rank, part in enumerate(parts):
        index: dict[int, int] = {}
        for name, entry in part.tensors.items():
            whole = tensors.setdefault(name, Entry(entry.shape, entry.dtype, []))
            before = first.setdefault(name, rank)
            if (whole.shape, whole.dtype) != (entry.shape, entry.dtype):
                raise CheckpointError(
                    f"'{name}' is {whole.dtype} {whole.shape} on rank {before}, "
                    f"but {entry.dtype} {entry.shape} on rank {rank}"
                )
            for file, rect in entry.pieces:
                if (name, rect) in taken:
                    continue
                taken.add((name, rect))
                if file not in index:
                    index[file] = len(files)
                    files.append(part.files[file])
                whole.pieces.append((index[file], rect))
    contents = Contents(files, dict(sorted(tensors.items())))
    check_cover(contents)
    return contents


def check_cover(contents: Contents) -> None:
    """Refuse pieces that are not disjoint or that leave a part of their tensor uncovered.

    Raises:
        CheckpointError: Naming the tensor, and for an overlap both rectangles and their files.
    """
    for name, entry in contents.tensors.items():
        overlap = _find_overlap([rect for _, rect in entry.pieces])
        if overlap is not None:
            (file, rect), (other_file, other) = (entry.pieces[index] for index in overlap)
            raise CheckpointError(
                f"'{name}': {rect} in {contents.files[file].name} overlaps {other} in {contents.files[other_file].name}"
            )
        covered = sum(area(rect) for _, rect in entry.pieces)
        if covered != math.prod(entry.shape):
            raise CheckpointError(
                f"'{name}': the pieces hold {covered} of the {math.prod(entry.shape)} elements of {entry.shape}; "
                "every rectangle of a tensor must be written by some rank"
            )


def contents_to_json(contents: Contents) -> dict[str, Any]:
    """As in the manifest's body."""
    return {
        "files": [[file.name, file.num_bytes, file.sha256] for file in contents.files],
        "tensors": {
            name: {
                "dtype": str(entry.dtype).removeprefix("torch."),
                "shape": list(entry.shape),
                "pieces": [[file, *rect] for file, rect in entry.pieces],
            }
            for name, entry in contents.tensors.items()
        },
    }


def contents_from_json(files: Any, tensors: Any) -> Contents:
    """The inverse of `contents_to_json`, which trusts nothing but covering: that is `check_cover`'s.

    Raises:
        CheckpointError: Naming the entry.
    """
    listed = [_shard_file(item) for item in _typed(files, list, "files")]
    if len({file.name for file in listed}) != len(listed):
        raise CheckpointError("a file is listed twice")
    free = [file.num_bytes for file in listed]
    entries = {}
    for name, item in _typed(tensors, dict, "tensors").items():
        dtype_name, shape, pieces = _fields(item, f"'{name}'", ("dtype", "shape", "pieces"))
        check_tensor(name, _typed(shape, list, f"'{name}': shape"))
        dtype = _BY_NAME.get(_typed(dtype_name, str, f"'{name}': dtype"))
        if dtype is None:
            raise CheckpointError(f"'{name}': unknown dtype '{dtype_name[:40]}'")
        placed = [_placed(name, shape, piece, len(listed)) for piece in _typed(pieces, list, f"'{name}': pieces")]
        for file, rect in placed:
            free[file] -= area(rect) * dtype.itemsize
            if free[file] < 0:
                raise CheckpointError(f"'{name}': {listed[file].name} is too short for the pieces it should hold")
        entries[name] = Entry(tuple(shape), dtype, placed)
    return Contents(listed, entries)


def encode(manifest: Manifest) -> bytes:
    """The text of manifest.json.

    Raises:
        CheckpointError: It would be longer than a reader accepts.
    """
    body = _dump({"save": manifest.save, "document": manifest.document, **contents_to_json(manifest.contents)})
    head = {"format": FORMAT, "version": VERSION, "sha256": hashlib.sha256(body.encode()).hexdigest()}
    data = f'{_dump(head)[:-1]},"body":{body}}}\n'.encode()
    if len(data) > MAX_BYTES or data.count(b",") > MAX_COMMAS:
        raise CheckpointError(
            f"{MANIFEST} would have {len(data)} bytes and {data.count(b',')} entries; the limits are {MAX_BYTES} and "
            f"{MAX_COMMAS}: write fewer, larger pieces and a smaller document"
        )
    return data


def parse(data: bytes) -> Manifest:
    """Read manifest.json, refusing all that `encode` would not have written.

    Raises:
        CheckpointError: Saying what is wrong; the caller knows the file.
    """
    if len(data) > MAX_BYTES or data.count(b",") > MAX_COMMAS:
        raise CheckpointError(f"it is larger than {MAX_BYTES} bytes or {MAX_COMMAS} entries")
    try:
        top = json.loads(data.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
        if not isinstance(top, dict) or top.get("format") != FORMAT:
            raise CheckpointError(f"its format is not '{FORMAT}'")
        if top.get("version") != VERSION:
            raise CheckpointError(
                f"it has version {str(top.get('version'))[:20]} of the format, this distopt reads version {VERSION}; "
                "load it with the distopt that wrote it"
            )
        _, _, digest, body = _fields(top, "the manifest", ("format", "version", "sha256", "body"))
        # Parsing and dumping again gives the text that was hashed: the encoder's output is canonical.
        if digest != hashlib.sha256(_dump(body).encode()).hexdigest():
            raise CheckpointError("its checksum does not match: the file was damaged or edited")
        save, document, files, tensors = _fields(body, "the body", ("save", "document", "files", "tensors"))
        if not re.fullmatch("[0-9a-f]{16}", _typed(save, str, "save")):
            raise CheckpointError(f"'{save[:40]}' is not the id of a save")
        check_json(_typed(document, dict, "document"))
        contents = contents_from_json(files, tensors)
        check_cover(contents)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested too deeply for the parser
        raise CheckpointError(f"it is not valid JSON: {error}") from error
    return Manifest(save, document, contents)


def _dump(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _find_overlap(rects: Sequence[Rect]) -> tuple[int, int] | None:
    """Two rectangles that overlap. A sweep over the rows, in which columns in use lie in order: n log n, not n²."""
    events = sorted(
        event
        for index, (r0, r1, _, _) in enumerate(rects)
        for event in ((r0, 1, index), (r1, 0, index))  # at one row, those that end make room for those that begin
    )
    active: list[tuple[int, int, int]] = []  # (c0, c1, index), disjoint
    for _, begins, index in events:
        c0, c1 = rects[index][2:]
        position = bisect.bisect_left(active, (c0, c1, index))
        if not begins:
            del active[position]
            continue
        for neighbour in active[max(0, position - 1) : position + 1]:
            if neighbour[0] < c1 and c0 < neighbour[1]:
                return neighbour[2], index
        active.insert(position, (c0, c1, index))
    return None


def _typed(value: Any, kind: type, what: str) -> Any:
    if type(value) is not kind:
        raise CheckpointError(f"{what} is a {type(value).__name__} where a {kind.__name__} belongs")
    return value


def _fields(value: Any, what: str, names: tuple[str, ...]) -> list[Any]:
    if set(_typed(value, dict, what)) != set(names):
        raise CheckpointError(f"{what} has the keys {sorted(value)[:8]} instead of {sorted(names)}")
    return [value[name] for name in names]


def _shard_file(item: Any) -> ShardFile:
    if len(_typed(item, list, "a file")) != 3:
        raise CheckpointError(f"a file has {len(item)} fields instead of name, bytes, sha256")
    name, num_bytes, digest = item
    # The pattern also shuts out "..", directories and absolute paths.
    if not SHARD.fullmatch(_typed(name, str, "a file's name")):
        raise CheckpointError(f"'{name[:80]}' is not the name of a shard, rank-00000-0000.safetensors")
    if type(num_bytes) is not int or num_bytes < 0:
        raise CheckpointError(f"{name}: {num_bytes!r} is not a size in bytes")
    if not re.fullmatch("[0-9a-f]{64}", _typed(digest, str, f"{name}: sha256")):
        raise CheckpointError(f"{name}: '{digest[:80]}' is not a sha256")
    return ShardFile(name, num_bytes, digest)


def _placed(name: str, shape: Sequence[int], piece: Any, num_files: int) -> tuple[int, Rect]:
    if len(_typed(piece, list, f"'{name}': a piece")) != 5 or not all(type(number) is int for number in piece):
        raise CheckpointError(f"'{name}': {str(piece)[:80]} is not a piece [file, r0, r1, c0, c1]")
    file, r0, r1, c0, c1 = piece
    if not 0 <= file < num_files:
        raise CheckpointError(f"'{name}': file {file} of {num_files}")
    rect = (r0, r1, c0, c1)
    check_rect(name, shape, rect)
    if area(rect) == 0:
        raise CheckpointError(f"'{name}': the piece {rect} is empty")
    return file, rect


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    items = dict(pairs)
    if len(items) != len(pairs):
        raise CheckpointError("it has a key twice in one object")
    return items


def _no_constant(text: str) -> None:
    raise CheckpointError(f"it contains {text}, which is not JSON")
