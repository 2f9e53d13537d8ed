"""Fused steps of many fp32 tensors where they are, on CPU: one compiled call over a table of addresses.

The bits are those of torch's fused kernels, or where torch has none those of the rule's text: a build that gives others on
this machine is not used. So it does not matter which ranks have a compiler, nor which parameters are stepped so; only the
norm that clips is added up in another order without one.
"""

from __future__ import annotations

from functools import cache

import torch

from distopt.kernels import fused_kernel, native
from distopt.kernels.elementwise import EXAMPLES, told
from distopt.kernels.jobs import Coding, Job, table
from distopt.plan.tiles import BLOCK
from distopt.plan.trace import step_values
from distopt.rule import Rule, Shape, StateView

TILES = 64
"""Tiles that a build is tried with."""


def exact_kernel(rule: Rule) -> native.Kernel | None:
    """The compiled kernel for fp32 weights, gradients and states of a rule; None where there is none of the same bits."""
    known = told(rule, step_values(rule, 2, Shape(1, 1, 1), False))
    return _checked(known.name, len(known.states)) if known is not None else None


@cache
def _checked(name: str, states: int) -> native.Kernel | None:
    kernel = native.build(name, ("Fp32",) * states)
    return kernel if kernel is not None and all(_is_exact(kernel, name, step) for step in (1, 5)) else None


def _is_exact(kernel: native.Kernel, name: str, step: int) -> bool:
    """Whether a step of the kernel has the bits that it has to have, on numbers of many sizes."""
    rule = EXAMPLES[name]
    known = told(rule, h := step_values(rule, step, Shape(1, 1, 1), False))
    assert known is not None
    generator = torch.Generator().manual_seed(step)
    shape = (TILES, BLOCK)
    tensors = [
        torch.randn(shape, generator=generator) * torch.randn((TILES, 1), generator=generator).mul(4).exp()
        for _ in range(2 + len(known.states))
    ]
    declared = rule.states(Shape(1, 1, 1))
    for i, state in enumerate(known.states):
        if not declared[state].signed:
            tensors[2 + i] = tensors[2 + i].square()
    weight, grad, *values = (tensor.view(-1) for tensor in tensors)
    expected = [weight.clone(), *(value.clone() for value in values)]
    theirs = fused_kernel(rule)
    if theirs is not None:
        theirs(rule, step, expected[:1], [grad], {state: [v] for state, v in zip(known.states, expected[1:])}, None)
    else:
        view = StateView(dict(zip(known.states, values)))
        expected = [rule.update(grad, weight, view, h), *(getattr(view, state) for state in known.states)]
    codings = tuple(Coding(value, None) for value in values)
    kernel(table([Job(weight, grad, None, TILES, None, codings)]), known.scalars, False)
    return all(map(torch.equal, [weight, *values], expected))
