"""An optimizer bound to its parameters: layouts read, domains made, plans built, states allocated."""

from __future__ import annotations

import math
import operator
import warnings
import weakref
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import accumulate, compress
from typing import Any

import torch.distributed as dist
from torch import Tensor

from distopt.agreement import agree, exchange_flat_ranges, jsonable, known_groups, mesh_ranks, ranks_of
from distopt.comm.groups import Domains
from distopt.comm.pipeline import Run, run_in_step
from distopt.deferred import SKIP, Pending, defers, judge
from distopt.elementwise import BoundElementwise
from distopt.engine import BoundGroup
from distopt.layouts import Partition, layout_of, local_tensor
from distopt.names import parameter_names, strip_groups
from distopt.plan.buckets import GroupPlan, Spec
from distopt.plan.build import plan_group
from distopt.plan.pages import plan_pages
from distopt.plan.report import PlanReport
from distopt.rule import Rule
from distopt.rules import group_rule
from distopt.settings import Settings
from distopt.state.counters import Counters
from distopt.state.faces import Faces
from distopt.state.fused import agree_on_kernels
from distopt.state.gathering import gather
from distopt.state.grouping import planned_group
from distopt.state.loading import load_state_dict
from distopt.state.pages.pager import Pager, make_pager
from distopt.state.units import MASTER
from distopt.state.windows import make_window
from distopt.verdict import Verdict, first_nonfinite, reach_verdict, sum_squares

DTYPE, GRAD = operator.attrgetter("dtype"), operator.attrgetter("grad")
DEADLINE = timedelta(minutes=5)
"""How long a collective state_dict() waits for the other ranks."""


class Bound:
    """See the module. `groups` are the optimizer's param_groups, `engine` its keyword-only options.

    Raises:
        ValueError: ranks disagree about parameters or options; a layout or a parameter that cannot be served; names
            that collide. On every rank alike.
    """

    def __init__(self, groups: list[dict[str, Any]], engine: dict[str, Any]) -> None:
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.params: list[Tensor] = [param for group in groups for param in group["params"]]
        self.device = local_tensor(self.params[0]).device
        for param in self.params:
            if local_tensor(param).device != self.device:
                raise ValueError(
                    f"parameters lie on {self.device} and on {local_tensor(param).device}; use one optimizer per device"
                )
        self.names = parameter_names(groups)
        bare = [i for i, group in enumerate(groups) if not group.get("param_names")]
        if bare and dist.is_initialized() and dist.get_world_size() > 1:
            warnings.warn(
                f"the parameters of group {bare[0]} have no names, so their states are known by position, on all ranks and in "
                "checkpoints: pass model.named_parameters() instead of model.parameters()",
                stacklevel=2,
            )
        self.pager: Pager | None = None
        self._dtypes = [param.dtype for param in self.params]
        exchange_flat_ranges(self.names, self.params, self.device)
        layouts = [layout_of(param, self.rank) for param in self.params]
        replicas = ranks_of(engine["process_group"])
        union = (
            set(replicas or ())
            | {rank for layout in layouts for rank in layout.ranks}
            | mesh_ranks(self.params, self.rank)
        )
        norm = ranks_of(engine["norm_group"]) or tuple(sorted(union))
        self.domains = Domains(known_groups(self.params, engine))
        self.domains.create(
            [layout.ranks for layout in layouts] + [tuple(union), norm] + ([replicas] if replicas else [])
        )
        self.union, self.norm = self.domains[tuple(union)], self.domains[norm]

        self.settings = Settings(groups)
        agree(self._beliefs(layouts, engine), self.union, self.rank, self.device)
        self.groups: list[BoundGroup | BoundElementwise] = []
        self.plans: list[GroupPlan] = []
        ends = list(accumulate(len(group["params"]) for group in groups))
        self.spans = [slice(stop - len(group["params"]), stop) for group, stop in zip(groups, ends)]
        """Where each group's parameters are among all."""
        for group, span in zip(groups, self.spans):
            specs = tuple(
                Spec(self.names[i], layouts[i], layouts[i].ranks.index(self.rank), self.params[i].dtype)
                for i in range(span.start, span.stop)
            )
            planned = planned_group(group, specs, replicas, gpu=self.device.type != "cpu", rates=engine["rates"])
            self.plans.append(plan_group(planned, self.rank))
        pager = self._make_pager(engine)
        for plan, span in zip(self.plans, self.spans):
            windows = [make_window(param, spec) for param, spec in zip(self.params[span], plan.specs)]
            make = BoundElementwise if plan.elementwise else BoundGroup
            self.groups.append(make(plan, windows, self.domains, self.device, pager))
        stepped = [(plan.rule, group.units) for plan, group in zip(self.plans, self.groups) if plan.elementwise]
        agree_on_kernels(stepped, self.union, self.device)
        self._parted = {
            id(group): [window for window in group.windows if isinstance(window.spec.layout, Partition)]
            for group in self.groups
        }
        checked = engine["nonfinite"] is not None or engine["max_grad_norm"] is not None
        verdict = (8 * len(self.params) + 4 if self.union.size > 1 else 0) + (
            16 if self.norm.size > 1 and checked else 0
        )
        titles = [f"{i} ({group['rule']})" for i, group in enumerate(groups)]
        self.report = PlanReport(self.plans, titles, self.rank, verdict)
        self.faces = [Faces(bound, self.domains) for bound in self.groups]
        self.state: defaultdict[Tensor, Any] = defaultdict(dict)
        self.holds = [window.numel > 0 for bound in self.groups for window in bound.windows]
        paged = any(plan.pages and (plan.hosted or not plan.elementwise) for plan in self.plans)
        self.defers = defers(self.device, self.union, self.norm) and not paged
        self._pending: Pending | None = None
        self._positions: dict[int, int] = {}
        self._last_grad: weakref.ref[Tensor] | None = None
        self._last_version = 0
        self.counters: list[Counters] = []
        for bound, faces in zip(self.groups, self.faces):
            for number, window in enumerate(bound.windows):
                self.state[window.param] = {"step": None, **faces.here(number), **faces.placeholders(number)}
            self.counters.append(Counters([self.state[window.param] for window in bound.windows]))

    def _make_pager(self, engine: dict[str, Any]) -> Pager | None:
        """Say where pages lie, and make their places; an error on any rank is one on all."""
        if engine["device_budget"] is None and not any(plan.storage.offload for plan in self.plans):
            return None
        error: ValueError | None = None
        try:
            plan_pages(self.plans, engine["device_budget"])
            self.pager = make_pager(self.plans, self.device, self.rank)
        except ValueError as refused:
            error = refused
        failed = self.union.all_gather_ints([int(error is not None)], self.device)
        if error is not None:
            raise error
        if any(row[0] for row in failed):
            ranks = [rank for rank, row in zip(self.union.ranks, failed) if row[0]]
            self.pager = None
            raise ValueError(f"states cannot be paged on ranks {ranks}, whose errors say why; nothing was changed")
        return self.pager

    def snapshot(self) -> defaultdict[Tensor, Any]:
        """`state` as a state dict holds it: with copies of the states that live with owners; collective where there are
        any, or where a rank's shard is too small to know a statistic. `state` itself keeps none.

        Raises:
            ValueError: states are partitioned over replicas.
        RuntimeError: it is collective and another rank did not call it.
        """
        if any(faces.is_collective() for faces in self.faces) and not self.union.meet(DEADLINE):
            raise RuntimeError(
                f"state_dict() waited {DEADLINE.total_seconds():g} s for the other ranks: states of this optimizer are spread "
                f"over ranks {list(self.union.ranks)}, so every one of them has to call it. To save from all ranks use "
                "distopt.checkpoint.save(path, model=…, optimizer=…) or torch.distributed.checkpoint"
            )
        found: defaultdict[Tensor, Any] = defaultdict(dict)
        for group, faces in zip(self.groups, self.faces):
            if self._parted[id(group)]:
                raise ValueError(
                    "states are partitioned over the replicas (process_group=…), no rank has them all: save with "
                    "distopt.checkpoint.save(path, model=…, optimizer=…) on every rank"
                )
            travelled = faces.fill()
            for number, window in enumerate(group.windows):
                entry = self.state[window.param]
                # Parameters share their counters here, and torch.optim, which may load this, counts in place.
                found[window.param] = {**entry, "step": entry["step"].clone(), **travelled.get(number, {})}
        return found

    def master_weights(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Parameters of lower precision with their fp32 weights, where those are kept."""
        for group, faces in zip(self.groups, self.faces):
            for number, window in enumerate(group.windows):
                if group.units.holds(number, MASTER):
                    yield window.param, faces.face(number, MASTER)

    def load(self, groups: list[dict[str, Any]], saved: dict[str, Any]) -> None:
        """See Optimizer.load_state_dict."""
        names = [self.names[span] for span in self.spans]
        saved = {**saved, "param_groups": strip_groups(saved["param_groups"])}
        load_state_dict(groups, names, self.faces, self.counters, saved)
        self.watch()

    def export(self) -> dict[str, Any]:
        """Everything but hyperparameters, in the format of a state dict; survives another binding."""
        if any(self._parted.values()) and self.has_stepped:
            raise ValueError(
                "an optimizer whose states are partitioned over replicas cannot be changed or copied once it ran"
            )
        if not self.has_stepped:
            return {"state": {}, "names": self.names, "params": self.params}
        found = self.snapshot()
        state = {i: found[param] for i, param in enumerate(self.params)}
        return {"state": state, "names": self.names, "params": self.params}

    def restore(self, groups: list[dict[str, Any]], exported: dict[str, Any]) -> None:
        """Take over what an earlier binding exported, as far as parameters are still here: the same tensors, or, where
        tensors were replaced, those of the same names."""
        if not exported["state"]:
            return
        by_name = dict(zip(exported["names"], exported["state"].values()))
        by_id = dict(zip(map(id, exported["params"]), exported["state"].values()))
        ids = set(map(id, self.params))
        saved_groups, state, start = [], {}, 0
        for group in groups:
            indices = list(range(start, start + len(group["params"])))
            start += len(indices)
            saved_groups.append({"params": indices})
            for i in indices:
                entry = by_id.get(id(self.params[i])) or (None if by_id.keys() & ids else by_name.get(self.names[i]))
                if entry:
                    state[i] = entry
        self.load(groups, {"state": state, "param_groups": saved_groups})

    @property
    def has_stepped(self) -> bool:
        """Whether any group has taken a step."""
        return any(any(counters.ages) for counters in self.counters)

    def _beliefs(self, layouts: list[Any], engine: dict[str, Any]) -> list[str]:
        """What must be the same on every rank of the union."""
        words = [
            f"{name}|{layout.shape}|{layout.describe()}|{param.dtype}"
            for name, layout, param in zip(self.names, layouts, self.params)
        ]
        words += self.settings.words()
        return [*words, "options: " + jsonable({k: v for k, v in engine.items() if not k.endswith("_group")})]

    def still_holds(self, groups: list[dict[str, Any]]) -> bool:
        """Whether these groups have the parameters that were bound."""
        params = [param for group in groups for param in group["params"]]
        same = len(params) == len(self.params) and all(map(operator.is_, params, self.params))
        return same and list(map(DTYPE, params)) == self._dtypes

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Afterwards no group knows the gradients that it collected: zero_grad() is to free them."""
        try:
            yield
        finally:
            for group in self.groups:
                group.release()

    def step(
        self,
        groups: list[dict[str, Any]],
        engine: dict[str, Any],
        *,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        idle: bool = False,
    ) -> Verdict | None:
        """Verdict, then mutation; see Optimizer.step. With `idle` the first step may be without any gradient. None: `settle`
        is to tell the verdict, for which nobody has waited."""
        grads = list(map(GRAD, self.params))
        present = [grad is not None for grad in grads]
        if grad_scale is not None or engine["max_grad_norm"] is not None:
            grads = self._apart(grads, present)
        checked = engine["nonfinite"] is not None or engine["max_grad_norm"] is not None
        asked = checked and not self.defers
        scaler_found = None if found_inf is None or self.defers else float(found_inf)
        squares: list[tuple[float, float]] = []
        error: ValueError | None = None
        rules: list[Rule] = []
        try:
            rules = self.settings.rules(groups, self.plans)
            if not self.defers:
                self.watch()
            for group, span in zip(self.groups, self.spans):
                alarm = group.alarm()
                if alarm is not None:
                    raise ValueError(alarm)
                group.collect(grads[span])
                if asked and not scaler_found:
                    squares += [(found, holders / self.union.size) for found, holders in group.squares()]
        except ValueError as refused:
            error = refused
            present = [False] * len(present)
        verdict = reach_verdict(
            squares if asked else None,
            present,
            self.holds,
            self.union,
            self.norm,
            self.device,
            checked=asked,
            found_inf=scaler_found,
            error=error,
        )
        if verdict.partial and engine["missing_grad"] == "raise":
            names = ", ".join(repr(self.names[i]) for i in sorted(verdict.partial)[:5])
            raise ValueError(
                f"the gradient of {names} is missing on some ranks; pass missing_grad='zero' to count it as zero there"
            )
        if len(verdict.inert) == len(self.params) and not self.has_stepped and not idle:
            raise ValueError(
                "no parameter of this optimizer has a gradient on its first step; was the model sharded (fully_shard, "
                "prepare) after the optimizer was built? Build it afterwards, or with distopt.create_optimizer(name, model); "
                "for DeepSpeed, with distopt.integrations.deepspeed.optimizer(name, model)"
            )
        if not verdict.finite:
            self._note(grads)
            if engine["nonfinite"] == "raise" and found_inf is None:
                position = first_nonfinite([w.grad() for g in self.groups for w in g.windows], self.union, self.device)
                name = f" of {self.names[position]!r}" if position >= 0 else ""
                raise ValueError(f"the gradient{name} is not finite; nothing was changed. {SKIP}")
            return verdict
        if self.defers and (checked or found_inf is not None):
            sums = [group.found() for group in self.groups] if checked else []
            judged = judge(sums, grad_scale, found_inf, engine["max_grad_norm"], self.device)
            reading = judged.reading()
            if found_inf is not None:  # as the host does where it knows
                found_inf.copy_(judged.ok.logical_not(), non_blocking=True)
            counted = self._mutate(engine["maximize"], rules, verdict.inert, judged.factor, judged.ok)
            raises = engine["nonfinite"] == "raise" and found_inf is None
            self._pending = Pending(reading, counted, checked, raises)
            outcome = None
        else:
            unit = 1.0 if grad_scale is None else float(grad_scale)
            norm, scale = None if verdict.norm is None else verdict.norm / unit, 1.0 / unit
            if engine["max_grad_norm"] is not None and norm is not None:
                scale *= min(1.0, engine["max_grad_norm"] / (norm + 1e-6))
            self._mutate(engine["maximize"], rules, verdict.inert, None if scale == 1.0 else scale, None)
            outcome = Verdict(norm, True, verdict.inert, verdict.partial)
        if self.defers:
            self.watch()
        self._note(grads)
        return outcome

    def _mutate(
        self,
        maximize: bool,
        rules: list[Rule],
        resting: frozenset[int],
        factor: float | Tensor | None,
        ok: Tensor | None,
    ) -> list[tuple[Counters, set[int]]]:
        """Step all groups with their gradients times `factor`, but for parameters that are `resting`, by position; see
        `put` for `ok`. Returns the counters that went on, with who rested."""
        stepped: list[BoundGroup | BoundElementwise] = []
        counted: list[tuple[Counters, set[int]]] = []
        # Groups whose rule sums over the whole optimizer wait for each other.
        together: dict[type[Rule], tuple[list[Run], list[tuple[str, int]], list[BoundGroup]]] = {}
        for group, rule, counters, span in zip(self.groups, rules, self.counters, self.spans):
            inert = {i - span.start for i in range(span.start, span.stop) if i in resting} if resting else set()
            if len(inert) == len(group.windows):
                continue
            stepped.append(group)
            if factor is not None:
                group.scale(factor)
            if maximize:
                group.negate()
            cohorts = counters.cohorts(inert)
            for age, others in cohorts:
                final = age == cohorts[-1][0]
                barriers = group.barriers() if isinstance(group, BoundGroup) else []
                if barriers:
                    assert isinstance(group, BoundGroup)
                    runs, _, joined = together.setdefault(type(rule), ([], barriers, []))
                    runs.extend(group.runs(rule, age + 1, others, self.union, final=final, ok=ok))
                    joined.append(group)
                else:
                    group.step(rule, age + 1, others, self.union, final=final, ok=ok)
            counters.advance(inert)
            counted.append((counters, inert))
        for runs, barriers, joined in together.values():
            run_in_step(runs, self._total, barriers)
            for group in joined:
                group.finish(ok)
        for group in stepped:
            self.gather(group)
        return counted

    def settle(self) -> Verdict | None:
        """The verdict of the last step, if nobody has waited for it and nobody has asked yet. Counters of a step that was not
        taken go back.

        Raises:
            ValueError: a gradient was not finite, where that is an error. Once; nothing was changed.
        """
        pending, self._pending = self._pending, None
        return pending.settle(self.groups, self.names) if pending is not None else None

    def watch(self) -> None:
        """Have the numbers on their way that the next step is to know before it begins; after a step, and after loading."""
        for group in self.groups:
            group.watch()

    def _apart(self, grads: list[Tensor | None], present: list[bool]) -> list[Tensor | None]:
        """Give each parameter a gradient of its own, as it is going to be multiplied in place: torch.autograd.grad gives what
        two parameters have alike once."""
        if len(set(map(id, compress(grads, present)))) < sum(present):
            seen: set[int] = set()
            for param, grad in zip(self.params, grads):
                if id(grad) in seen and grad is not None:
                    param.grad = grad.clone()
                seen.add(id(grad))
            grads = list(map(GRAD, self.params))
        return grads

    def _note(self, grads: list[Tensor | None]) -> None:
        """Remember the first gradient that a step has seen; see `accumulates`."""
        first = next((grad for grad in grads if grad is not None), None)
        if first is not None:
            self._last_grad, self._last_version = weakref.ref(first), _version(first)

    def accumulates(self) -> bool:
        """Whether gradients have come since the last step: whether the first that there is is another, or not zero and
        written to."""
        grad = next((param.grad for param in self.params if param.grad is not None), None)
        taken = self._last_grad() if self._last_grad is not None else None
        if grad is None or (grad is taken and _version(grad) == self._last_version):
            return False
        return bool(local_tensor(grad).any())

    def refuse_alone(self, groups: list[dict[str, Any]]) -> None:
        """Raise where parameters cannot be stepped one by one, in an order that no other rank knows."""
        for group, rule in zip(self.groups, map(group_rule, groups)):
            name = type(rule).__name__
            sums = isinstance(group, BoundGroup) and bool(group.barriers())
            if sums or (self.union.size > 1 and (not group.plan.elementwise or group.units.units)):
                why = "sums over all parameters" if sums else "needs other ranks in the middle of a step"
                raise ValueError(f"{name} {why}, so its parameters cannot be stepped as gradients arrive; call step()")

    def position(self, param: Tensor) -> int:
        """Where a parameter stands."""
        if not self._positions:
            self._positions = {id(p): i for i, p in enumerate(self.params)}
        return self._positions[id(param)]

    def step_alone(self, number: int, groups: list[dict[str, Any]], scale: float, *, maximize: bool) -> None:
        """Step a group of one parameter. No verdict: that is the caller's."""
        group, counters, rule = self.groups[number], self.counters[number], group_rule(groups[number])
        self.plans[number].storage.seed = groups[number]["rounding_seed"]
        group.collect([group.windows[0].param.grad])
        if scale != 1.0:
            group.scale(scale)
        if maximize:
            group.negate()
        group.step(rule, counters.ages[0] + 1, set(), self.union, final=True)
        group.release()
        counters.advance(set())

    def total_norm(self, squares: float) -> float:
        """The global norm, from this rank's sum of squares; inf where something is not finite."""
        return math.sqrt(sum_squares(squares, self.norm, self.device))

    def gather(self, group: BoundGroup | BoundElementwise) -> None:
        """Make parameters that are partitioned over replicas whole again."""
        gather(self._parted[id(group)], self.domains)

    def _total(self, partial: Tensor, op: str) -> Tensor:
        partial = partial.to(self.device)
        work = self.norm.all_reduce(partial, op)
        if work is not None:
            work.wait()
        return partial


def _version(tensor: Tensor) -> int:
    """How often a tensor was written to; 0 for one of inference mode, which does not know."""
    return 0 if tensor.is_inference() else tensor._version
