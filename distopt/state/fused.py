"""Units that a kernel steps, all of a kind in one call: which those are, and what the kernel is handed of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distopt.comm.groups import Domain
from distopt.kernels import native
from distopt.kernels.elementwise import EXAMPLES, Told, told
from distopt.kernels.jobs import (
    GRAD,
    KEYS,
    NUMBERS,
    NUMEL,
    REST,
    STARTS,
    STATES,
    TILES,
    WEIGHT,
    WIDTH,
    CodedKernel,
    Coding,
    Job,
    Table,
    table,
)
from distopt.plan.tiles import BLOCK
from distopt.plan.trace import step_values
from distopt.rule import Rule, Shape, StateView
from distopt.state.codecs.base import FLOOR, Codec
from distopt.state.coded import Agreed, Coded
from distopt.state.lying import Lying
from distopt.state.master import Master
from distopt.state.noise import Key
from distopt.state.transcode import tile_edges
from distopt.state.units import Section, Unit, Units
from distopt.state.windows import wide

Stepped = tuple[str, tuple[Codec, ...], torch.dtype, Master | None]
"""What a compiled kernel is for: the name of a rule, codecs of its states, dtype of weights and what is kept beside them."""


class Fused:
    """Kernels for the units of one step of a group; compiled ones only if they are `allowed` (None: all are), and if no `ok` on
    the device is to be asked. `lying` knows where weights and gradients lie; by `factor` those of lower precision are yet to be
    multiplied."""

    def __init__(
        self,
        rule: Rule,
        h: Any,
        grads: dict[int, Tensor],
        inert: set[int],
        keys: Callable[[str], Key],
        allowed: frozenset[Stepped] | None = None,
        lying: Lying | None = None,
        ok: Tensor | None = None,
        factor: Tensor | None = None,
    ) -> None:
        self.lying, self.ok, self.factor = lying, ok, factor
        self.told, self.grads, self.inert, self.keys, self.allowed = told(rule, h), dict(grads), inert, keys, allowed
        self.weights: dict[int, Tensor] = {}
        self._grad_dtypes: dict[int, torch.dtype] = {}
        self._waiting: dict[tuple[Any, ...], list[tuple[Unit, Section, dict[str, Tensor]]]] = {}

    def find(self, unit: Unit) -> CodedKernel | None:
        """The kernel for the rule and this unit's states, if there is one."""
        stepped = _stepped(self.told, unit) if self.told is not None else None
        if stepped is None:
            return None
        name, codecs, weight, master = stepped
        dtypes = {weight}
        if self.lying is None:
            dtypes = {self.grads[i].dtype for i in unit.members if i not in self.inert}
        if len(dtypes) > 1:  # what is missing here and not elsewhere counts as zeros, which are fp32
            self.grads |= {i: wide(self.grads[i], self.factor) for i in unit.members}
            dtypes = {torch.float32}
        [grad] = dtypes
        self._grad_dtypes[id(unit)] = grad
        if not all(map(_is_even, (store for section in unit.sections for store in section.stores.values()))):
            return None
        if unit.windows[0].param.is_cuda and not unit.hosted:
            return _triton(name, codecs, weight, None if master is None else master.dtype, grad)
        refused = self.ok is not None or (self.allowed is not None and stepped not in self.allowed)
        if grad not in (torch.float32, weight) or refused:
            return None
        return _native(*stepped)

    def look(
        self,
        kernel: CodedKernel,
        unit: Unit,
        section: Section,
        weight: Tensor | None = None,
        grad: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The new maxima of the tiles of a section that an edge of a shard cuts, by state. `weight` and `grad` have what is
        in the section where that was copied."""
        maxima = {name: self._zeros(section) for name, slots in unit.slots.items() if slots}
        self._run(kernel, [(unit, section, maxima)], weight, grad, look=True)
        cuts = torch.from_numpy(unit.tiles.cuts[section.cuts] - section.tiles.start).to(_device(section))
        return {name: found[cuts] for name, found in maxima.items()}

    def step(
        self,
        kernel: CodedKernel,
        unit: Unit,
        section: Section,
        known: dict[str, Agreed],
        weight: Tensor | None = None,
        grad: Tensor | None = None,
    ) -> None:
        """Step a section, with these maxima of its cut tiles; see `look`. What neither was copied nor lies in pages waits for
        `finish`."""
        scales = {}
        for name, agreed in known.items():
            scales[name] = self._zeros(section)
            scales[name][torch.from_numpy(agreed.cuts).to(agreed.maxima.device)] = agreed.maxima
        if weight is not None or section.page is not None:
            self._run(kernel, [(unit, section, scales)], weight, grad, look=False)
        else:
            kind = kernel, bool(scales), self._grad_dtypes[id(unit)]
            self._waiting.setdefault(kind, []).append((unit, section, scales))

    def finish(self) -> None:
        """Step what waits: one call for all that is alike."""
        for (kernel, *_), parts in self._waiting.items():
            self._run(kernel, parts, None, None, look=False)
        self._waiting.clear()

    def _zeros(self, section: Section) -> Tensor:
        return torch.zeros(section.tiles.stop - section.tiles.start, device=_device(section))

    def _run(
        self,
        kernel: CodedKernel,
        parts: list[tuple[Unit, Section, dict[str, Tensor]]],
        weight: Tensor | None,
        grad: Tensor | None,
        *,
        look: bool,
    ) -> None:
        """Hand over the members of units that step, as far as they lie in these sections."""
        assert self.told is not None
        unit, section, scales = parts[0]
        dtype = self._grad_dtypes[id(unit)]
        rows = np.concatenate([self._fixed(unit, section) for unit, section, _ in parts])
        numbers = [number for unit, _, _ in parts for number in unit.members]
        if weight is not None and grad is not None:
            dtype, before = grad.dtype, rows[:, NUMEL].cumsum() - rows[:, NUMEL]
            rows[:, WEIGHT] = weight.data_ptr() + before * weight.element_size()
            rows[:, GRAD] = grad.data_ptr() + before * grad.element_size()
        else:
            weights, grads = self._addresses([unit for unit, _, _ in parts], numbers)
            rows[:, WEIGHT] += weights
            rows[:, GRAD] = rows[:, GRAD] * dtype.itemsize + grads
        for place, name in enumerate(self.told.states):
            if section.stores[name].firsts is not None:
                rows[:, KEYS + place] = self.keys(name).start
        if scales:
            first = 0
            for unit, section, scales in parts:
                own = rows[first : first + len(unit.members)]
                for place, name in enumerate(self.told.states):
                    if name in scales:
                        own[:, STATES + 3 * place + 2] = scales[name].data_ptr() + 4 * _first_tiles(unit, section)
                first += len(unit.members)
        stepping = rows[:, NUMEL] > 0
        if self.inert:
            stepping &= [number not in self.inert for number in numbers]
        rows = rows if stepping.all() else rows[stepping]
        if len(rows):
            exact = dtype == torch.float32
            given = Table(rows, bool(scales), _device(section), exact, self.ok, None if exact else self.factor)
            kernel(given, self.told.scalars, look)

    def _fixed(self, unit: Unit, section: Section) -> np.ndarray:
        """What rows say of the members of a unit that stays as long as the section lies where it does; beside that, how
        far into each weight (in bytes) and gradient (in elements) the section begins."""
        assert self.told is not None
        if section.rows is not None:
            return section.rows
        rows, first = np.zeros((len(unit.members), WIDTH), np.int64), section.elements.start
        parts = np.array([(part.start, part.stop) for part in unit.parts.values()], np.int64)
        begin, end = parts.clip(section.elements.start, section.elements.stop).T
        tile = _first_tiles(unit, section)
        ends = np.array([part.stop for part in unit.tile_parts.values()], np.int64)
        rows[:, GRAD] = begin - parts[:, 0]
        rows[:, WEIGHT] = rows[:, GRAD] * unit.windows[0].param.element_size()
        rows[:, NUMEL] = end - begin
        rows[:, TILES] = ends.clip(section.tiles.start, section.tiles.stop) - section.tiles.start - tile
        starts = tile_edges(section.shape, _device(section))
        if starts is not None:
            rows[:, STARTS] = starts.data_ptr() + 8 * tile
        if section.rest is not None:
            rows[:, REST] = section.rest.data_ptr() + (begin - first) * section.rest.element_size()
        for place, name in enumerate(self.told.states):
            store, column = section.stores[name], STATES + 3 * place
            bits, unit_bits = store.codec.bits, min(store.codec.bits, 8)
            rows[:, column] = (8 * store.stored.data_ptr() + (begin - first) * bits) // unit_bits
            if store.codec.scaled:
                rows[:, column + 1] = store.scales.data_ptr() + 4 * tile
            if store.firsts is not None:
                rows[:, NUMBERS] = store.firsts.data_ptr() + 8 * tile
        if section.page is None:
            section.rows = rows
        return rows

    def _addresses(self, units: list[Unit], numbers: list[int]) -> tuple[Any, Any]:
        """Where the weights and the gradients of their members, `numbers`, lie."""
        if self.lying is not None:
            return self.lying.weights[numbers], self.lying.grads[numbers]
        for number, window in ((n, w) for unit in units for n, w in zip(unit.members, unit.windows)):
            if number not in self.weights:  # asked again, a window that is not contiguous would give another copy
                self.weights[number] = window.param if window.plain else window.weight()
        return [self.weights[n].data_ptr() for n in numbers], [self.grads[n].data_ptr() for n in numbers]


def _device(section: Section) -> torch.device:
    return next(iter(section.stores.values())).stored.device


def _first_tiles(unit: Unit, section: Section) -> np.ndarray:
    """Of each member its first tile, counted from the first one of the section."""
    firsts = np.array([part.start for part in unit.tile_parts.values()], np.int64)
    return firsts.clip(section.tiles.start, section.tiles.stop) - section.tiles.start


def _is_even(store: Coded) -> bool:
    """Whether its codes lie one after the other; those of 4 bits begin a byte anew where a span does."""
    return (
        store.codec.bits >= 8
        or store.tiles.lengths is None
        or all(
            8 * span.stored.start * store.codec.dtype.itemsize == span.elements.start * store.codec.bits
            for span in store.spans
        )
    )


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
def _native(name: str, codecs: tuple[Codec, ...], weight: torch.dtype, master: Master | None) -> CodedKernel | None:
    """The compiled kernel of a rule and this storage of its states and weights, if there is one and it does what the rule's
    text does, with gradients like the weights and with fp32 ones."""
    structs = tuple(native.CODECS.get((type(codec).__name__, codec.signed), "") for codec in codecs)
    if not all(structs):
        return None
    kernel = native.build(name, structs, native.stored_weights(weight, None if master is None else master.dtype))
    if kernel is None:
        return None
    agrees = all(_agrees(kernel, name, codecs, weight, master, grad) for grad in {weight, torch.float32})
    return kernel if agrees else None


def _agrees(
    kernel: CodedKernel,
    name: str,
    codecs: tuple[Codec, ...],
    low: torch.dtype,
    master: Master | None,
    grads: torch.dtype,
) -> bool:
    """Whether a step of the kernel is one of the rule's text, on numbers of many sizes. The bits may differ: torch's roots are
    not always the nearest number, the kernel's are."""
    rule, count = EXAMPLES[name], 64
    h = step_values(rule, 3, Shape(1, 1, 1), False)
    known = told(rule, h)
    assert known is not None and known.name == name
    generator = torch.Generator().manual_seed(0)
    weight, grad, *values = (
        torch.randn((count, BLOCK), generator=generator) * torch.randn((count, 1), generator=generator).mul(2).exp()
        for _ in range(2 + len(codecs))
    )
    param, rest = (weight.to(low, copy=True), None) if master is None else master.split(weight, low)
    before = _joined(master, param, rest).clone()
    grad = grad.to(grads)
    numbers, elements = torch.arange(count) * BLOCK, torch.arange(count * BLOCK).view(count, BLOCK)
    stored, decoded = [], []
    declared = rule.states(Shape(1, 1, 1))
    for state, codec, value in zip(known.states, codecs, values):
        value = value if declared[state].signed else value.square()
        scale = value.abs().amax(1, keepdim=True).clamp(min=FLOOR)
        codes = codec.encode(value, scale, Key(0, 3, state).bits(elements)).clone()
        stored.append((codes, scale.view(-1).clone()))
        decoded.append(codec.decode(codes, scale))
    view = StateView(dict(zip(known.states, decoded)))
    expected = rule.update(grad.float(), before, view, h)
    codings = tuple(
        Coding(codes.view(-1), scale if codec.scaled else None, None, Key(0, 3, state).start)
        for state, codec, (codes, scale) in zip(known.states, codecs, stored)
    )
    flat = None if rest is None else rest.view(-1)
    job = Job(param.view(-1), grad.view(-1), None, count, flat, codings, numbers)
    kernel(table([job]), known.scalars, False)
    after = _joined(master, param, rest)
    expected = _joined(master, *((expected.to(low), None) if master is None else master.split(expected, low)))
    # Where a number lies between two that can be stored, its last bit decides.
    far = (after - expected).abs() > 1e-6 * (before.abs() + expected.abs())
    same = far.float().mean().item() <= (0 if low == torch.float32 else 1e-2)
    for codec, (codes, scale), state in zip(codecs, stored, known.states):
        new = getattr(view, state)
        largest = new.abs().amax(1, keepdim=True).clamp(min=FLOOR)
        noise = Key(0, 3, state).bits(elements)
        apart = (codec.encode(new, largest, noise).float() - codes.float()).ne(0)
        same &= apart.float().mean().item() <= 1e-3
        same &= not codec.scaled or torch.allclose(largest.view(-1), scale, rtol=1e-6)
    return same


def _joined(master: Master | None, param: Tensor, rest: Tensor | None) -> Tensor:
    return param.float() if master is None or rest is None else master.join(param, rest)


def agree_on_kernels(groups: Iterable[tuple[Rule, Units]], union: Domain, device: torch.device) -> None:
    """Allow the compiled kernels that all ranks have, of those that these rules can use: where one rank runs a rule's text,
    all do, or replicas would differ in last bits. Collective."""
    if union.size == 1:
        return
    wanted: dict[Stepped, None] = {}
    asked = list(groups)
    for rule, units in asked:
        known = told(rule, step_values(rule, 2, Shape(1, 1, 1), False))
        compiled = [unit for unit in units.units if device.type == "cpu" or unit.hosted]
        wanted |= {stepped: None for unit in compiled if known and (stepped := _stepped(known, unit))}
    rows = union.all_gather_ints([int(_native(*stepped) is not None) for stepped in wanted], device) if wanted else []
    allowed = frozenset(stepped for stepped, *votes in zip(wanted, *rows) if all(votes))
    for _, units in asked:
        units.allowed = allowed


def _stepped(known: Told, unit: Unit) -> Stepped | None:
    """How a unit's states and weights are stored, if they are those of the rule."""
    if unit.stores.keys() != set(known.states):
        return None
    codecs = tuple(unit.stores[name].codec for name in known.states)
    return known.name, codecs, unit.windows[0].param.dtype, unit.master
