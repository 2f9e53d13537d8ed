"""The step of an elementwise rule on states stored as codes: decode a span, run the rule, encode it, span by span.

A tile that an edge of a shard cuts needs its scale before it is encoded: spans with such tiles are computed twice, first
only for the maxima of what the rule returns, on which the ranks then agree by one reduction per group.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from distopt.plan.tiles import CHUNK, GPU_CHUNK
from distopt.plan.trace import step_values
from distopt.rule import Rule, Shape, StateView
from distopt.state.coded import Span
from distopt.state.noise import Key
from distopt.state.units import Unit, Units


class _Flat:
    """A unit's weights and gradients, flat, and where members lie that do not step."""

    def __init__(self, unit: Unit, grads: dict[int, Tensor], inert: set[int]) -> None:
        self.unit = unit
        self.idle = [unit.parts[i] for i in unit.members if i in inert]
        self.alone = len(unit.members) == 1
        self.weight = unit.windows[0].weight() if self.alone else torch.cat([unit.weight(i) for i in unit.members])
        self.grad = grads[unit.members[0]] if self.alone else torch.cat([grads[i].float() for i in unit.members])

    def load(self, span: slice) -> Tensor:
        """fp32 weights of a span."""
        unit = self.unit
        if self.alone and unit.master is not None and unit.rest is not None:
            return unit.master.join(self.weight[span], unit.rest[span])
        return self.weight[span].float()

    def store(self, span: slice, value: Tensor) -> None:
        """New fp32 weights of a span."""
        unit = self.unit
        if self.alone and unit.master is not None and unit.rest is not None:
            value, unit.rest[span] = unit.master.split(value, self.weight.dtype)
        self.weight[span].copy_(value)

    def write_back(self, inert: set[int]) -> None:
        """Give the parameters what was computed for them."""
        for i, window in zip(self.unit.members, self.unit.windows):
            if not self.alone and i not in inert:
                self.unit.set_weight(i, self.weight[self.unit.parts[i]])
            window.finish()


def step_units(
    units: Units,
    rule: Rule,
    step: int,
    inert: set[int],
    grads: dict[int, Tensor],
    gpu: bool,
    scalars: dict[str, Tensor],
    observed: str | None = None,
) -> None:
    """Step every unit with these gradients (flat, by parameter number), or feed them to the rule as what is `observed`;
    members that are `inert` are left alone, and so are the states of the group, `scalars`."""
    h = step_values(rule, step, Shape(1, 1, 1), gpu)
    active = [(unit, _Flat(unit, grads, inert)) for unit in units.units if not inert.issuperset(unit.members)]
    found = []
    for unit, flat in active:
        if any(unit.slots.values()):
            maxima = {name: store.cut_maxima(None) for name, store in unit.stores.items() if unit.slots[name]}
            for span, spans in _spans(unit):
                if any(unit.stores[name].is_cut(spans[name]) for name in maxima):
                    new = _update(rule, h, flat, span, spans, scalars, observed)[1]
                    for name in maxima.keys() & new.keys():
                        unit.stores[name].note_cuts(spans[name], new[name], maxima[name])
            found += [(unit, name, values) for name, values in maxima.items()]
    agreed = units.agreed(found)
    for unit, flat in active:
        for span, spans in _spans(unit):
            weight, new = _update(rule, h, flat, span, spans, scalars, observed)
            if observed is None:
                flat.store(span, weight)
            for name, value in new.items():
                store = unit.stores[name]
                store.encode(spans[name], value, agreed.get(id(store)), Key(units.plan.storage.seed, step, name))
        flat.write_back(inert)


def _spans(unit: Unit) -> Iterator[tuple[slice, dict[str, Span]]]:
    """Runs of a unit's elements, with the span of each store."""
    chunk = GPU_CHUNK if unit.windows[0].param.is_cuda else CHUNK
    for number, (_, _, start, stop) in enumerate(unit.tiles.spans(chunk)):
        yield slice(start, stop), {name: store.spans[number] for name, store in unit.stores.items()}


def _update(
    rule: Rule,
    h: Any,
    flat: _Flat,
    span: slice,
    spans: dict[str, Span],
    scalars: dict[str, Tensor],
    observed: str | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The rule on a span: new weights (the same where something is `observed`), new states."""
    view = StateView({**{name: flat.unit.stores[name].decode(of) for name, of in spans.items()}, **scalars})
    grad, weight = flat.grad[span].float(), flat.load(span)
    if observed is None:
        value = rule.update(grad, weight, view, h)
    else:
        rule.observe(observed, grad, view, h)
        value = weight
    for name in scalars:
        view.new.pop(name, None)
    for idle in flat.idle:
        part = slice(max(idle.start - span.start, 0), min(idle.stop, span.stop) - span.start)
        if part.stop <= part.start:
            continue
        for name, new in view.new.items():
            view.new[name] = torch.cat([new[: part.start], view.old[name][part], new[part.stop :]])
    return value, view.new
