"""Stores read and written by kernels: a launch for all of a codec, whatever the number of stores."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from distopt.kernels.jobs import KEYS, NUMBERS, NUMEL, STARTS, STATES, TILES, WEIGHT, WIDTH
from distopt.plan.tiles import Tiles
from distopt.state.noise import Key

if TYPE_CHECKING:
    from distopt.state.coded import Agreed, Coded, Span

Rows = dict[tuple[str, bool, bool], list[np.ndarray]]
"""By class of the codec, whether it is signed, whether scales are agreed."""


def decode(kernels: Any, runs: Sequence[tuple[Coded, Sequence[Span]]]) -> list[Tensor]:
    """The values of runs of spans of some stores, in fp32, flat."""
    found, rows = [], Rows()
    for store, spans in runs:
        numel = spans[-1].elements.stop - spans[0].elements.start if spans else 0
        found.append(torch.empty(numel, device=store.device))
        _add(rows, store, spans, found[-1], None)
    for (codec, signed, _), alike in rows.items():
        kernels.read(codec, signed, np.concatenate(alike), runs[0][0].device)
    return found


def encode(
    kernels: Any,
    given: Sequence[tuple[Coded, Sequence[Span], Tensor, Agreed | None, Key]],
    ok: Tensor | None = None,
) -> None:
    """Store the values of runs of spans (fp32, flat) of some stores; see `put` for `ok`."""
    rows, held = Rows(), []
    for store, spans, values, agreed, key in given:
        scales = None
        if agreed is not None and store.codec.scaled:
            scales = torch.zeros(store.tiles.count, device=store.device)
            scales[torch.from_numpy(agreed.cuts).to(store.device)] = agreed.maxima
        values = values.contiguous()
        held.append((values, scales))  # kernels are handed addresses
        _add(rows, store, spans, values, scales, key)
    for (codec, signed, known), alike in rows.items():
        kernels.write(codec, signed, np.concatenate(alike), given[0][0].device, ok, agreed=known, look=False)


def maxima(kernels: Any, store: Coded, spans: Sequence[Span], values: Tensor) -> Tensor:
    """The largest magnitude in each tile of these spans, of all the store's values; of the others zero."""
    found, rows = torch.zeros(store.tiles.count, device=store.device), Rows()
    for span in spans:
        _add(rows, store, [span], values[span.elements], found)
    for (codec, signed, _), alike in rows.items():
        kernels.write(codec, signed, np.concatenate(alike), store.device, agreed=False, look=True)
    return found


@lru_cache(maxsize=4096)
def tile_edges(tiles: Tiles, device: torch.device) -> Tensor | None:
    """Where tiles begin among the elements, and where the last one ends; None where all have BLOCK elements."""
    if tiles.lengths is None:
        return None
    return torch.from_numpy(np.concatenate([[0], np.cumsum(tiles.lengths, dtype=np.int64)])).to(device)


def _add(
    rows: Rows, store: Coded, spans: Sequence[Span], values: Tensor, agreed: Tensor | None, key: Key | None = None
) -> None:
    """A row per span: codes of 4 bits begin a byte anew with each. `values` are those of the spans alone."""
    if not spans:
        return
    codec, edges = store.codec, tile_edges(store.tiles, store.device)
    elements = np.array([(s.elements.start, s.elements.stop) for s in spans], np.int64)
    tiles = np.array([(s.tiles.start, s.tiles.stop) for s in spans], np.int64)
    found = np.zeros((len(spans), WIDTH), np.int64)
    found[:, WEIGHT] = values.data_ptr() + 4 * (elements[:, 0] - elements[0, 0])
    found[:, NUMEL], found[:, TILES] = elements[:, 1] - elements[:, 0], tiles[:, 1] - tiles[:, 0]
    codes = store.stored.data_ptr() + np.array([s.stored.start for s in spans], np.int64) * codec.dtype.itemsize
    found[:, STATES] = codes * 2 if codec.bits == 4 else codes
    for column, tensor, size in (
        (STARTS, edges, 8),
        (STATES + 1, store.scales if codec.scaled else None, 4),
        (STATES + 2, agreed, 4),
        (NUMBERS, store.firsts, 8),
    ):
        if tensor is not None:
            found[:, column] = tensor.data_ptr() + size * tiles[:, 0]
    if key is not None and codec.stochastic:
        found[:, KEYS] = key.start
    rows.setdefault((type(codec).__name__, codec.signed, agreed is not None), []).append(found)
