"""The engine: a parameter group bound to its tensors, and the steps of its buckets.

It knows buckets and states; no rule by name and no layout by kind.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from distopt.bucket import BoundBucket
from distopt.comm.groups import Domain, Domains
from distopt.comm.pipeline import Run, run_pipelined
from distopt.deferred import Reading
from distopt.plan.buckets import Entry, GroupPlan
from distopt.plan.build import IN_FLIGHT
from distopt.rule import Rule, Shape
from distopt.state.coded import Coded
from distopt.state.commit import put
from distopt.state.pages.pager import Pager
from distopt.state.sections import Paged
from distopt.state.units import Unit, Units
from distopt.state.windows import Slabs, Window, refuse_sparse, scaled, store_maker
from distopt.state.working import Working
from distopt.verdict import on_device, square_sums


class BoundGroup:
    """One parameter group bound to its tensors: windows, buckets and states."""

    def __init__(
        self,
        plan: GroupPlan,
        windows: list[Window],
        domains: Domains,
        device: torch.device,
        pager: Pager | None = None,
    ) -> None:
        self.plan, self.windows, self.domains, self.device = plan, windows, domains, device
        make = store_maker(plan, device, pager)
        pieces: dict[int, list[Any]] = {}
        for bucket in plan.buckets:
            for stack in bucket.stacks:
                for piece in stack.pieces:
                    pieces.setdefault(piece.param, []).append(piece)
        for found in pieces.values():
            found.sort(key=lambda piece: piece.rect.offset)
        self.buckets = [
            BoundBucket(
                bucket,
                plan.rule,
                windows,
                pieces,
                domains[bucket.ranks],
                device,
                plan.rounds(bucket.entries[0].shape),
                plan.storage,
                make,
            )
            for bucket in plan.buckets
        ]
        self.units = Units(plan, self._make_units(domains, pager), domains, device, self._find_coded_states(), pager)
        last = {entry.param: bound for bound in self.buckets for entry in bound.bucket.entries}
        for number in sorted(last):  # in the same order on every rank, whatever lies whole on some
            last[number].closes.append(number)
        states = plan.rule.states(Shape(8, 8))
        self.scalars = {
            name: torch.full((1, 1, 1), float(state.fill), device=device)
            for name, state in states.items()
            if state.kind == "group"
        }
        self._next: dict[str, Tensor] = {}
        self._watched: Reading | None = None
        self._owner_states = self._find_owner_states()
        self._alarms = [
            (
                f"{windows[entry.param].spec.name!r}: {name}",
                self._owner_states[entry.param, entry.matrix][name],
                state.limit,
            )
            for bound in self.buckets
            for entry in bound.bucket.entries
            for name, state in plan.rule.states(entry.shape).items()
            if state.limit is not None and (entry.param, entry.matrix) in self._owner_states
        ]

    def _make_units(self, domains: Domains, pager: Pager | None) -> list[Unit]:
        """The stores of states that are coded and lie as their parameters do, one unit per parameter."""
        units = []
        for number, window in enumerate(self.windows):
            layout, rule, storage = window.spec.layout, self.plan.rule, self.plan.storage
            shapes = self.plan.logical(number).shapes
            states = rule.states(shapes[0]) if shapes else {}
            lying = {name: s for name, s in states.items() if s.kind == "like" and storage.codec(name, s, layout.shape)}
            if lying or storage.mastered(window.spec.itemsize):
                units.append(Unit(self.plan, self.windows, [number], lying, domains[layout.ranks], pager))
        return units

    def collect(self, grads: list[Tensor | None]) -> None:
        """Take the gradients, flat; missing ones, None, are zero.

        Raises:
            ValueError: a sparse gradient.
        """
        refuse_sparse(self.windows, grads)
        self._grads = []
        for window, given in zip(self.windows, grads):
            grad = None if given is None else window.grad()
            self._grads.append(torch.zeros(window.numel, device=self.device) if grad is None else grad)

    def squares(self) -> list[tuple[float, int]]:
        """Sums of squares of the gradients last collected, with the number of ranks that hold one copy."""
        return list(zip(square_sums(self._grads), (window.holders for window in self.windows)))

    @property
    def sums(self) -> int:
        """How many sums are `found`."""
        return len(self.windows)

    def found(self) -> Tensor:
        """The same sums (sums,) on the device, in fp64."""
        return on_device(self._grads)

    def not_finite(self, squares: list[float]) -> list[int]:
        """Which parameters had gradients that were not finite, of what was `found`."""
        return [number for number, square in enumerate(squares) if not math.isfinite(square)]

    def scale(self, factor: float | Tensor) -> None:
        """Multiply the gradients last collected: in place, or in fp32 where they are of lower precision."""
        self._grads = scaled(self._grads, factor)

    def release(self) -> None:
        """Forget the gradients last collected: zero_grad() is to free them."""
        self._grads = []

    def negate(self) -> None:
        """Turn the gradients last collected around; those of the parameters stay as they are."""
        self._grads = [-grad for grad in self._grads]

    def step(
        self, rule: Rule, step: int, inert: set[int], union: Domain, *, final: bool, ok: Tensor | None = None
    ) -> None:
        """Update every parameter with the gradients last collected; `inert` ones are left alone. The states of the group
        change with the `final` call of a step. See `put` for `ok`."""
        run_pipelined(self.runs(rule, step, inert, union, final=final, ok=ok), IN_FLIGHT)
        self.finish(ok)

    def runs(
        self, rule: Rule, step: int, inert: set[int], union: Domain, *, final: bool, ok: Tensor | None = None
    ) -> Iterator[Run]:
        """The runs of the buckets; `finish` after the last one."""
        working = Working(self.units, self.windows, step, ok)
        scalars = dict(self.scalars)
        if final:
            self._next = scalars
        stepping = [b for b in self.buckets if not all(entry.param in inert for entry in b.bucket.entries)]
        self.units.expect([key for bucket in stepping for key in bucket.stored])
        for bucket in self.buckets:
            # Buckets without a parameter that steps are left out; the same ones on every rank.
            if not all(entry.param in inert for entry in bucket.bucket.entries):
                share = len(bucket.bucket.ranks) / union.size
                yield bucket.run(rule, step, self._grads, inert, working, scalars, share)

    def finish(self, ok: Tensor | None = None) -> None:
        """Write back what the runs left behind."""
        for name, value in self._next.items():
            put(self.scalars[name], value.view(1, 1, 1), ok)
        for window in self.windows:
            window.finish()

    def observe(self, rule: Rule, name: str, step: int, values: list[Tensor] | None, inert: set[int]) -> None:
        """Feed an observation to the rule: `values` per parameter, or what was last collected."""
        working = Working(self.units, self.windows, step)
        for bound in self.buckets:
            bound.observe(rule, name, step, self._grads if values is None else values, inert, working)
            for work in bound.close(inert, working):
                if work is not None:
                    work.wait()

    def watch(self) -> None:
        """Have the numbers brought that `alarm` is to look at."""
        if self._alarms:
            self._watched = Reading(torch.cat([tensor.view(-1) for _, tensor, _ in self._alarms]))

    def alarm(self) -> str | None:
        """What must stop training: a state that counts failures was above its limit when it was last watched."""
        values = self._watched.tolist() if self._watched is not None else []
        for value, (name, _, limit) in zip(values, self._alarms):
            if value > limit:
                return (
                    f"{name} is {value:g}, above {limit:g}: {type(self.plan.rule).__name__} failed to refresh it so many "
                    "times in a row. Its factor is not finite or too ill-conditioned: go back to an earlier checkpoint, "
                    "raise eps, or keep non-finite gradients out (nonfinite='raise' or 'skip')"
                )
        return self.units.alarm()

    def owner_state(self, param: int, matrix: int, name: str) -> Tensor:
        """A state (rows, cols) of a matrix that is computed on this rank: the state itself, or what it decodes to."""
        if (param, matrix, name) in self.units.owned:
            return self.units.owned[param, matrix, name].matrix()
        return self._owner_states[param, matrix][name]

    def find_owner_state(self, param: int, matrix: int, name: str) -> Tensor | None:
        """Like `owner_state`; None where another rank computes the matrix."""
        return self._owner_states.get((param, matrix), {}).get(name)

    def scalar_state(self, name: str) -> Tensor:
        """A state of the group, 0-D."""
        return self.scalars[name].view(())

    def _homes(self) -> Iterator[tuple[Entry, int, Slabs]]:
        """The matrices that are computed here, with the slabs of their states and their place in them."""
        for bound in self.buckets:
            entries = bound.bucket.entries
            homes = [
                ([piece.entry for piece in stack.pieces], slabs)
                for stack, slabs in zip(bound.bucket.stacks, bound.slabs)
            ]
            if bound.bucket.exchanged:
                homes = [(list(owned.entries), slabs) for owned, slabs in zip(bound.bucket.owned, bound.owned_slabs)]
            for numbers, slabs in homes:
                for item, number in enumerate(numbers):
                    yield entries[number], item, slabs

    def _find_owner_states(self) -> dict[tuple[int, int], dict[str, Tensor]]:
        return {
            (entry.param, entry.matrix): {
                name: tensor[item] for name, tensor in slabs.tensors.items() if slabs.kinds[name] == "owner"
            }
            for entry, item, slabs in self._homes()
        }

    def _find_coded_states(self) -> dict[tuple[int, int, str], Coded | Paged]:
        return {
            (entry.param, entry.matrix, name): stores[item]
            for entry, item, slabs in self._homes()
            for name, stores in slabs.coded.items()
        }

    def barriers(self) -> list[tuple[str, int]]:
        """The (operation, values) of optimizer scope that its rule asks for in a step, in order. Groups that ask must run
        together."""
        asks = [ask for asks in self.plan.rounds(Shape(8, 8)) for ask in asks if ask.scope == "optimizer"]
        return [("max" if ask.kind == "max" else "sum", 1) for ask in asks]
