"""Triton kernels in Triton's interpreter, beside what they must equal; run by test_kernels.py with TRITON_INTERPRET=1.

TRITON_INTERPRET=1 python -m tests.interpreted
"""

import copy
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor, nn

import distopt
from distopt import bound
from distopt.kernels import triton_step
from distopt.kernels.elementwise import EXAMPLES, told
from distopt.kernels.jobs import Coding, Job, Table, table
from distopt.kernels.triton_codecs import CODECS as WRITTEN
from distopt.kernels.triton_codecs import WEIGHTS
from distopt.matrix.symmetric import symmetric_product
from distopt.plan.tiles import BLOCK
from distopt.plan.trace import step_values
from distopt.rule import Shape, StateView
from distopt.state import fused
from distopt.state.codecs import CODECS
from distopt.state.codecs.base import FLOOR
from distopt.state.master import MASTERS
from distopt.state.noise import Key
from tests import interpreted_states, interpreted_stretches

LENGTHS = (128, 44, 128, 100, 7, 128, 1, 128, 60, 128, 77)
"""Of tiles: more than one program's."""


def spread(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Numbers of many sizes."""
    return torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).exp()


@triton.jit
def code_kernel(x, scale, noise, codes, values, COUNT: tl.constexpr, DTYPE: tl.constexpr, ENCODE: tl.constexpr,
                DECODE: tl.constexpr):  # fmt: skip
    """Codes of numbers, and numbers of codes."""
    at = tl.arange(0, COUNT)
    tl.store(values + at, DECODE(tl.load(codes.to(tl.pointer_type(DTYPE)) + at), tl.load(scale + at)))
    found = ENCODE(tl.load(x + at), tl.load(scale + at), tl.load(noise + at))
    tl.store(codes.to(tl.pointer_type(DTYPE)) + at, found.to(DTYPE))


def encode(name: str, *, signed: bool) -> None:
    """A codec beside its text: every code decoded, numbers of many sizes and ties encoded."""
    codec, generator = CODECS[name](signed), torch.Generator().manual_seed(0)
    written = WRITTEN[type(codec).__name__, signed]
    count, short = 1 << 16, torch.int16 if codec.bits == 16 else codec.dtype
    codes = torch.arange(count).remainder(1 << codec.bits) if codec.bits < 32 else torch.randn(count)
    codes = (codes.to(torch.uint8) if codec.bits < 16 else codes.to(short)).view(codec.dtype)
    if name == "fp8":  # of the numbers that are none, encoding gives one
        codes = torch.where(codes.float().isfinite(), codes.view(torch.uint8), 0x7F).view(codec.dtype)
    scale = torch.randn(count, generator=generator).mul(20).exp().clamp(FLOOR, 3e38)
    share = torch.randn(count, generator=generator).mul(4).exp().reciprocal().clamp(max=1.0)
    steps = torch.randint(0, 3585, (count,), generator=generator) / 3584  # times 448: ties of fp8
    share = torch.where(torch.arange(count) % 2 == 0, share, steps) * torch.randn(count, generator=generator).sign()
    x = (share if signed else share.abs()) * torch.where(torch.arange(count) % 3 == 0, scale, 1.0)
    scale = torch.where(torch.arange(count) % 3 == 0, scale, 1.0)
    noise = Key(7, 3, "x").bits(torch.arange(count))
    values, found = torch.empty(count), codes.clone()
    code_kernel[(1,)](x, scale, noise, found, values, count, written.dtype, written.encode, written.decode)
    expected = codec.decode(codes, scale)
    assert torch.equal(values.nan_to_num(7.0), expected.nan_to_num(7.0)), (name, signed)
    apart = found.view(torch.uint8) != codec.encode(x, scale, noise).view(torch.uint8)
    # torch's roots are off by one ulp in one of six, so that a tie may fall to either side.
    assert apart.float().mean() <= (1e-4 if name in ("int4", "int8") else 0), (name, signed)


@triton.jit
def weight_kernel(x, param, rest, joined, COUNT: tl.constexpr, WEIGHT: tl.constexpr, REST: tl.constexpr,
                  JOIN: tl.constexpr, SPLIT: tl.constexpr):  # fmt: skip
    """Weights split as they are stored, and joined again."""
    at = tl.arange(0, COUNT)
    low, high = SPLIT(tl.load(x + at), REST)
    param = param.to(tl.pointer_type(WEIGHT))
    tl.store(param + at, low)
    if REST is not None:
        tl.store(rest + at, high)
        tl.store(joined + at, JOIN(tl.load(param + at), tl.load(rest + at)))
    else:
        tl.store(joined + at, JOIN(tl.load(param + at), low))


def split(master: str, low: torch.dtype) -> None:
    """A storage of weights beside its text, on numbers of all sizes, with zeros, ties and what is below normal numbers."""
    kept, generator, count = MASTERS[master], torch.Generator().manual_seed(0), 1 << 16
    x = torch.randn(count, generator=generator) * torch.randn(count, generator=generator).mul(4).exp()
    places = torch.arange(count)
    x = torch.where(places % 4 == 0, x.to(low).float() * (1 + 2.0**-11), torch.where(places % 97 == 0, 0.0, x * 1e-3))
    x = torch.where(places % 5 == 0, x * 2.0**-12, x).clamp(-60000, 60000)
    dtypes = str(low).removeprefix("torch."), None if kept is None else str(kept.dtype).removeprefix("torch.")
    written = WEIGHTS[dtypes]
    param, rest = kept.split(x, low) if kept else (x.to(low), x)
    mine, other, joined = torch.empty_like(param), torch.empty_like(rest), torch.empty(count)
    weight_kernel[(1,)](
        x, mine, other, joined, count, written.dtype, written.rest, written.join, written.split
    )  # fmt: skip
    assert torch.equal(mine, param), dtypes
    assert kept is None or torch.equal(other, rest), dtypes
    assert torch.equal(joined, kept.join(param, rest) if kept else param.float()), dtypes


def compare(
    name: str, codec: str, master: str, *, ragged: bool, agreeing: bool, low: torch.dtype = torch.bfloat16
) -> None:
    """Steps two tensors by the kernel and by the rule's text."""
    rule, step = EXAMPLES[name], 3
    h = step_values(rule, step, Shape(1, 1, 1), False)
    known = told(rule, h)
    assert known is not None
    declared, generator = rule.states(Shape(1, 1, 1)), torch.Generator().manual_seed(0)
    codecs = [CODECS[codec](declared[state].signed) for state in known.states]
    low = torch.float32 if master == "fp32 weights" else low
    kept = MASTERS.get(master)
    jobs, expected = [], []
    for size, first in ((len(LENGTHS), 1000), (3, 9000)):
        lengths = torch.tensor(LENGTHS[:size] if ragged else [BLOCK] * size)
        numel = int(lengths.sum())
        tiles = list(lengths)
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        numbers = first + starts[:-1] * 3
        weight = spread((numel,), generator)
        param, rest = kept.split(weight, low) if kept else (weight.to(low), None)
        before = kept.join(param, rest) if kept and rest is not None else param.float()
        grad = spread((numel,), generator).to(low)
        states: dict[str, Tensor] = {}
        codings = []
        for state, one in zip(known.states, codecs):
            value = spread((numel,), generator)
            value = value if declared[state].signed else value.square()
            scale = largest(value, tiles)
            wide = scale.repeat_interleave(lengths)
            key = Key(7, step, state)
            noise = key.bits(elements(numbers, lengths))
            codes = one.encode(value, wide, noise)
            states[state] = one.decode(codes, wide)
            least = scale * (torch.arange(size) % 2) * 2 if agreeing and one.scaled else None
            kept_scale = scale.clone() if one.scaled else None
            codings.append(Coding(one.pack(codes.clone()), kept_scale, least, key.start, one.bits == 4))
        view = StateView(states)
        new = rule.update(grad.float(), before, view, h)
        expected.append((new, [getattr(view, state) for state in known.states], lengths, numbers))
        at = starts if ragged else None
        rest = None if rest is None else rest.clone()
        jobs.append(Job(param.clone(), grad, at, size, rest, tuple(codings), numbers))
    rest = jobs[0].rest
    kernel = triton_step.find(
        name,
        tuple((type(one).__name__, one.signed) for one in codecs),
        str(low).removeprefix("torch."),
        None if rest is None else str(rest.dtype).removeprefix("torch."),
        str(low).removeprefix("torch."),
    )
    assert kernel is not None
    if agreeing:
        given = [[state.agreed.clone() for state in job.states] for job in jobs]
        kernel(table(jobs), known.scalars, True)
        for job, (_, new_states, lengths, _), least in zip(jobs, expected, given):
            for state, value, one in zip(job.states, new_states, least):
                assert torch.allclose(state.agreed, largest(value, list(lengths), 0.0), rtol=1e-5), "what it looked for"
                state.agreed.copy_(one)
    before, steps = copy.deepcopy(jobs), table(jobs)
    kernel(replace(steps, ok=torch.tensor(False)), known.scalars, False)
    for job, old in zip(jobs, before):
        assert all(map(same, (job.weight, job.rest), (old.weight, old.rest)))
        for state, kept_state in zip(job.states, old.states):
            assert same(state.codes, kept_state.codes)
            assert same(state.scales, kept_state.scales)
    if not ragged:
        for job in jobs:
            job.grad.mul_(2)
        steps = replace(steps, ok=torch.tensor(True), factor=torch.tensor(0.5))
    kernel(steps, known.scalars, False)
    for job, (new, new_states, lengths, numbers) in zip(jobs, expected):
        weight = kept.join(job.weight, job.rest) if kept else job.weight.float()
        unit = 2**-8 if low == torch.bfloat16 else 2**-11
        error = {"none": unit, "bits8": unit * 2**-8}.get(master, 0.0) * new.abs() + 3e-6 * (1 + new.abs())
        assert ((weight - new).abs() <= error).all()
        for coding, value, one, state in zip(job.states, new_states, codecs, known.states):
            scale = largest(value, list(lengths))
            if coding.agreed is not None:
                scale = scale.maximum(coding.agreed)
            if coding.scales is not None:
                assert torch.allclose(coding.scales, scale, rtol=1e-5)
                scale = coding.scales
            wide = scale.repeat_interleave(lengths)
            codes = one.encode(value, wide, Key(7, step, state).bits(elements(numbers, lengths)))
            if one.bits == 32:
                assert torch.allclose(coding.codes, codes, rtol=1e-5, atol=1e-6)
                continue
            bits = {16: torch.int16, 8: torch.uint8 if one.dtype.is_floating_point else one.dtype, 4: torch.uint8}[
                one.bits
            ]
            stored = one.unpack(coding.codes, codes.numel())
            apart = (stored.view(bits).int() - codes.view(bits).int()).abs()
            apart = apart.minimum(16 - apart) if one.bits == 4 else apart  # of a negative code, in four bits
            assert apart.ne(0).float().mean() <= 5e-3
            assert apart.max() <= 1


def same(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether these have the same bytes."""
    return one is other or torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def optimize(codec: str, master: str, low: torch.dtype) -> None:
    """An optimizer's steps by the kernel, one launch for all whole tensors and one for the others, beside the rule's text."""
    find, native, defers, launched = fused.Fused.find, fused._native, bound.defers, []
    factors: list[Tensor | None] = []
    shapes = {
        "wide": (40, 256),
        "ragged": (37, 100),
        "vector": (5120,),
        "large": (300, 64),
        "other": (3, 7001),
        "few": (1029,),
    }

    def launch(rows: np.ndarray, *others: object) -> Table:
        launched.append(rows)
        factors.append(others[-1])
        return Table(rows, *others)

    def masked(self: Any, unit: Any) -> Any:
        ok, self.ok = self.ok, None  # these kernels know of it
        try:
            return find(self, unit)
        finally:
            self.ok = ok

    def trained(find: Any, *, defers: bool = False) -> list[Tensor]:
        """With gradients times 1, from the device, and a step more, which is not taken, if it `defers`."""
        fused.Fused.find, generator = find, torch.Generator().manual_seed(0)
        bound.defers = lambda *_: defers
        params = {n: nn.Parameter(torch.randn(shape, generator=generator).to(low)) for n, shape in shapes.items()}
        options = {"nonfinite": "skip", "max_grad_norm": 1e9} if defers else {}
        built = distopt.AdamW(params.items(), lr=1e-2, state_codec=codec, master_codec=master, **options)
        for number in range(3):
            if defers and number == 2:
                for param in params.values():
                    param.grad = torch.full_like(param, torch.nan)
                built.step()
            for name, param in params.items():
                grad = spread(param.shape, generator).to(low)
                param.grad = None if number == 1 and name == "ragged" else grad
            built.step()
        return [weight.clone() for _, weight in built._bind().master_weights()] or list(params.values())

    fused._native = lambda name, codecs, weight, kept: fused._triton(
        name, codecs, weight, None if kept is None else kept.dtype, weight
    )
    fused.Table = launch
    try:
        mine = trained(find)
        assert [len(rows) for rows in launched] == [6, 5, 1, 5], "one call for all of the same age"
        launched.clear()
        if master == "bits8":
            assert all(map(same, mine, trained(masked, defers=True)))
            assert len(launched) == 6
            assert all(factor == 1 for factor in factors[-6:])
            launched.clear()
        expected = trained(lambda self, unit: None)
    finally:
        fused.Fused.find, fused._native, fused.Table, bound.defers = find, native, Table, defers
    assert launched == []
    for weight, other in zip(mine, expected):
        assert (weight - other).norm() <= (2**-8 if master == "none" else 1e-4) * other.norm(), (codec, master, low)


def multiply(dtype: torch.dtype) -> None:
    """Symmetric products of odd sizes, strides and stacks, beside torch's in fp64."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn((2, 150, 70), generator=generator).to(dtype)
    gram = wide @ wide.mT
    gram = (gram.float() / gram.float().norm()).to(dtype).contiguous()
    gram = ((gram + gram.mT) / 2).contiguous()
    options = {"widen": dtype == torch.bfloat16}
    tolerance = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for x in (wide, wide[0], wide.mT, torch.randn((1, 200, 5), generator=generator).to(dtype)):
        found = symmetric_product(x, x.mT, **options)
        assert torch.equal(found, found.mT)
        assert torch.allclose(found.double(), x.double() @ x.mT.double(), **tolerance)
    out = torch.empty_like(gram)
    found = symmetric_product(gram, gram, add=gram, beta=0.5, alpha=-2.0, out=out, **options)
    assert found is out
    assert torch.allclose(out.double(), 0.5 * gram.double() - 2 * gram.double() @ gram.double(), **tolerance)


def largest(values: Tensor, tiles: list[Tensor], floor: float = FLOOR) -> Tensor:
    """The scale of each tile."""
    parts = values.split([int(length) for length in tiles])
    return torch.stack([part.abs().amax().clamp(min=floor) for part in parts])


def elements(numbers: Tensor, lengths: Tensor) -> Tensor:
    """The number of each element."""
    return torch.cat([number + torch.arange(int(length)) for number, length in zip(numbers, lengths)])


def main() -> None:
    """Every rule, every codec, every storage of weights; not every combination of all."""
    codecs = [name for name, codec in CODECS.items() if (codec.__name__, True) in WRITTEN]
    assert codecs == list(CODECS)
    for name, signed in product(codecs, (True, False)):
        encode(name, signed=signed)
    for master, low in product(MASTERS, (torch.bfloat16, torch.float16)):
        split(master, low)
    for name, codec in product(EXAMPLES, codecs):
        compare(name, codec, "fp32 weights", ragged=codec not in ("bf16", "fp8"), agreeing=False)
    for codec in ("int4", "int8"):
        compare("AdamW", codec, "fp32 weights", ragged=False, agreeing=False)
    for master, codec, low in product(MASTERS, ("int8", "bf16_sr"), (torch.bfloat16, torch.float16)):
        compare("AdamW", codec, master, ragged=codec == "int8", agreeing=codec == "int8", low=low)
    compare("AdamW", "int4", "bits8", ragged=True, agreeing=True)
    compare("Lion", "int8", "fp32 weights", ragged=False, agreeing=True)
    for codec, master, low in (
        ("int8", "bits8", torch.bfloat16),
        ("int4", "none", torch.float32),
        ("fp8", "bits16", torch.float16),
    ):
        optimize(codec, master, low)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        multiply(dtype)
    interpreted_stretches.main()
    interpreted_states.main()
    print("all equal")


if __name__ == "__main__":
    main()
