"""Triton kernels in Triton's interpreter, beside what they must equal; run by test_kernels.py with TRITON_INTERPRET=1.

TRITON_INTERPRET=1 python -m tests.interpreted
"""

from itertools import product

import torch
from torch import Tensor

from distopt.kernels import triton_step
from distopt.kernels.elementwise import EXAMPLES, told
from distopt.kernels.jobs import Coding, Job, table
from distopt.kernels.triton_codecs import CODECS as WRITTEN
from distopt.matrix.symmetric import symmetric_product
from distopt.plan.tiles import BLOCK
from distopt.plan.trace import step_values
from distopt.rule import Shape, StateView
from distopt.state.codecs import CODECS
from distopt.state.codecs.base import FLOOR
from distopt.state.master import MASTERS
from distopt.state.noise import Key

LENGTHS = (128, 44, 128, 100, 7, 128, 1, 128, 60, 128, 77)
"""Of tiles: more than one program's."""


def spread(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Numbers of many sizes."""
    return torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).exp()


def compare(name: str, codec: str, master: str, *, ragged: bool, agreeing: bool) -> None:
    """Steps two tensors by the kernel and by the rule's text."""
    rule, step = EXAMPLES[name], 3
    h = step_values(rule, step, Shape(1, 1, 1), False)
    known = told(rule, h)
    assert known is not None
    declared, generator = rule.states(Shape(1, 1, 1)), torch.Generator().manual_seed(0)
    codecs = [CODECS[codec](declared[state].signed) for state in known.states]
    low = torch.float32 if master == "fp32 weights" else torch.bfloat16
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
            codings.append(Coding(codes.clone(), scale.clone() if one.scaled else None, least, key.start))
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
    kernel(table(jobs), known.scalars, False)
    for job, (new, new_states, lengths, numbers) in zip(jobs, expected):
        weight = kept.join(job.weight, job.rest) if kept else job.weight.float()
        error = {"none": 2**-8, "bits8": 2**-16}.get(master, 0.0) * new.abs() + 3e-6 * (1 + new.abs())
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
            bits = torch.int16 if one.bits == 16 else one.dtype
            apart = (coding.codes.view(bits).int() - codes.view(bits).int()).abs()
            assert apart.ne(0).float().mean() <= 5e-3
            assert apart.max() <= 1


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
    assert len(codecs) == 4
    for name, codec in product(EXAMPLES, codecs):
        compare(name, codec, "fp32 weights", ragged=codec != "bf16", agreeing=False)
    for master, codec in product(MASTERS, ("int8", "bf16_sr")):
        compare("AdamW", codec, master, ragged=codec == "int8", agreeing=codec == "int8")
    compare("Lion", "int8", "fp32 weights", ragged=False, agreeing=True)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        multiply(dtype)
    print("all equal")


if __name__ == "__main__":
    main()
