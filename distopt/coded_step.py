"""The step of an elementwise rule on states stored as codes: by a kernel where there is one for all the rule's states, else
decode a span, run the rule, encode it, span by span.

A tile that an edge of a shard cuts needs its scale before it is encoded: spans with such tiles are computed twice, first
only for the maxima of what the rule returns, on which the ranks then agree by one reduction per group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from distopt.plan.tiles import SMALL
from distopt.plan.trace import step_values
from distopt.rule import Rule, Shape, StateView
from distopt.state.codecs import FP32
from distopt.state.coded import Span
from distopt.state.fused import Fused
from distopt.state.noise import Key
from distopt.state.units import Section, Unit, Units

Exact = Callable[[Tensor, Tensor, dict[str, Tensor]], None]


class _Flat:
    """A unit's weights and gradients, flat, and where members lie that do not step. With `fused`, a kernel for fp32 states
    is there; it then is what steps the unit (`exact`) if fp32 is all that there is, as it steps what is not in units."""

    def __init__(self, unit: Unit, grads: dict[int, Tensor], inert: set[int], *, fused: bool) -> None:
        self.unit = unit
        self.idle = [unit.parts[i] for i in unit.members if i in inert]
        exact = fused and _is_plain(unit)
        self.alone = len(unit.members) == 1 and not (exact and unit.tiles.numel < SMALL)
        weights = [window.weight() for window in unit.windows]
        given = [grads[i] for i in unit.members]
        if self.alone:
            self.weight, self.grad = weights[0], given[0]
        else:
            self.weight = torch.cat([w.float() for w in weights] if exact else weights)
            self.grad = torch.cat([grad.float() for grad in given])
        self.exact = exact and self.weight.dtype == self.grad.dtype == torch.float32

    def load(self, section: Section, span: slice) -> Tensor:
        """fp32 weights of a span."""
        unit = self.unit
        if unit.master is None or section.rest is None:
            return self.weight[span].float()
        return unit.master.join(self.weight[span], section.rest[section.within(span)])

    def store(self, section: Section, span: slice, value: Tensor) -> None:
        """New fp32 weights of a span; members that do not step keep theirs."""
        unit = self.unit
        if unit.master is not None and section.rest is not None:
            rest, old = section.rest[section.within(span)], None
            value, new = unit.master.split(value, self.weight.dtype)
            for part in self.resting(span):
                old = rest.clone() if old is None else old
                new[part] = old[part]
            rest.copy_(new)
        self.weight[span].copy_(value)

    def resting(self, span: slice) -> Iterator[slice]:
        """Where members that do not step lie in a span."""
        for idle in self.idle:
            part = slice(max(idle.start - span.start, 0), min(idle.stop, span.stop) - span.start)
            if part.stop > part.start:
                yield part

    def write_back(self, inert: set[int]) -> None:
        """Give the parameters what was computed for them."""
        for i, window in zip(self.unit.members, self.unit.windows):
            if not self.alone and i not in inert:
                window.weight().copy_(self.weight[self.unit.parts[i]])


def step_units(
    units: Units,
    rule: Rule,
    step: int,
    inert: set[int],
    grads: dict[int, Tensor],
    gpu: bool,
    scalars: dict[str, Tensor],
    observed: str | None = None,
    exact: Exact | None = None,
) -> None:
    """Step every unit with these gradients (flat, by parameter number), or feed them to the rule as what is `observed`;
    members that are `inert` are left alone, and so are the states of the group, `scalars`. `exact` is the kernel for
    weights, gradients and states that are all fp32."""
    h = step_values(rule, step, Shape(1, 1, 1), gpu)
    stepping = [unit for unit in units.units if not inert.issuperset(unit.members)]
    keys = partial(Key, units.plan.storage.seed, step)
    kernels = Fused(rule, h, grads, inert, keys, units.allowed) if observed is None else None
    coded = [unit for unit in stepping if not _is_plain(unit)]
    fused = {id(unit): kernel for unit in coded if kernels and (kernel := kernels.find(unit))}
    exact = exact if observed is None else None
    rest = [unit for unit in stepping if id(unit) not in fused]
    active = {id(unit): _Flat(unit, grads, inert, fused=exact is not None) for unit in rest}
    found = {}
    for unit in stepping:
        if any(unit.slots.values()):
            maxima = {name: store.cut_maxima(None) for name, store in unit.stores.items() if unit.slots[name]}
            found[id(unit)] = maxima
    cut = [(unit, section) for unit in stepping if id(unit) in found for section in unit.sections if section.is_cut]
    for unit, section in units.walk(cut, write=False):
        maxima = found[id(unit)]
        if id(unit) in fused:
            assert kernels is not None
            for name, values in kernels.look(fused[id(unit)], unit, section).items():
                maxima[name][section.cuts] = values
            continue
        for span, spans in section.spans(units.device):
            if any(section.stores[name].is_cut(spans[name]) for name in maxima):
                new = _update(rule, h, active[id(unit)], section, span, spans, scalars, observed)[1]
                for name in maxima.keys() & new.keys():
                    section.stores[name].note_cuts(spans[name], new[name], maxima[name][section.cuts])
    agreed = units.agreed([(unit, name, v) for unit in stepping for name, v in found.get(id(unit), {}).items()])
    everything = [(unit, section) for unit in stepping for section in unit.sections]
    for unit, section in units.walk(everything):
        known = {
            name: agreed[id(store)].part(section.tiles) for name, store in unit.stores.items() if id(store) in agreed
        }
        if id(unit) in fused:
            assert kernels is not None
            kernels.step(fused[id(unit)], unit, section, known)
            continue
        flat = active[id(unit)]
        if exact is not None and flat.exact:
            states = {name: store.stored for name, store in section.stores.items()}
            kept = [(state[p], state[p].clone()) for p in flat.resting(section.elements) for state in states.values()]
            exact(flat.weight[section.elements], flat.grad[section.elements], states)
            for view, value in kept:
                view.copy_(value)
            continue
        for span, spans in section.spans(units.device):
            weight, new = _update(rule, h, flat, section, span, spans, scalars, observed)
            if observed is None:
                flat.store(section, span, weight)
            for name, value in new.items():
                section.stores[name].encode(spans[name], value, known.get(name), keys(name))
    for flat in active.values():
        flat.write_back(inert)
    for unit in stepping:
        for window in unit.windows:
            window.finish()


def _is_plain(unit: Unit) -> bool:
    """Whether all is fp32, so that it is in a unit only for being paged: it is stepped as what is not in units."""
    return unit.master is None and all(isinstance(store.codec, FP32) for store in unit.stores.values())


def _update(
    rule: Rule,
    h: Any,
    flat: _Flat,
    section: Section,
    span: slice,
    spans: dict[str, Span],
    scalars: dict[str, Tensor],
    observed: str | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The rule on a span: new weights (the same where something is `observed`), new states."""
    view = StateView({**{name: section.stores[name].decode(of) for name, of in spans.items()}, **scalars})
    grad, weight = flat.grad[span].float(), flat.load(section, span)
    if observed is None:
        value = rule.update(grad, weight, view, h)
    else:
        rule.observe(observed, grad, view, h)
        value = weight
    for name in scalars:
        view.new.pop(name, None)
    for part in flat.resting(span):
        for name, new in view.new.items():
            view.new[name] = torch.cat([new[: part.start], view.old[name][part], new[part.stop :]])
    return value, view.new
