"""Elementwise rules: no pieces, no requests; flat slices of any length, in the chunks that suit the hardware.

Many fp32 ones are stepped where they are, by one call of a compiled kernel, where there is one. Of the others small ones
are packed into one slab, so that a thousand of them cost one call; large ones are stepped in place, by a fused kernel
where the table has one, else by the rule's text in chunks that stay in cache.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from distopt.coded_step import step_units
from distopt.comm.groups import Domain, Domains
from distopt.kernels import LANES, fused_kernel
from distopt.kernels.exact import exact_kernel
from distopt.kernels.native import build_many
from distopt.layouts import local_tensor
from distopt.plan.buckets import GroupPlan
from distopt.plan.tiles import CHUNK, SMALL
from distopt.plan.trace import step_values
from distopt.rule import Rule, Shape, State, StateView
from distopt.state.allocation import allocate, collapse
from distopt.state.commit import put
from distopt.state.lying import MANY, Lying, make_lying
from distopt.state.pages.pager import Pager
from distopt.state.placed import Placed
from distopt.state.units import Unit, Units
from distopt.state.windows import Window, initial, refuse_sparse, scaled
from distopt.verdict import on_device, square_sums


@dataclass
class Part:
    """Flat tensors that are stepped together: weight, gradient, states."""

    weight: Tensor
    grad: Tensor
    states: dict[str, Tensor]


class BoundElementwise:
    """An elementwise parameter group bound to its tensors."""

    def __init__(
        self,
        plan: GroupPlan,
        windows: list[Window],
        domains: Domains,
        device: torch.device,
        pager: Pager | None = None,
    ) -> None:
        self.plan, self.windows, self.device = plan, windows, device
        self.gpu = device.type != "cpu"
        declared = plan.rule.states(Shape(1, 1, 1))
        states = {name: state for name, state in declared.items() if state.kind == "like"}
        self.scalars = {
            name: torch.full((), float(state.fill), device=device)
            for name, state in declared.items()
            if state.kind == "group"
        }
        layouts = [spec.layout for spec in plan.specs]
        units = [
            Unit(plan, windows, members, states, domains[layouts[members[0]].ranks], pager)
            for members in plan.storage.pack(layouts, [spec.dtype for spec in plan.specs], states)
        ]
        self.units = Units(plan, units, domains, device, None, pager)
        exact = [i for i in range(len(windows)) if i not in self.units.of]
        # The last ones first: their gradients are what the verdict has left in cache.
        self.placed = self._place([i for i in exact[::-1] if windows[i].param.dtype == torch.float32], states)
        placed = set(self.placed.numbers if self.placed is not None else ())
        exact = [i for i in exact if i not in placed]
        self.small = sorted((i for i in exact if windows[i].numel < SMALL), key=lambda i: windows[i].holders)
        self.large = [i for i in exact if windows[i].numel >= SMALL]
        packed = sum(windows[i].numel for i in self.small)
        self.padded = -(-packed // LANES) * LANES
        self.lying = make_lying(windows)
        self._found: Lying | None = None  # where all gradients lie that were last collected, if that is known
        self.weights = torch.zeros(self.padded, device=device)
        self.grads = torch.zeros(self.padded, device=device)
        self.slabs: dict[str, Tensor] = {}
        self._sizes = sizes = [windows[i].numel for i in self.small]
        for name, state in states.items():
            slab = self.slabs[name] = torch.zeros(self.padded, device=device)
            for i, part in zip(self.small, slab[:packed].split(sizes)):
                windows[i].state[name] = part.copy_(initial(state, windows[i].numel, windows[i].weight, device))
            for i in self.large:
                windows[i].state[name] = initial(state, windows[i].numel, windows[i].weight, device)
        self._weight_views = self._shaped(self.weights[:packed])
        self._grad_views = self._shaped(self.grads[:packed])
        self._segments: list[tuple[int, int, int]] = []  # of the slab: start, stop, ranks that hold a copy
        start = 0
        for holders, members in groupby(self.small, key=lambda i: windows[i].holders):
            stop = start + sum(windows[i].numel for i in members)
            self._segments.append((start, stop, holders))
            start = stop
        # Plain contiguous fp32 parameters are packed by one concatenation; what else there is, tensor by tensor.
        self._plain = [windows[i].param for i in self.small] if all(windows[i].simple for i in self.small) else None
        self._flat = self._plain is not None and all(param.ndim == 1 for param in self._plain)
        self._alone = {i: local_tensor(windows[i].param).numel() for i in [*self.large, *sorted(self.units.of)]}
        self._factor = 1.0  # of the gradients of what is placed
        # The factor of gradients of lower precision in units, if that is on the device.
        self._left: Tensor | None = None

    def _place(self, numbers: list[int], states: dict[str, State]) -> Placed | None:
        """Make the states of what a compiled kernel steps where it is, if there are enough of these parameters."""
        kernel = exact_kernel(self.plan.rule) if len(numbers) >= MANY and not self.gpu and build_many() else None
        if kernel is None:
            return None
        windows = [self.windows[i] for i in numbers]
        sizes = [window.numel for window in windows]
        for window in windows:
            collapse(window.raw)
        for name, state in states.items():
            slab = allocate(sum(sizes), torch.float32, self.device)
            for window, part in zip(windows, slab.split(sizes)):  # one after the other, as they are read
                window.state[name] = part.copy_(initial(state, window.numel, window.weight, self.device))
        return Placed(kernel, numbers, windows, tuple(states))

    def _shaped(self, slab: Tensor) -> list[Tensor]:
        parts = slab.split([self.windows[i].numel for i in self.small])
        return [part.view(self.windows[i].raw_shape()) for i, part in zip(self.small, parts)]

    def collect(self, grads: list[Tensor | None]) -> None:
        """Take the gradients; missing ones, None, are zero.

        Raises:
            ValueError: a parameter is no longer what was bound, or has a sparse gradient.
        """
        self._factor, self._left = 1.0, None
        self._found = self.lying if self.lying is not None and self.lying.find(grads) else None
        if self._found is None:
            refuse_sparse(self.windows, grads)
        if self.placed is not None:
            self.placed.collect(grads, self._found)
        small = [grads[i] for i in self.small]
        present = [k for k, grad in enumerate(small) if grad is not None]
        if self._found is None and self._plain is not None:
            self._check_sizes(small)
        if self._packs_plainly() and len(present) == len(small):
            self._pack(small, self.grads)  # type: ignore[arg-type]
        else:
            if present:
                torch._foreach_copy_(
                    [self._grad_views[k] for k in present], [self.windows[self.small[k]].raw_grad() for k in present]
                )
            for view, grad in zip(self._grad_views, small):
                if grad is None:
                    view.zero_()
        self._large_grads: dict[int, Tensor]
        if self._found is not None:
            self._large_grads = {i: grads[i] for i in self._alone}  # type: ignore[misc]
        else:
            self._large_grads = {
                i: self.windows[i].grad_at_address(grads[i], numel, self.device) for i, numel in self._alone.items()
            }

    def _check_sizes(self, small: list[Tensor | None]) -> None:
        assert self._plain is not None
        for tensors in (self._plain, small):
            sizes = [size if tensor is None else tensor.numel() for tensor, size in zip(tensors, self._sizes)]
            if sizes != self._sizes:
                number = next(k for k, size in enumerate(sizes) if size != self._sizes[k])
                self.windows[self.small[number]].check(sizes[number], self._sizes[number], self.device.type)

    def squares(self) -> list[tuple[float, int]]:
        """Sums of squares of the gradients last collected, with the number of ranks that hold one copy."""
        if self._found is not None and self._found.wide:
            return self._found.squares()
        slabs = [self.grads[start:stop] for start, stop, _ in self._segments]
        holders = [self.windows[i].holders for i in self._large_grads] + [copies for _, _, copies in self._segments]
        found = list(zip(square_sums([*self._large_grads.values(), *slabs]), holders))
        return found + (self.placed.squares() if self.placed is not None else [])

    @property
    def sums(self) -> int:
        """How many sums are `found`."""
        return len(self._alone) + len(self._segments)

    def found(self) -> Tensor:
        """The same sums (sums,) on the device, in fp64."""
        return on_device([*self._large_grads.values(), *(self.grads[start:stop] for start, stop, _ in self._segments)])

    def not_finite(self, squares: list[float]) -> list[int]:
        """Which parameters had gradients that were not finite, of what was `found`."""
        large = [number for number, square in zip(self._alone, squares) if not math.isfinite(square)]
        if all(map(math.isfinite, squares[len(self._alone) :])):
            return large
        return large + [i for i, grad in zip(self.small, self._grad_views) if not grad.isfinite().all()]

    def watch(self) -> None:
        """Nothing here fails on the device."""

    def alarm(self) -> str | None:
        """What must stop training: pages that are lost."""
        return self.units.alarm()

    def _packs_plainly(self) -> bool:
        """Whether small parameters are as plain and contiguous now as they were at bind."""
        return bool(self._plain) and all(map(torch.Tensor.is_contiguous, self._plain or ()))

    def _pack(self, tensors: list[Tensor], slab: Tensor) -> None:
        flat = tensors if self._flat else [tensor.reshape(-1) for tensor in tensors]
        torch.cat(flat, out=slab[: self._segments[-1][1]])

    def scale(self, factor: float | Tensor) -> None:
        """Multiply the gradients last collected: in place, or in fp32 where they are of lower precision."""
        if self.placed is not None:
            assert isinstance(factor, float)
            self.placed.scale(factor)
        torch.mul(self.grads, factor, out=self.grads)
        # A factor on the device is read by kernels: gradients of lower precision would need an fp32 copy, in every step.
        self._left = factor if isinstance(factor, Tensor) else None
        left = {
            i: grad
            for i, grad in self._large_grads.items()
            if self._left is not None and i in self.units.of and grad.dtype != torch.float32
        }
        now = {i: grad for i, grad in self._large_grads.items() if i not in left}
        left |= zip(now, scaled(list(now.values()), factor))
        self._take([left[i] for i in self._large_grads])
        self._return_grads()

    def negate(self) -> None:
        """Turn the gradients last collected around; those of the parameters stay as they are."""
        self._factor = -self._factor
        self.grads.neg_()
        self._take([-grad for grad in self._large_grads.values()])

    def _take(self, grads: list[Tensor]) -> None:
        """Go on with these gradients of what is stepped alone."""
        if any(map(operator.is_not, grads, self._large_grads.values())):
            self._found = None
        self._large_grads = dict(zip(self._large_grads, grads))

    def step(
        self, rule: Rule, step: int, inert: set[int], union: Domain, *, final: bool, ok: Tensor | None = None
    ) -> None:
        """Step every parameter with the gradients last collected; `inert` ones are left alone. The states of the group
        change with the `final` call of a step. See `put` for `ok`."""
        h = step_values(rule, step, Shape(1, 1, 1), self.gpu)
        left = self.placed
        assert left is None or ok is None
        if left is not None and left.step(rule, h, inert, self._factor):
            left = None
        found_inf = None if ok is None else ok.logical_not().float()
        large = [i for i in self.large if i not in inert]
        weights = {i: self.windows[i].weight() for i in large}
        kernel = fused_kernel(rule)
        parts: list[Part] = []
        plain = self._packs_plainly()
        if self.small:
            saved = self._saved(inert)
            if plain:
                assert self._plain is not None
                views = self._plain
                self._pack(views, self.weights)
            else:
                views = [self.windows[i].raw_weight() for i in self.small]
                torch._foreach_copy_(self._weight_views, views)
            parts.append(Part(self.weights, self.grads, self.slabs))
        for i in large:
            parts.append(Part(weights[i], self._large_grads[i].view(-1), self.windows[i].state))
        if left is not None:
            parts += [Part(*found) for found in left.parts(inert, self._factor)]
        fused = [p for p in parts if kernel is not None and p.weight.dtype == p.grad.dtype == torch.float32]
        if kernel is not None and fused:
            with _aligned(fused, self.device) as lists:
                kernel(rule, step, *lists, found_inf)
        for part in parts:
            if kernel is None or not any(part is done for done in fused):
                self._run(rule, step, part, ok=ok)
        if self.small:
            kept = [k for k, i in enumerate(self.small) if i not in inert] if inert else range(len(self.small))
            if kept:
                torch._foreach_copy_([views[k] for k in kept], [self._weight_views[k] for k in kept])
            self._restore(saved)
            if not plain:
                for i in self.small:
                    self.windows[i].finish()
        for i in large:
            self.windows[i].finish()
        if left is not None:
            left.finish()

        def exact(weight: Tensor, grad: Tensor, states: dict[str, Tensor]) -> None:
            assert kernel is not None
            with _aligned([Part(weight, grad, states)], weight.device) as lists:
                kernel(rule, step, *lists, found_inf)

        stepped = exact if kernel is not None else None
        given = self.units, rule, step, inert, self._large_grads, self.gpu, self.scalars
        step_units(*given, exact=stepped, lying=self._found, ok=ok, factor=self._left)
        if self.scalars and final:
            nothing = torch.empty(0, device=self.device)
            view = StateView({**dict.fromkeys(self.slabs, nothing), **self.scalars})
            rule.update(nothing, nothing, view, step_values(rule, step, Shape(1, 1, 1), self.gpu))
            for name, value in view.new.items():
                if name in self.scalars:
                    put(self.scalars[name], value, ok)

    def release(self) -> None:
        """Forget the gradients last collected: zero_grad() is to free them."""
        self._large_grads = {}
        if self.placed is not None:
            self.placed.release()

    def scalar_state(self, name: str) -> Tensor:
        """A state of the group, 0-D."""
        return self.scalars[name]

    def observe(self, rule: Rule, name: str, step: int, values: list[Tensor] | None, inert: set[int]) -> None:
        """Feed what was last collected to the rule as an observation; `inert` parameters keep their states."""
        assert values is None, "an elementwise rule observes what is collected as gradients are"
        parts = [(self._large_grads[i].view(-1), self.windows[i].state) for i in self.large if i not in inert]
        saved = self._saved(inert)
        for grad, states in [*parts, (self.grads, self.slabs)]:
            self._run(rule, step, Part(grad, grad, states), name)
        self._restore(saved)
        step_units(self.units, rule, step, inert, self._large_grads, self.gpu, self.scalars, name)

    def _saved(self, inert: set[int]) -> dict[int, dict[str, Tensor]]:
        """Copies of the states of small `inert` parameters, which are computed with their neighbours."""
        return {i: {n: t.clone() for n, t in self.windows[i].state.items()} for i in self.small if i in inert}

    def _restore(self, saved: dict[int, dict[str, Tensor]]) -> None:
        for i, states in saved.items():
            for name, value in states.items():
                self.windows[i].state[name].copy_(value)

    def _return_grads(self) -> None:
        """Leave small gradients scaled as well, but for expanded ones, which have no memory for it."""
        present = [k for k, i in enumerate(self.small) if self.windows[i].writable_grad()]
        if present:
            torch._foreach_copy_(
                [self.windows[self.small[k]].raw_grad() for k in present], [self._grad_views[k] for k in present]
            )

    def _run(self, rule: Rule, step: int, part: Part, observed: str | None = None, ok: Tensor | None = None) -> None:
        """Step a part by the rule's text, or feed its gradient to the rule as an observation."""
        h = step_values(rule, step, Shape(1, 1, 1), self.gpu)
        size = part.weight.numel() if self.gpu else CHUNK
        for start in range(0, part.weight.numel(), max(size, 1)):
            chunk = slice(start, start + size)
            view = StateView({**{name: state[chunk] for name, state in part.states.items()}, **self.scalars})
            grad = part.grad[chunk].float()
            if observed is not None:
                rule.observe(observed, grad, view, h)
            else:
                put(part.weight[chunk], rule.update(grad, part.weight[chunk].float(), view, h), ok)
            for name, value in view.new.items():
                if name not in self.scalars:
                    put(part.states[name][chunk], value, ok)


class _aligned:
    """Lists for a fused kernel whose lengths are multiples of LANES: the ends of all parts are stepped together in a
    scratch, and copied back on leaving."""

    def __init__(self, parts: list[Part], device: torch.device) -> None:
        self.parts, self.device = parts, device
        self.ends = [part for part in parts if part.weight.numel() % LANES]

    def __enter__(self) -> tuple[list[Tensor], list[Tensor], dict[str, list[Tensor]]]:
        names = list(self.parts[0].states)
        heads = [part.weight.numel() // LANES * LANES for part in self.parts]
        weights = [part.weight[:n] for part, n in zip(self.parts, heads)]
        grads = [part.grad[:n] for part, n in zip(self.parts, heads)]
        states = {name: [part.states[name][:n] for part, n in zip(self.parts, heads)] for name in names}
        if self.ends:
            columns = [[part.weight for part in self.ends], [part.grad for part in self.ends]]
            columns += [[part.states[name] for part in self.ends] for name in names]
            self.tails = [[t[t.numel() // LANES * LANES :] for t in column] for column in columns]
            self.scratch = torch.zeros((len(columns), LANES * len(self.ends)), device=self.device)
            self.slots = [
                [row[k * LANES : k * LANES + t.numel()] for k, t in enumerate(column)]
                for row, column in zip(self.scratch, self.tails)
            ]
            for slots, tails in zip(self.slots, self.tails):
                torch._foreach_copy_(slots, tails)
            weights.append(self.scratch[0])
            grads.append(self.scratch[1])
            for k, name in enumerate(names):
                states[name].append(self.scratch[2 + k])
        return weights, grads, states

    def __exit__(self, *error: object) -> None:
        if self.ends and error[0] is None:
            for slots, tails in self._changed():
                torch._foreach_copy_(tails, slots)

    def _changed(self) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        pairs = list(zip(self.slots, self.tails))
        yield pairs[0]
        yield from pairs[2:]
