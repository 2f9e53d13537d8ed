"""Stores and weights read and written by Triton kernels, beside the text of codecs; run by interpreted.py."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import distopt
from distopt import bucket
from distopt.kernels import triton_states, triton_stretches
from distopt.plan.tiles import BLOCK, Tiles
from distopt.state import coded, units
from distopt.state.codecs import CODECS
from distopt.state.coded import Agreed, Coded, read_all, write_all
from distopt.state.master import MASTERS
from distopt.state.noise import Key

CPU = torch.device("cpu")
LENGTHS = (128, 44, 128, 101, 7, 128, 1, 128, 60, 128, 77)
"""Of tiles: more than one program's, and an odd number of elements in all but one span."""


@contextmanager
def kernels(*, there: bool) -> Iterator[None]:
    """As on a GPU, or as on a CPU."""
    before = coded.state_kernels, bucket.stretch_kernels
    bucket.stretch_kernels = lambda device: triton_stretches.KERNELS if there else {}
    for module in (coded, units):
        module.state_kernels = lambda device: triton_states if there else None
    try:
        yield
    finally:
        coded.state_kernels, bucket.stretch_kernels = before
        units.state_kernels = before[0]


def store(name: str, *, signed: bool, ragged: bool, cuts: list[int]) -> Coded:
    """An empty store of several spans."""
    lengths = np.array(LENGTHS if ragged else (BLOCK,) * len(LENGTHS), np.int32)
    tiles = Tiles(int(lengths.sum()), lengths if ragged else None, np.array(cuts, int), np.arange(len(cuts)))
    chunk, coded.CHUNK = coded.CHUNK, 4 * BLOCK
    try:
        return Coded(CODECS[name](signed), tiles, CPU, 0.0, 1000 + np.cumsum(lengths, dtype=np.int64) - lengths)
    finally:
        coded.CHUNK = chunk


def same(mine: Coded, other: Coded) -> None:
    """Codes and scales are equal, but for ties of roots, which torch may round to either side."""
    assert torch.equal(mine.scales, other.scales)
    apart = mine.stored.view(torch.uint8).ne(other.stored.view(torch.uint8))
    assert apart.float().mean() <= (2e-3 if mine.codec.bits in (4, 8) else 0), mine.codec


def compare(name: str, *, signed: bool, ragged: bool) -> None:
    """A store beside one that the text writes: with scales that are agreed, several at once, a span alone, part of it."""
    generator, codec = torch.Generator().manual_seed(0), CODECS[name](signed)
    cuts = [1, 5, 9]
    with kernels(there=False):
        mine, other, more, another = (store(name, signed=signed, ragged=ragged, cuts=cuts) for _ in range(4))
    assert len(mine.spans) == 3
    values = (
        torch.randn(mine.tiles.numel, generator=generator) * torch.randn(mine.tiles.numel, generator=generator).exp()
    )
    values = values if signed else values.square()
    values[values.abs() < 0.1] = 0.0
    known, key = Agreed(np.array(cuts), torch.tensor([9.0, 0.01, 5.0]).maximum(values.abs().max())), Key(7, 3, "x")
    with kernels(there=False):
        other.write(values, known, key)
        another.write(values / 3, None, key)
        expected, alone, maxima = other.read(), other.decode(other.spans[1]), other.cut_maxima(values)
    with kernels(there=True):
        if codec.scaled:
            assert torch.equal(mine.cut_maxima(values), maxima)
        write_all([(mine, values, known, key)])
        write_all([(more, values, None, key)])
        write_all([(mine, values, known, key), (more, values / 3, None, key)])
        write_all([(more, values, None, key)], torch.tensor(False))
        more.write(values, None, key, torch.tensor(False))
        same(mine, other)
        same(more, another)
        mine.stored.copy_(other.stored)
        found, rest = read_all([mine, more])
        assert torch.equal(found, expected)
        assert torch.equal(rest, more.read())
        assert torch.equal(mine.decode(mine.spans[1]), alone)
        assert torch.equal(mine.run(slice(130, 900)), expected[130:900])
        mine.encode(mine.spans[1], found[mine.spans[1].elements], known, key)
        if not codec.stochastic:
            assert torch.equal(mine.stored.view(torch.uint8), other.stored.view(torch.uint8)), "codes are found again"


def weights(master: str, low: torch.dtype) -> None:
    """Weights of more than one program beside the text."""
    kept, generator = MASTERS[master], torch.Generator().manual_seed(0)
    x = torch.randn(1500, generator=generator) * torch.randn(1500, generator=generator).exp()
    expected = kept.split(x, low)
    param, rest = (torch.empty_like(tensor) for tensor in expected)
    triton_states.split(x, param, rest)
    triton_states.split(-x, param, rest, torch.tensor(False))
    assert torch.equal(param, expected[0])
    assert torch.equal(rest, expected[1])
    assert torch.equal(triton_states.join(param, rest), kept.join(param, rest))


def optimize(rule: str, shapes: dict[str, tuple[int, ...]], together: int, options: dict[str, Any]) -> None:
    """Steps on coded states and parameters of bfloat16: what is stored is equal."""

    def trained(*, there: bool) -> tuple[list[Tensor], list[Coded]]:
        generator = torch.Generator().manual_seed(0)
        with kernels(there=there):
            named = [(n, nn.Parameter(torch.randn(s, generator=generator).bfloat16())) for n, s in shapes.items()]
            built = getattr(distopt, rule)(named, lr=1e-2, **options)
            for number in range(2):
                for name, param in named:
                    grad = torch.randn(param.shape, generator=generator).bfloat16()
                    param.grad = None if number == 1 and name == "other" else grad
                versions = [param._version for _, param in named]
                built.step()
                changed = [param._version > old for old, (_, param) in zip(versions, named)]
                assert changed == [param.grad is not None for _, param in named], "autograd hears of it"
        found = [group.units for group in built._bind().groups]
        stores = [s for one in found for unit in one.units for s in unit.stores.values()]
        return [param for _, param in named], stores + [s for one in found for s in one.owned.values()]

    launched, read = [], triton_states.read
    triton_states.read = lambda *args: launched.append(args[2]) or read(*args)
    try:
        mine, expected = trained(there=True), trained(there=False)
    finally:
        triton_states.read = read
    assert max(map(len, launched)) == together, "states of one launch"
    for one, other in zip(mine[0], expected[0]):
        assert one.ne(other).float().mean() <= 2e-3, rule
    for one, other in zip(mine[1], expected[1]):
        assert torch.allclose(one.scales, other.scales, rtol=1e-3)
        assert one.stored.view(torch.uint8).ne(other.stored.view(torch.uint8)).float().mean() <= 2e-3, rule


def main() -> None:
    """Every codec and storage of weights."""
    for name in CODECS:
        compare(name, signed=True, ragged=True)
        compare(name, signed=False, ragged=name == "int4")
    compare("int4", signed=True, ragged=False)
    for master, low in ((m, low) for m in ("fp32", "bits16", "bits8") for low in (torch.bfloat16, torch.float16)):
        weights(master, low)
    shapes = {"wide": (9, 200), "stack": (3, 20, 31), "other": (9, 200), "square": (33, 33)}
    optimize("Muon", shapes, 4, {"state_codec": "int8", "master_codec": "bits8", "ns_dtype": torch.float32})
    optimize("Muon", shapes, 4, {"state_codec": "int4", "ns_dtype": torch.float32})
    pair = {"square": (33, 33), "other": (33, 33)}
    optimize("Adafactor", {"vector": (1500,), "wide": (9, 200)}, 1, {"state_codec": "int8", "master_codec": "bits16"})
    optimize("SOAP", pair, 5, {"state_codec": "bf16_sr", "precondition_frequency": 2})
