"""States and weights that rules see in fp32, read and written as they are stored: one launch for all of a codec.

The text of `state/codecs` and `state/master.py` is the reference.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from distopt.kernels.jobs import WIDTH
from distopt.kernels.triton_codecs import CODECS, WEIGHTS
from distopt.kernels.triton_step import TILES, find_tiles, flag, launches, load_state, pointer, store_state
from distopt.plan.tiles import BLOCK

SIZE = 1024
"""Elements of a program that joins or splits weights."""


@triton.jit
def read_kernel(rows, programs, CODE: tl.constexpr, DECODE: tl.constexpr, SCALED: tl.constexpr, PACKED: tl.constexpr,
                RAGGED: tl.constexpr, COLUMNS: tl.constexpr, COUNT: tl.constexpr, SPAN: tl.constexpr):  # fmt: skip
    """Decodes the first state of each row into the fp32 numbers where else the weights are."""
    row, tile, inside, index, mask = find_tiles(rows, programs, RAGGED, COLUMNS, COUNT, SPAN)
    x = load_state(row, index, tile, mask, inside, 5, CODE, DECODE, SCALED, PACKED, RAGGED, SPAN)
    tl.store(pointer(row, 0, tl.float32) + index, x, mask=mask)


@triton.jit
def write_kernel(rows, programs, taken, CODE: tl.constexpr, ENCODE: tl.constexpr, SCALED: tl.constexpr,
                 STOCHASTIC: tl.constexpr, PACKED: tl.constexpr, RAGGED: tl.constexpr, AGREED: tl.constexpr,
                 LOOK: tl.constexpr, COLUMNS: tl.constexpr, COUNT: tl.constexpr, SPAN: tl.constexpr):  # fmt: skip
    """The reverse, where the byte `taken` is not 0."""
    row, tile, inside, index, mask = find_tiles(rows, programs, RAGGED, COLUMNS, COUNT, SPAN)
    inside = tile < tl.load(row + 3) * tl.load(taken)
    mask = inside[:, None] & mask
    x = tl.load(pointer(row, 0, tl.float32) + index, mask=mask, other=0.0)
    store_state(x, row, index, tile, mask, inside, 5, CODE, ENCODE, SCALED, STOCHASTIC, PACKED, RAGGED, AGREED, LOOK,
                13, 12, COUNT, SPAN)  # fmt: skip


@triton.jit
def join_kernel(param, rest, x, numel, JOIN: tl.constexpr, COUNT: tl.constexpr):
    """fp32 weights of parameters and what these lack; bfloat16 as int16."""
    at = tl.program_id(0).to(tl.int64) * COUNT + tl.arange(0, COUNT)
    mask = at < numel
    tl.store(x + at, JOIN(tl.load(param + at, mask=mask, other=0), tl.load(rest + at, mask=mask, other=0)), mask=mask)


@triton.jit
def split_kernel(x, param, rest, taken, numel, SPLIT: tl.constexpr, COUNT: tl.constexpr):
    """The reverse, where the byte `taken` is not 0."""
    at = tl.program_id(0).to(tl.int64) * COUNT + tl.arange(0, COUNT)
    mask = at < numel * tl.load(taken)
    low, high = SPLIT(tl.load(x + at, mask=mask, other=0.0), rest.dtype.element_ty)
    tl.store(param + at, low, mask=mask)
    tl.store(rest + at, high, mask=mask)


def options(codec: str, *, signed: bool, write: bool) -> dict[str, Any]:
    """What a kernel is compiled with for a codec, by the name of its class."""
    written = CODECS[codec, signed]
    found: dict[str, Any] = {"CODE": written.dtype, "SCALED": written.scaled, "PACKED": written.packed}
    found |= {"ENCODE": written.encode, "STOCHASTIC": written.stochastic} if write else {"DECODE": written.decode}
    return found | {"COLUMNS": WIDTH, "COUNT": TILES, "SPAN": BLOCK}


def read(codec: str, signed: bool, rows: np.ndarray, device: torch.device) -> None:
    """Decode the states of these rows (`jobs`), each into the fp32 numbers at its weights' address."""
    chosen = options(codec, signed=signed, write=False)
    for ragged, given, programs in launches(rows, device):
        read_kernel[(len(programs),)](given, programs, **chosen, RAGGED=ragged, num_warps=4, enable_fp_fusion=False)


def write(
    codec: str,
    signed: bool,
    rows: np.ndarray,
    device: torch.device,
    ok: Tensor | None = None,
    *,
    agreed: bool,
    look: bool,
) -> None:
    """Encode the states of these rows from the fp32 numbers at their weights' addresses; with scales that are `agreed`, or
    only to `look` at the maxima of tiles. Unless `ok` (0-D, bool, on the device; None: it does) holds, all stays as it is."""
    chosen = options(codec, signed=signed, write=True)
    for ragged, given, programs in launches(rows, device):
        write_kernel[(len(programs),)](
            given, programs, flag(ok, device), **chosen, RAGGED=ragged, AGREED=agreed, LOOK=look,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


def join(param: Tensor, rest: Tensor) -> Tensor:
    """fp32 weights of a flat parameter and what it lacks of them."""
    x = torch.empty(param.numel(), device=param.device)
    if numel := x.numel():
        join_kernel[(triton.cdiv(numel, SIZE),)](
            _bits(param), rest, x, numel, JOIN=_stored(param, rest).join, COUNT=SIZE, enable_fp_fusion=False
        )
    return x


def split(x: Tensor, param: Tensor, rest: Tensor, ok: Tensor | None = None) -> None:
    """Write flat fp32 weights to a parameter and to what it lacks of them; see `write` for `ok`."""
    if numel := x.numel():
        split_kernel[(triton.cdiv(numel, SIZE),)](
            x, _bits(param), rest, flag(ok, x.device), numel,
            SPLIT=_stored(param, rest).split, COUNT=SIZE, enable_fp_fusion=False,
        )  # fmt: skip


def _bits(param: Tensor) -> Tensor:
    return param.view(torch.int16) if param.dtype == torch.bfloat16 else param


def _stored(param: Tensor, rest: Tensor) -> Any:
    low, high = (str(tensor.dtype).removeprefix("torch.") for tensor in (param, rest))
    return WEIGHTS[low, high]
