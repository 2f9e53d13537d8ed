"""The step of elementwise rules on a GPU: one launch over a table of tensors.

Each program takes some tiles of one tensor: loads, decodes, scales the gradient by a coefficient in device memory, steps,
encodes with the scales of the tiles, stores. One driver for all: the rule, the codecs of its states and the storage of weights
are functions that it is compiled with, so that rules and codecs add up and do not multiply.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from distopt.kernels.jobs import STARTS, WIDTH, CodedKernel, Table
from distopt.kernels.jobs import TILES as COLUMN_TILES
from distopt.kernels.triton_codecs import CODECS, FLOOR, WEIGHTS, random_bits, widen
from distopt.kernels.triton_rules import RULES
from distopt.plan.tiles import BLOCK

TILES = 8
"""Tiles per program: 1,024 elements, 8 per thread."""


@triton.jit
def pointer(row, COLUMN: tl.constexpr, DTYPE: tl.constexpr):
    return tl.load(row + COLUMN).to(tl.pointer_type(DTYPE))


@triton.jit
def _half_bytes(row, index, COLUMN: tl.constexpr):
    """Words of 32 bits that have these codes of 4 bits, and by how much they are shifted there."""
    place = tl.load(row + COLUMN) + index
    return ((place >> 3) << 2).to(tl.pointer_type(tl.int32)), ((place & 7) << 2).to(tl.int32)


@triton.jit
def _whole_bytes(row, tile, COLUMN: tl.constexpr, SPAN: tl.constexpr):
    """Bytes of the codes of 4 bits of whole tiles."""
    first = (tl.load(row + COLUMN) >> 1).to(tl.pointer_type(tl.uint8))
    return first + (tile.to(tl.int64) * (SPAN // 2))[:, None] + tl.arange(0, SPAN // 2)[None, :]


@triton.jit
def load_state(row, index, tile, mask, inside, COLUMN: tl.constexpr, DTYPE: tl.constexpr, DECODE: tl.constexpr,
               SCALED: tl.constexpr, PACKED: tl.constexpr, RAGGED: tl.constexpr, SPAN: tl.constexpr):  # fmt: skip
    if PACKED and RAGGED:
        word, shift = _half_bytes(row, index, COLUMN)
        code = (tl.load(word, mask=mask, other=0) >> shift) & 15
    elif PACKED:
        both = tl.load(_whole_bytes(row, tile, COLUMN, SPAN), mask=inside[:, None], other=0)
        code = tl.interleave(both & 15, both >> 4)
    else:
        code = tl.load(pointer(row, COLUMN, DTYPE) + index, mask=mask, other=0)
    if SCALED:
        scale = tl.load(pointer(row, COLUMN + 1, tl.float32) + tile, mask=inside, other=0.0)
        return DECODE(code, scale[:, None])
    else:
        return DECODE(code, 0.0)


@triton.jit
def store_state(x, row, index, tile, mask, inside, COLUMN: tl.constexpr, DTYPE: tl.constexpr, ENCODE: tl.constexpr,
                SCALED: tl.constexpr, STOCHASTIC: tl.constexpr, PACKED: tl.constexpr, RAGGED: tl.constexpr,
                AGREED: tl.constexpr, LOOK: tl.constexpr, KEY: tl.constexpr, FIRSTS: tl.constexpr,
                COUNT: tl.constexpr, SPAN: tl.constexpr):  # fmt: skip
    scale = tl.zeros_like(tile).to(tl.float32)
    if SCALED:
        largest = tl.max(tl.where(mask, tl.abs(x), 0.0), axis=1)
        if LOOK:
            tl.store(pointer(row, COLUMN + 2, tl.float32) + tile, largest, mask=inside)
        scale = tl.maximum(largest, FLOOR)
        if AGREED:
            scale = tl.maximum(scale, tl.load(pointer(row, COLUMN + 2, tl.float32) + tile, mask=inside, other=0.0))
        if not LOOK:
            tl.store(pointer(row, COLUMN + 1, tl.float32) + tile, scale, mask=inside)
    if not LOOK:
        noise = tl.zeros_like(index).to(tl.int32)
        if STOCHASTIC:
            firsts = tl.load(pointer(row, FIRSTS, tl.int64) + tile, mask=inside, other=0)
            noise = random_bits(firsts[:, None] + tl.arange(0, SPAN)[None, :], tl.load(row + KEY))
        code = ENCODE(x, scale[:, None], noise)
        if PACKED and RAGGED:  # neighbouring tiles may share a byte: each changes its own bits only
            word, shift = _half_bytes(row, index, COLUMN)
            old = (tl.load(word, mask=mask, other=0) >> shift) & 15
            tl.atomic_xor(word, (old ^ code) << shift, mask=mask, sem="relaxed")
        elif PACKED:
            low, high = tl.split(tl.reshape(code, (COUNT, SPAN // 2, 2)))
            tl.store(_whole_bytes(row, tile, COLUMN, SPAN), (low | (high << 4)).to(tl.uint8), mask=inside[:, None])
        else:
            tl.store(pointer(row, COLUMN, DTYPE) + index, code, mask=mask)


@triton.jit
def find_tiles(rows, programs, RAGGED: tl.constexpr, COLUMNS: tl.constexpr, COUNT: tl.constexpr, SPAN: tl.constexpr):
    """The row of this program, its tiles and their elements; which of these there are."""
    program = tl.program_id(0)
    row = rows + tl.load(programs + 2 * program).to(tl.int64) * COLUMNS
    tile = tl.load(programs + 2 * program + 1) + tl.arange(0, COUNT)
    inside = tile < tl.load(row + 3)
    if RAGGED:
        starts = pointer(row, 2, tl.int64)
        origin = tl.load(starts)
        start = tl.load(starts + tile, mask=inside, other=0) - origin
        stop = tl.load(starts + tile + 1, mask=inside, other=0) - origin
    else:
        start = tile.to(tl.int64) * SPAN
        stop = start + SPAN
    index = start[:, None] + tl.arange(0, SPAN)[None, :]
    return row, tile, inside, index, inside[:, None] & (index < stop[:, None])


@triton.jit
def step_kernel(rows, programs, coefficient, taken, s0, s1, s2, s3, s4, s5, s6,
                RULE: tl.constexpr, STATES: tl.constexpr,
                WEIGHT: tl.constexpr, REST: tl.constexpr, JOIN: tl.constexpr, SPLIT: tl.constexpr, GRAD: tl.constexpr,
                CODE_A: tl.constexpr, DECODE_A: tl.constexpr, ENCODE_A: tl.constexpr, SCALED_A: tl.constexpr,
                STOCHASTIC_A: tl.constexpr, PACKED_A: tl.constexpr,
                CODE_B: tl.constexpr, DECODE_B: tl.constexpr, ENCODE_B: tl.constexpr, SCALED_B: tl.constexpr,
                STOCHASTIC_B: tl.constexpr, PACKED_B: tl.constexpr,
                RAGGED: tl.constexpr, AGREED: tl.constexpr, LOOK: tl.constexpr,
                COLUMNS: tl.constexpr, COUNT: tl.constexpr, SPAN: tl.constexpr):  # fmt: skip
    """See the module; COLUMNS is the width of a row, COUNT the tiles of a program, SPAN the elements of a tile. Nothing is
    written where the byte `taken` is 0."""
    row, tile, inside, index, mask = find_tiles(rows, programs, RAGGED, COLUMNS, COUNT, SPAN)
    param = tl.load(pointer(row, 0, WEIGHT) + index, mask=mask, other=0)
    rest = param
    if REST is not None:
        rest = tl.load(pointer(row, 11, REST) + index, mask=mask, other=0)
    w = JOIN(param, rest)
    g = tl.load(pointer(row, 1, GRAD) + index, mask=mask, other=0)
    if tl.int16 == GRAD:
        g = widen(g)
    g = g.to(tl.float32) * tl.load(coefficient)

    a = load_state(row, index, tile, mask, inside, 5, CODE_A, DECODE_A, SCALED_A, PACKED_A, RAGGED, SPAN)
    b = a
    if STATES > 1:
        b = load_state(row, index, tile, mask, inside, 8, CODE_B, DECODE_B, SCALED_B, PACKED_B, RAGGED, SPAN)
    w, a, b = RULE(w, g, a, b, s0, s1, s2, s3, s4, s5, s6)
    inside = tile < tl.load(row + 3) * tl.load(taken)
    mask = inside[:, None] & mask
    store_state(a, row, index, tile, mask, inside, 5, CODE_A, ENCODE_A, SCALED_A, STOCHASTIC_A, PACKED_A, RAGGED,
                AGREED, LOOK, 13, 12, COUNT, SPAN)  # fmt: skip
    if STATES > 1:
        store_state(b, row, index, tile, mask, inside, 8, CODE_B, ENCODE_B, SCALED_B, STOCHASTIC_B, PACKED_B, RAGGED,
                    AGREED, LOOK, 14, 12, COUNT, SPAN)  # fmt: skip
    if not LOOK:
        param, rest = SPLIT(w, REST)
        tl.store(pointer(row, 0, WEIGHT) + index, param, mask=mask)
        if REST is not None:
            tl.store(pointer(row, 11, REST) + index, rest, mask=mask)


def options(
    rule: str, codecs: Sequence[tuple[str, bool]], weight: str, rest: str | None, grad: str
) -> dict[str, Any] | None:
    """What the driver is compiled with for a rule, the codecs of its states (class, signed), and the dtypes of weights, of
    what they lack of fp32 and of gradients; None where there is a part that is not written in Triton."""
    states, stored = [CODECS.get(codec) for codec in codecs], WEIGHTS.get((weight, rest))
    grads = {"float32": tl.float32, "bfloat16": tl.int16, "float16": tl.float16}.get(grad)
    if rule not in RULES or None in states or stored is None or grads is None:
        return None
    found: dict[str, Any] = {"RULE": RULES[rule], "STATES": len(states), "GRAD": grads}
    found |= {"WEIGHT": stored.dtype, "REST": stored.rest, "JOIN": stored.join, "SPLIT": stored.split}
    for letter, codec in zip("AB", (states * 2)[:2]):
        assert codec is not None
        found |= {f"CODE_{letter}": codec.dtype, f"DECODE_{letter}": codec.decode, f"ENCODE_{letter}": codec.encode}
        found |= {f"SCALED_{letter}": codec.scaled, f"STOCHASTIC_{letter}": codec.stochastic}
        found[f"PACKED_{letter}"] = codec.packed
    return found | {"COLUMNS": WIDTH, "COUNT": TILES, "SPAN": BLOCK}


@lru_cache(maxsize=1024)
def find(
    rule: str, codecs: tuple[tuple[str, bool], ...], weight: str, rest: str | None, grad: str
) -> CodedKernel | None:
    """The kernel for what `options` describes, if there is one."""
    chosen = options(rule, codecs, weight, rest, grad)
    if chosen is None:
        return None

    def launch(table: Table, scalars: tuple[float, ...], look: bool) -> None:
        factor = _ones(table.device)[0] if table.factor is None else table.factor
        for ragged, rows, programs in launches(table.rows, table.device):
            step_kernel[(len(programs),)](
                rows, programs, factor, flag(table.ok, table.device), *scalars, *[0.0] * (7 - len(scalars)), **chosen,
                RAGGED=ragged, AGREED=table.agreed and not look, LOOK=look, num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip

    return launch


def launches(rows: np.ndarray, device: torch.device) -> Iterator[tuple[bool, Tensor, Tensor]]:
    """What is launched for some rows: those whose tiles have any length (True), those that have whole tiles; with both, as
    far as there are any, the rows and their programs on the device."""
    ragged = rows[:, STARTS] != 0
    for kind, alike in ((True, rows[ragged]), (False, rows[~ragged])):
        if len(alike):
            given = torch.from_numpy(alike)
            if device.type == "cuda":  # without waiting for it
                given = given.pin_memory().to(device, non_blocking=True)
            yield kind, given, _programs(alike[:, COLUMN_TILES].tobytes(), device)


@lru_cache(maxsize=256)
def _programs(counts: bytes, device: torch.device) -> Tensor:
    """(job, first tile) of every program, from the int64 numbers of tiles of the jobs."""
    tiles = np.frombuffer(counts, np.int64)
    each = -(-tiles // TILES)
    jobs = np.repeat(np.arange(len(tiles)), each)
    first = np.arange(each.sum()) - np.repeat(np.cumsum(each) - each, each)
    return torch.from_numpy(np.stack([jobs, first * TILES], axis=1).astype(np.int32)).to(device)


def flag(ok: Tensor | None, device: torch.device) -> Tensor:
    """The byte that is 0 where a step is not taken, of `jobs.Table.ok`."""
    return _ones(device)[1] if ok is None else ok.view(torch.uint8)


@lru_cache(maxsize=16)
def _ones(device: torch.device) -> tuple[Tensor, Tensor]:
    """A gradient's coefficient, and the flag of a step that is taken."""
    return torch.ones((), device=device), torch.ones((), dtype=torch.uint8, device=device)
