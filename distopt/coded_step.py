"""The step of an elementwise rule on states stored as codes: by a kernel where there is one for all the rule's states, else
decode a span, run the rule, encode it, span by span.

A tile that an edge of a shard cuts needs its scale before it is encoded: spans with such tiles are computed twice, first
only for the maxima of what the rule returns, on which the ranks then agree by one reduction per group.

Sections that are stepped on the host come last: their gradients and weights are copied there, those of the next while one
is stepped, and the weights copied back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from distopt.kernels.jobs import CodedKernel
from distopt.plan.tiles import SMALL
from distopt.plan.trace import step_values
from distopt.rule import Rule, Shape, StateView
from distopt.state.codecs import FP32
from distopt.state.coded import Agreed, Span
from distopt.state.commit import put
from distopt.state.fused import Fused
from distopt.state.lying import Lying
from distopt.state.noise import Key
from distopt.state.units import Section, Unit, Units
from distopt.state.windows import wide

Exact = Callable[[Tensor, Tensor, dict[str, Tensor]], None]


class _Flat:
    """A unit's weights and gradients, flat, and where members lie that do not step. With `fused`, a kernel for fp32 states
    is there; it then is what steps the unit (`exact`) if fp32 is all that there is, as it steps what is not in units.

    Attributes:
        first: the unit's element that they begin with.
    """

    first = 0

    def __init__(self, unit: Unit, grads: dict[int, Tensor], inert: set[int], *, fused: bool) -> None:
        self.unit = unit
        self.idle = [unit.parts[i] for i in unit.members if i in inert]
        exact = fused and _is_plain(unit)
        self.alone = len(unit.members) == 1 and not (exact and unit.tiles.numel < SMALL)
        weights = [window.weight() for window in unit.windows]
        given = [grads[i].view(-1) for i in unit.members]
        if self.alone:
            self.weight, self.grad = weights[0], given[0]
        else:
            self.weight = torch.cat([w.float() for w in weights] if exact else weights)
            self.grad = torch.cat([grad.float() for grad in given])
        self.exact = exact and self.weight.dtype == self.grad.dtype == torch.float32

    def load(self, section: Section, span: slice) -> Tensor:
        """fp32 weights of a span."""
        unit = self.unit
        weight = self.weight[self.at(span)]
        if unit.master is None or section.rest is None:
            return weight.float()
        return unit.master.join(weight, section.rest[section.within(span)])

    def store(self, section: Section, span: slice, value: Tensor, ok: Tensor | None) -> None:
        """New fp32 weights of a span; members that do not step keep theirs. See `put` for `ok`."""
        unit = self.unit
        if unit.master is not None and section.rest is not None:
            rest, old = section.rest[section.within(span)], None
            value, new = unit.master.split(value, self.weight.dtype)
            for part in self.resting(span):
                old = rest.clone() if old is None else old
                new[part] = old[part]
            put(rest, new, ok)
        put(self.weight[self.at(span)], value, ok)

    def at(self, span: slice) -> slice:
        """Where elements of the unit lie here."""
        return slice(span.start - self.first, span.stop - self.first)

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


class _Guest(_Flat):
    """The same of one section, on the host: copies, which are to `arrive` before they are used and `leave` afterwards."""

    def __init__(
        self,
        unit: Unit,
        section: Section,
        weights: dict[int, Tensor],
        grads: dict[int, Tensor],
        inert: set[int],
        *,
        fused: bool,
    ) -> None:
        self.unit, self.first = unit, section.elements.start
        self.idle = [unit.parts[i] for i in unit.members if i in inert]
        run, parts = section.elements, unit.parts.items()
        pieces = [(i, slice(max(run.start, p.start) - p.start, min(run.stop, p.stop) - p.start)) for i, p in parts]
        pieces = [(i, piece) for i, piece in pieces if piece.stop > piece.start]
        self.homes = [(weights[i][piece], i in inert) for i, piece in pieces]
        self.weight = _copied([home for home, _ in self.homes])
        self.grad = _copied([grads[i].view(-1)[piece] for i, piece in pieces])
        self._plain = fused and _is_plain(unit)
        self._copied = None
        if self.homes and self.homes[0][0].is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()

    def arrive(self) -> None:
        """Wait for the copies."""
        if self._copied is not None:
            self._copied.synchronize()
        if self._plain:
            self.weight, self.grad = self.weight.float(), self.grad.float()
        self.exact = self._plain

    def leave(self) -> None:
        """Give the parameters what was computed for them."""
        for (home, idle), value in zip(self.homes, self.weight.split([home.numel() for home, _ in self.homes])):
            if not idle:
                home.copy_(value, non_blocking=True)


def _copied(pieces: list[Tensor]) -> Tensor:
    """These one after the other in host memory, soon."""
    dtypes, pinned = {piece.dtype for piece in pieces}, any(piece.is_cuda for piece in pieces)
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    host = torch.empty(sum(piece.numel() for piece in pieces), dtype=dtype, pin_memory=pinned)
    for target, piece in zip(host.split([piece.numel() for piece in pieces]), pieces):
        target.copy_(piece, non_blocking=True)
    return host


@dataclass
class _Step:
    """A step of a rule, for section after section: by a kernel of `kernels`, if it was `found` for the unit; by `exact`, if
    all is fp32; or by the rule's text, which is also fed what is `observed`. See `put` for `ok`."""

    rule: Rule
    h: Any
    keys: Callable[[str], Key]
    kernels: Fused | None
    found: dict[int, CodedKernel]
    scalars: dict[str, Tensor]
    observed: str | None
    exact: Exact | None
    ok: Tensor | None

    def look(self, unit: Unit, section: Section, flat: _Flat | None, maxima: dict[str, Tensor]) -> None:
        """Note the maxima of tiles that an edge of a shard cuts, by state, in the order of the unit's cuts."""
        if id(unit) in self.found:
            assert self.kernels is not None
            for name, values in self.kernels.look(self.found[id(unit)], unit, section, *_parts(flat)).items():
                maxima[name][section.cuts] = values
            return
        assert flat is not None
        for span, spans in section.spans():
            if any(section.stores[name].is_cut(spans[name]) for name in maxima):
                new = self._update(flat, section, span, spans)[1]
                for name in maxima.keys() & new.keys():
                    section.stores[name].note_cuts(spans[name], new[name], maxima[name][section.cuts])

    def take(self, unit: Unit, section: Section, flat: _Flat | None, known: dict[str, Agreed]) -> None:
        """Step a section, with these maxima of its cut tiles."""
        if id(unit) in self.found:
            assert self.kernels is not None
            self.kernels.step(self.found[id(unit)], unit, section, known, *_parts(flat))
            return
        assert flat is not None
        if self.exact is not None and flat.exact:
            states = {name: store.stored for name, store in section.stores.items()}
            kept = [(state[p], state[p].clone()) for p in flat.resting(section.elements) for state in states.values()]
            run = flat.at(section.elements)
            self.exact(flat.weight[run], flat.grad[run], states)
            for view, value in kept:
                view.copy_(value)
            return
        for span, spans in section.spans():
            weight, new = self._update(flat, section, span, spans)
            if self.observed is None:
                flat.store(section, span, weight, self.ok)
            for name, value in new.items():
                section.stores[name].encode(spans[name], value, known.get(name), self.keys(name), self.ok)

    def _update(
        self, flat: _Flat, section: Section, span: slice, spans: dict[str, Span]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The rule on a span: new weights (the same where something is `observed`), new states."""
        scalars = {name: value.to(section.device) for name, value in self.scalars.items()}
        view = StateView({**{name: section.stores[name].decode(of) for name, of in spans.items()}, **scalars})
        grad, weight = flat.grad[flat.at(span)].float(), flat.load(section, span)
        if self.observed is None:
            value = self.rule.update(grad, weight, view, self.h)
        else:
            self.rule.observe(self.observed, grad, view, self.h)
            value = weight
        for name in scalars:
            view.new.pop(name, None)
        for part in flat.resting(span):
            for name, new in view.new.items():
                view.new[name] = torch.cat([new[: part.start], view.old[name][part], new[part.stop :]])
        return value, view.new


def _parts(flat: _Flat | None) -> tuple[Tensor | None, Tensor | None]:
    """The weights and gradients of a section that were copied, for a kernel; it finds others where they lie."""
    return (flat.weight, flat.grad) if isinstance(flat, _Guest) else (None, None)


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
    lying: Lying | None = None,
    ok: Tensor | None = None,
    factor: Tensor | None = None,
) -> None:
    """Step every unit with these gradients (contiguous, by parameter number), or feed them to the rule as what is `observed`;
    members that are `inert` are left alone, and so are the states of the group, `scalars`. `exact` is the kernel for
    weights, gradients and states that are all fp32, which knows of `ok` (see `put`); `lying` knows where weights and gradients
    lie. By `factor` gradients of lower precision are yet to be multiplied, which kernels do."""
    h = step_values(rule, step, Shape(1, 1, 1), gpu)
    stepping = [unit for unit in units.units if not inert.issuperset(unit.members)]
    keys = partial(Key, units.plan.storage.seed, step)
    kernels = Fused(rule, h, grads, inert, keys, units.allowed, lying, ok, factor) if observed is None else None
    coded = [unit for unit in stepping if not _is_plain(unit)]
    fused = {id(unit): kernel for unit in coded if kernels and (kernel := kernels.find(unit))}
    exact = exact if observed is None else None
    taken = _Step(rule, h, keys, kernels, fused, scalars, observed, exact, ok)
    rest = [unit for unit in stepping if id(unit) not in fused and not unit.hosted]
    if factor is not None:
        grads = grads | {i: wide(grads[i], factor) for unit in rest for i in unit.members}
    active = {id(unit): _Flat(unit, grads, inert, fused=exact is not None) for unit in rest}
    everything = [(unit, section) for unit in stepping for section in unit.sections]
    moving, hosted = ([one for one in everything if one[1].hosted == there] for there in (False, True))
    # Asked again, a window that is not contiguous would give another copy.
    weights = {i: w.weight() for unit in stepping if unit.hosted for i, w in zip(unit.members, unit.windows)}
    visits = partial(_visits, weights=weights, grads=grads, inert=inert, fused=exact is not None)
    found = {}
    for unit in stepping:
        if any(unit.slots.values()):
            maxima = {name: store.cut_maxima(None) for name, store in unit.stores.items() if unit.slots[name]}
            found[id(unit)] = maxima
    cut = [(unit, section) for unit, section in everything if id(unit) in found and section.is_cut]
    for unit, section in units.walk([one for one in cut if not one[1].hosted], write=False):
        taken.look(unit, section, active.get(id(unit)), found[id(unit)])
    for unit, section, guest in visits([one for one in cut if one[1].hosted], write=False):
        taken.look(unit, section, guest, found[id(unit)])
    agreed = units.agreed([(unit, name, v) for unit in stepping for name, v in found.get(id(unit), {}).items()])

    def known(unit: Unit, section: Section) -> dict[str, Agreed]:
        stores = {name: agreed[id(store)] for name, store in unit.stores.items() if id(store) in agreed}
        return {name: maxima.part(section.tiles).to(section.device) for name, maxima in stores.items()}

    for unit, section in units.walk(moving):
        taken.take(unit, section, active.get(id(unit)), known(unit, section))
    if kernels is not None:
        kernels.finish()
        # A kernel writes to addresses: what was saved of these weights for a backward pass is another number now.
        written = [unit for unit in stepping if id(unit) in fused and not unit.hosted]
        moved = [w for unit in written for i, w in zip(unit.members, unit.windows) if i not in inert]
        torch.autograd.graph.increment_version([w.raw if lying is None else w.param for w in moved])
    for unit, section, guest in visits(hosted, write=True):
        taken.take(unit, section, guest, known(unit, section))
        if observed is None:
            guest.leave()
    for flat in active.values():
        flat.write_back(inert)
    if lying is None:  # else all are contiguous
        for unit in stepping:
            for window in unit.windows:
                window.finish()


def _visits(
    sections: list[tuple[Unit, Section]],
    weights: dict[int, Tensor],
    grads: dict[int, Tensor],
    inert: set[int],
    *,
    fused: bool,
    write: bool,
) -> Iterator[tuple[Unit, Section, _Guest]]:
    """These sections in turn, open, with what was copied to the host; that of the next one is on its way by then."""
    coming = (_Guest(unit, section, weights, grads, inert, fused=fused) for unit, section in sections)
    guest = next(coming, None)
    for unit, section in sections:
        assert guest is not None
        here, guest = guest, next(coming, None)
        here.arrive()
        with section.opened(write=write):
            yield unit, section, here


def _is_plain(unit: Unit) -> bool:
    """Whether all is fp32, so that it is in a unit only for being paged: it is stepped as what is not in units."""
    return unit.master is None and all(isinstance(store.codec, FP32) for store in unit.stores.values())
