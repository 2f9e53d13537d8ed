"""Units that a kernel steps, all of a kind in one call: which those are, and what the kernel is handed of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distopt.kernels import native
from distopt.kernels.elementwise import EXAMPLES, told
from distopt.kernels.jobs import CodedKernel, Coding, Job
from distopt.plan.tiles import BLOCK, Tiles
from distopt.plan.trace import step_values
from distopt.rule import Rule, Shape, StateView
from distopt.state.codecs.base import FLOOR, Codec
from distopt.state.coded import Agreed, Coded
from distopt.state.noise import Key
from distopt.state.units import Section, Unit


class Fused:
    """Kernels for the units of one step of a group."""

    def __init__(
        self, rule: Rule, h: Any, grads: dict[int, Tensor], inert: set[int], keys: Callable[[str], Key]
    ) -> None:
        self.told, self.grads, self.inert, self.keys = told(rule, h), grads, inert, keys
        self.weights: dict[int, Tensor] = {}

    def find(self, unit: Unit) -> CodedKernel | None:
        """The kernel for the rule and this unit's states, if there is one."""
        if self.told is None or unit.stores.keys() != set(self.told.states):
            return None
        codecs = tuple(unit.stores[name].codec for name in self.told.states)
        weight, grads = unit.windows[0].param.dtype, {self.grads[i].dtype for i in unit.members}
        rest = unit.master.dtype if unit.master is not None else None
        if len(grads) > 1:
            return None
        [grad] = grads
        if unit.windows[0].param.is_cuda:
            return _triton(self.told.name, codecs, weight, rest, grad)
        if weight != torch.float32 or grad != torch.float32:
            return None
        return _native(self.told.name, codecs)

    def look(self, kernel: CodedKernel, unit: Unit, section: Section) -> dict[str, Tensor]:
        """The new maxima of the tiles of a section that an edge of a shard cuts, by state."""
        maxima = {name: self._zeros(section) for name, slots in unit.slots.items() if slots}
        self._run(kernel, unit, section, maxima, look=True)
        cuts = torch.from_numpy(unit.tiles.cuts[section.cuts] - section.tiles.start).to(self._device(section))
        return {name: found[cuts] for name, found in maxima.items()}

    def step(self, kernel: CodedKernel, unit: Unit, section: Section, known: dict[str, Agreed]) -> None:
        """Step a section, with these maxima of its cut tiles."""
        scales = {}
        for name, agreed in known.items():
            scales[name] = self._zeros(section)
            scales[name][torch.from_numpy(agreed.cuts).to(agreed.maxima.device)] = agreed.maxima
        self._run(kernel, unit, section, scales, look=False)

    def _zeros(self, section: Section) -> Tensor:
        return torch.zeros(section.tiles.stop - section.tiles.start, device=self._device(section))

    def _device(self, section: Section) -> torch.device:
        return next(iter(section.stores.values())).stored.device

    def _run(self, kernel: CodedKernel, unit: Unit, section: Section, scales: dict[str, Tensor], *, look: bool) -> None:
        """Hand over the members that step, as far as they lie in the section."""
        assert self.told is not None
        starts = _tile_starts(section.shape, self._device(section))
        jobs = []
        for number, window in zip(unit.members, unit.windows):
            whole = unit.parts[number]
            here, tiles = _common(whole, section.elements), _common(unit.tile_parts[number], section.tiles)
            if number in self.inert or here.stop <= here.start:
                continue
            if number not in self.weights:  # asked again, a window that is not contiguous would give another copy
                self.weights[number] = window.weight()
            mine = slice(here.start - whole.start, here.stop - whole.start)
            tiles = slice(tiles.start - section.tiles.start, tiles.stop - section.tiles.start)
            states = tuple(
                _coding(section.stores[name], section.within(here), tiles, scales.get(name), self.keys(name).start)
                for name in self.told.states
            )
            at = None if starts is None else starts[tiles.start :]
            weight, grad = self.weights[number][mine], self.grads[number][mine]
            rest = None if section.rest is None else section.rest[section.within(here)]
            numbers = _numbers(section, tiles)
            jobs.append(Job(weight, grad, at, tiles.stop - tiles.start, rest, states, numbers))
        kernel(jobs, self.told.scalars, look)


def _common(a: slice, b: slice) -> slice:
    return slice(max(a.start, b.start), min(a.stop, b.stop))


def _coding(store: Coded, part: slice, tiles: slice, agreed: Tensor | None, key: int) -> Coding:
    scales = store.scales[tiles] if store.codec.scaled else None
    return Coding(store.stored[part], scales, None if agreed is None else agreed[tiles], key)


def _numbers(section: Section, tiles: slice) -> Tensor | None:
    """The numbers of the first elements of these tiles, where a codec rounds stochastically."""
    found = (store.firsts for store in section.stores.values())
    return next((firsts[tiles] for firsts in found if firsts is not None), None)


@lru_cache(maxsize=4096)
def _tile_starts(tiles: Tiles, device: torch.device) -> Tensor | None:
    """Where tiles begin among the elements, and where the last one ends; None where all have BLOCK elements."""
    if tiles.lengths is None:
        return None
    return torch.from_numpy(np.concatenate([[0], np.cumsum(tiles.lengths, dtype=np.int64)])).to(device)


def _triton(
    name: str, codecs: tuple[Codec, ...], weight: torch.dtype, rest: torch.dtype | None, grad: torch.dtype
) -> CodedKernel | None:
    """The Triton kernel for these, if all its parts are written."""
    from distopt.kernels import (
        triton_step,  # importing Triton takes a second, and it is there only where there is a GPU
    )

    kinds = tuple((type(codec).__name__, codec.signed) for codec in codecs)
    weight_name, rest_name, grad_name = (
        None if t is None else str(t).removeprefix("torch.") for t in (weight, rest, grad)
    )
    assert weight_name is not None and grad_name is not None
    return triton_step.find(name, kinds, weight_name, rest_name, grad_name)


@cache
def _native(name: str, codecs: tuple[Codec, ...]) -> CodedKernel | None:
    """The compiled kernel of a rule and these codecs of its states, if there is one and it does what the rule's text does."""
    structs = tuple(native.CODECS.get((type(codec).__name__, codec.signed), "") for codec in codecs)
    kernel = native.build(name, structs) if all(structs) else None
    return kernel if kernel is not None and _agrees(kernel, name, codecs) else None


def _agrees(kernel: CodedKernel, name: str, codecs: tuple[Codec, ...]) -> bool:
    """Whether a step of the kernel is one of the rule's text, on numbers of many sizes. The bits may differ: torch's roots are
    not always the nearest number, the kernel's are."""
    rule, count = EXAMPLES[name], 64
    h = step_values(rule, 3, Shape(1, 1, 1), False)
    known = told(rule, h)
    assert known is not None and known.name == name
    generator = torch.Generator().manual_seed(0)
    weight, grad, *values = (
        torch.randn((count, BLOCK), generator=generator) * torch.randn((count, 1), generator=generator).mul(4).exp()
        for _ in range(2 + len(codecs))
    )
    stored, decoded = [], []
    declared = rule.states(Shape(1, 1, 1))
    for state, codec, value in zip(known.states, codecs, values):
        value = value if declared[state].signed else value.square()
        scale = value.abs().amax(1, keepdim=True).clamp(min=FLOOR)
        stored.append((codec.encode(value, scale, value).clone(), scale.view(-1).clone()))
        decoded.append(codec.decode(stored[-1][0], scale))
    view = StateView(dict(zip(known.states, decoded)))
    before, expected = weight.clone(), rule.update(grad, weight, view, h)
    codings = tuple(
        Coding(codes.view(-1), scale if codec.scaled else None) for codec, (codes, scale) in zip(codecs, stored)
    )
    kernel([Job(weight.view(-1), grad.view(-1), None, count, None, codings)], known.scalars, False)
    same = ((weight - expected).abs() <= 1e-6 * (before.abs() + expected.abs())).all()
    for codec, (codes, scale), state in zip(codecs, stored, known.states):
        new = getattr(view, state)
        largest = new.abs().amax(1, keepdim=True).clamp(min=FLOOR)
        # Where a root lies between two codes, its last bit decides.
        apart = (codec.encode(new, largest, new).float() - codes.float()).ne(0)
        same &= apart.float().mean().item() <= 1e-3
        same &= not codec.scaled or torch.allclose(largest.view(-1), scale, rtol=1e-6)
    return bool(same)
