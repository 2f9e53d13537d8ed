"""The optimizer: torch.optim.Optimizer's interface, bind, and the only step()."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from distopt.bound import Bound
from distopt.layouts import global_shape, reshard
from distopt.modes import swap
from distopt.names import parameter_names, strip_groups, strip_prefixes
from distopt.observation import observe
from distopt.options import (
    check_group,
    check_options,
    check_shapes,
    complete_group,
    engine_options,
    optimizer_defaults,
)
from distopt.plan.report import PlanReport
from distopt.rule import require
from distopt.state.loading import load_groups
from distopt.vanishing import Vanishing
from distopt.verdict import Verdict


class Optimizer(torch.optim.Optimizer):
    """Base of every optimizer of this package, and the class behind mixed ones (a rule per group, `group["rule"]`).

    Keyword-only options on all, per group:
        split: which logical matrices the weights are made of, where that is not one each: "q:32h,k:8h,v:8h", "gate,up",
            "heads=32 cols", "transposed" (`distopt.plan.split` has all words). Rules see each as a weight of its own.

    And of the whole optimizer:
        max_grad_norm: clip the global gradient norm, over every group and mesh, each shard counted once. Contiguous fp32
            gradients are left clipped, as torch.nn.utils.clip_grad_norm_ leaves them; others may be left as they came.
        nonfinite: a NaN or infinity in any gradient on any rank raises ("raise"), skips the step on every rank
            ("skip"), or is not looked for (None: no extra pass; with max_grad_norm such a step is skipped all the same).
        missing_grad: a gradient that is there on some ranks only counts as zero ("zero") or raises ("raise"). One that
            is nowhere leaves its parameter untouched.
        process_group: replicas (DDP) to partition states and work over; updated parameters are gathered. Of a gradient, which
            replicas have alike, each looks at what it steps and leaves that clipped: the rest of its copy is not used.
        norm_group: the ranks that the norm and the verdict are taken over, where that is more than the ranks that hold
            these parameters: one rank (or one set of shards) per pipeline stage. Replicas of plain parameters (DDP)
            among them would be counted each; give process_group= as well, or a group without them.
        maximize: ascend.
        rates: of this machine, for the choice of strategies: the file that `distopt calibrate` wrote (the same on every
            rank), "h100" or "cpu". By default those of the device.
        device_budget: bytes, or "8GiB", that states may take on the device where groups have `offload`: as many as fit
            stay there, the slots that pages pass through included.

    Keyword-only options of each group, whose value here is the default:
        state_codec: how states are stored: "fp32", "bf16" (rounded to nearest), "bf16_sr" (stochastically), "int8", "fp8"
            or "int4"; or a dict of these by state, the others fp32. Coded are the states that lie element for element as
            the parameter does, or are matrices, of parameters of 1,024 elements or more; all layouts store the same codes.
            State dicts and checkpoints hold fp32 and load under any codec; under the same one nothing is lost.
        master_codec: what is kept of fp32 weights beside bfloat16 and float16 parameters: "fp32" (a copy), "bits16" (2 bytes:
            with bfloat16 the same weights, bit for bit), "bits8" (1 byte: 24 bits of each weight), or, as torch does,
            "none": then updates below half an ulp of a parameter are lost; a warning says so once most of them are. See
            `master_state_dict`.
        packed: store half of each symmetric state (factors, Gram matrices, roots) of 1,024 elements or more, in its codec;
            state dicts hold all of it.
        offload: where states lie that are not on the device: "cpu" (pinned host memory beside a GPU), "disk:/path" (a file
            there per rank, scratch of this run), or shares of these, {"cpu": 0.5, "disk:/path": 0.25}, the rest staying on
            the device. Codes move, fetched before they are needed and written back behind the step; results are those
            without it, bit for bit. Statistics and states of less than 1,024 elements stay. Elementwise rules may be stepped
            where the states are instead: gradients and weights move to the host, and weights back. Beside a GPU "cpu" does
            that where the cost model says that it is faster (`rates`; `plan.explain()` says which), "cpu_step" always,
            "cpu_pages" never; roots then are those of the host's kernels, 1e-7 beside the GPU's. Other rules keep pages.
        rounding_seed: of stochastic rounding, whose random bits depend on it, the step, the state and the element.
        strategy: where matrices that no rank holds whole are computed. "auto" lets a cost model choose; "owner" (each by
            one rank), "gather" (by every rank), "gram" (by all that hold some of it, which sum Gram matrices: rounding
            differs, 1e-4) and "split" (so by a few) are described in `distopt.plan.strategies`. Groups of another rule
            have "auto".
        wire_dtype: "fp32" or "bf16": what matrices travel in to whoever computes them, and back. "bf16" halves the bytes and
            rounds what the rule asks to see whole and what it hands back, on every layout, so that all of them still agree
            bit for bit.

    The layout of parameters is read, and states are made, on the first of step, state, state_dict, load_state_dict and
    plan ("bind"): shard the model before that. Bind is collective where parameters are sharded. States are known by the names
    of their parameters: pass `model.named_parameters()`; without names, by position.
    """

    rule_name: ClassVar[str] = ""
    stepper: Any = None
    _step_supports_amp_scaling = True
    _constructed = False
    _stateless = False

    def __init__(self, params: Iterable[Any], rule: str, options: dict[str, Any]) -> None:
        check_options(rule, options)
        self.engine = _Engine(engine_options(options))
        self._grad_norm: float | None = None
        self._skipped_steps = 0
        self.routing: list[tuple[str, str, str]] = []
        self._model: Callable[[], torch.nn.Module | None] | None = None
        self._vanishing = Vanishing()
        self._bound: Bound | None = None
        self._pending: dict[str, Any] | None = None
        self._shapes: set[tuple[int, ...]] = set()
        super().__init__(params, optimizer_defaults(rule, options))
        parameter_names(self.param_groups)
        self._constructed = True

    @property
    def last_grad_norm(self) -> float | None:
        """The global gradient norm of the last step, before clipping; inf of one that was skipped; None where nobody looked.
        To read it is to wait for that step, see `step`."""
        self._settle()
        return self._grad_norm

    @property
    def skipped_steps(self) -> int:
        """How many steps were skipped for a gradient that was not finite; waits as `last_grad_norm` does."""
        self._settle()
        return self._skipped_steps

    # The state is made at bind, and bind may have to wait until parameters are final, so it is a property.
    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """State by parameter, as in torch.optim; binds."""
        return self._bind().state if self.param_groups and not self._stateless else defaultdict(dict)

    @state.setter
    def state(self, value: Any) -> None:
        assert not value, "states are made at bind and loaded with load_state_dict"

    @property
    def plan(self) -> PlanReport:
        """What each rank computes, sends and keeps: `.explain()`, `.summary()`; binds."""
        return self._bind().report

    def traffic(self) -> dict[str, int]:
        """Bytes that this rank's collectives sent and received, and their number, since `reset_traffic`; and bytes of pages
        that came to the device and left it."""
        bound = self._bind()
        traffic, pager = bound.domains.traffic, bound.pager
        counts = {"bytes_sent": traffic.sent, "bytes_received": traffic.received, "collectives": traffic.calls}
        paged = {"page_bytes_read": pager.bytes_read, "page_bytes_written": pager.bytes_written} if pager else {}
        return counts | paged

    def reset_traffic(self) -> None:
        """Start counting again."""
        bound = self._bind()
        traffic = bound.domains.traffic
        traffic.sent = traffic.received = traffic.calls = 0
        if bound.pager is not None:
            bound.pager.bytes_read = bound.pager.bytes_written = 0

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, which may have a `rule` of its own; its options default to that rule's, lr and weight decay to
        the optimizer's.

        Raises:
            ValueError: an unknown option or rule; a parameter that the rule cannot serve, that is sparse, complex, on
                the meta device, or there twice; a name that is there twice.
        """
        self._settle()
        group = complete_group(param_group, self.defaults)
        before = self.defaults
        try:
            self.defaults = {}  # torch's way to complete a group knows one rule
            super().add_param_group(group)
        finally:
            self.defaults = before
        try:
            check_group(self.param_groups[-1], len(self.param_groups) - 1)
            self._shapes.update(map(global_shape, self.param_groups[-1]["params"]))
            pending = self._bound.export() if self._bound is not None else self._pending
            if self._constructed:  # the constructor looks once, at all groups
                parameter_names(self.param_groups)
        except ValueError:
            self.param_groups.pop()
            raise
        self._pending, self._bound = pending, None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of every group.

        In one process on an accelerator it waits for nothing there, but for solvers that do (`eigh`, inverse Newton): the
        device itself clips, and leaves everything as it is where a gradient is not finite. The error for that comes with
        whatever is done next with the optimizer, the next step at the latest; after the last step of a run read
        `last_grad_norm`, or nobody hears of it. That and `skipped_steps` wait until they are known. On several ranks all have
        to know of each other's gradients, and on CPU there is nothing to wait for: there it is this call that raises. So it
        is where states are stepped on the host, and where those of rules of whole matrices are paged.

        Raises:
            ValueError: a hyperparameter out of range; a non-finite or missing gradient, where that is to raise. On every
                rank alike, with parameters and states unchanged.
        """
        self._settle()
        if not all(group.get("train_mode", True) for group in self.param_groups):
            raise ValueError("the weights are those to evaluate: call optimizer.train() before training goes on")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        bound = self._bind()
        scale = getattr(self, "grad_scale", None)
        found = getattr(self, "found_inf", None)
        require(
            self.stepper is None or scale is None,
            "this optimizer steps in backward, where a GradScaler has not unscaled gradients yet; train in bf16",
        )
        self._vanishing.before(bound, self.param_groups)
        with bound.collecting():
            outcome = bound.step(
                self.param_groups,
                self.engine,
                grad_scale=scale,
                found_inf=found,
                idle=self.stepper is not None and self.stepper.skipped_steps > 0,
            )
        self._vanishing.after(bound, self.param_groups, outcome is None or outcome.finite)
        if outcome is not None:
            self._take_note(outcome)
            if not outcome.finite and found is not None:
                found.fill_(1.0)
        return loss

    def _settle(self) -> None:
        """Learn how the last step went, if it did not wait for its verdict.

        Raises:
            ValueError: a gradient was not finite, where that is to raise.
        """
        if self._bound is None:
            return
        try:
            outcome = self._bound.settle()
        except ValueError:
            self._vanishing.forget()
            raise
        if outcome is not None:
            self._take_note(outcome)
            if not outcome.finite:
                self._vanishing.forget()

    def _take_note(self, outcome: Verdict) -> None:
        self._grad_norm = outcome.norm
        self._skipped_steps += not outcome.finite

    @torch.no_grad()
    def observe(self, name: str, values: Mapping[str | Tensor, Tensor] | None = None) -> bool:
        """Show the rules something beside gradients, between two steps: every rank that holds their parameters calls it.

        Args:
            name: what the rule calls it. An estimate per weight ("hessian") is read from `.grad`, where a backward pass
                has left it, and where it is reduced and laid out as gradients are; clear gradients after it.
            values: what has one number per block of rows of a matrix ("max_logit": per head), by parameter or by its
                name: float tensors (blocks,) for all blocks of the parameter. Ranks may have seen different data: the
                largest of what they give counts. Replicas of plain parameters (DDP) without process_group= do not know
                of each other, neither here nor in step: give them the same.

        Returns:
            True; False if it was not finite and `nonfinite="skip"` left the states alone.

        Raises:
            ValueError: no rule here observes it, there is nothing to observe, a value has the wrong shape, or it is not
                finite. On every rank alike, with states unchanged.
        """
        bound = self._bind()
        with bound.collecting():
            return observe(bound, self.param_groups, self.engine, name, values)

    def split_groups(self) -> None:
        """Make every parameter a group of its own, with the same options; see `distopt.step_in_backward`.

        Raises:
            ValueError: a rule that cannot step parameter by parameter where these parameters lie.
        """
        bound = self._bind()
        bound.refuse_alone(self.param_groups)
        names = iter(bound.names)
        groups = [
            {**group, "params": [param], "param_names": [next(names)]}
            for group in self.param_groups
            for param in group["params"]
        ]
        self._pending, self._bound = bound.export(), None
        self.param_groups[:] = groups
        self._bind()

    def step_parameter(self, param: Tensor, scale: float) -> None:
        """Step one parameter, which is a group of its own, with its gradient times `scale`."""
        self._settle()
        bound = self._bound or self._bind()
        bound.step_alone(bound.position(param), self.param_groups, scale, maximize=self.engine["maximize"])

    def share_of(self, param: Tensor) -> float:
        """One over the number of copies that there are of what lies here of a parameter."""
        bound = self._bound or self._bind()
        return bound.groups[bound.position(param)].windows[0].holders / bound.union.size

    def global_norm(self, squares: float) -> float:
        """√ of the sum over ranks; inf where there is something that is not finite."""
        return self._bind().total_norm(squares)

    def train(self) -> None:
        """Put the weights that are trained into the model, after `eval`. Only rules with two sets of weights (Schedule-Free)
        do anything, and only when they are not there already."""
        self._set_mode(True)

    def eval(self) -> None:
        """Put the weights to evaluate, and to keep, into the model; see `train`. The mode is saved in state dicts."""
        self._set_mode(False)

    @torch.no_grad()
    def _set_mode(self, train: bool) -> None:
        wanted = [group.get("train_mode", train) != train for group in self.param_groups]
        if any(wanted):
            swap(self._bind(), self.param_groups, wanted)
            for group, changes in zip(self.param_groups, wanted):
                if changes:
                    group["train_mode"] = train

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim's. Collective where states live with owners of sharded parameters (SOAP under FSDP2), or where
        some rank's shard is too small to know a statistic (Adafactor under FSDP2). Without states, and without binding,
        where nothing was bound and parameters are plain tensors, which may yet be sharded.

        Raises:
            ValueError: states are partitioned over replicas (`process_group`), so that no single rank can have them;
                names the native checkpoint.
        """
        if self._is_fresh():
            self._stateless = True
            try:
                return super().state_dict()
            finally:
                self._stateless = False
        bound = self._bind()
        live, bound.state = bound.state, bound.snapshot()
        try:
            return super().state_dict()
        finally:
            bound.state = live

    def master_state_dict(self, model: torch.nn.Module) -> dict[str, Any]:
        """The model's state dict with fp32 weights: the master weights where they are kept, else the parameters cast. Under
        FSDP2 they are DTensors that lie as the parameters do.

        Args:
            model: whose parameters this optimizer has.
        """
        bound = self._bind()
        reshard(model)
        fp32 = {id(param): weight for param, weight in bound.master_weights()}
        named = dict(model.named_parameters(remove_duplicate=False))
        found: dict[str, Any] = {}
        for name, value in model.state_dict().items():
            param = named.get(name)
            kept = param is not None and param.is_floating_point()
            found[strip_prefixes(name)] = fp32.get(id(param), value.float()) if kept else value
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this class, or of torch.optim's class of the same rule. Values keep fp32; parameters are
        matched by name where both sides have names, by position otherwise; hyperparameters come from the state dict.

        Raises:
            ValueError: missing or unexpected parameters or states, shapes or meshes that do not fit; nothing is changed.
        """
        state_dict = state_dict.copy()  # hooks may change it
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        for group in state_dict["param_groups"]:
            require(
                group.get("maximize", self.engine["maximize"]) == self.engine["maximize"],
                f"the state dict was saved with maximize={group.get('maximize')}; construct the optimizer with it",
            )
        if self._is_fresh() and not state_dict["state"]:
            names = [group.get("param_names") for group in strip_groups(self.param_groups)]
            load_groups(self.param_groups, names, strip_groups(state_dict["param_groups"]))
        else:
            self._bind().load(self.param_groups, state_dict)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        self._settle()
        kept = ("defaults", "param_groups", "engine", "_grad_norm", "_skipped_steps", "routing", "_shapes")
        pending = self._bound.export() if self._bound is not None else self._pending
        return {
            **{key: self.__dict__[key] for key in kept},
            "_pending": pending,
            "_vanishing": Vanishing(),
            "_bound": None,
            "_model": None,
            "_constructed": True,
        }

    def _bind(self) -> Bound:
        """Read layouts and make states, once; again when somebody replaced parameters. Settles."""
        self._settle()
        groups = self.param_groups
        if self._bound is None or not self._bound.has_stepped:
            self._refresh_parameters()
        if self._bound is not None and not self._bound.still_holds(groups):
            self._pending = self._bound.export()
            self._bound = None
        if self._bound is None:
            check_shapes(groups, self._shapes)
            bound = Bound(groups, self.engine)
            if self._pending is not None:
                bound.restore(groups, self._pending)
                self._pending = None
            self._bound = bound
        return self._bound

    def _is_fresh(self) -> bool:
        """Whether nothing was bound and parameters are plain tensors. Trainers save and load an optimizer before they
        shard its parameters: nothing is allocated for that."""
        if self._bound is not None or self._pending is not None:
            return False
        params = (param for group in self.param_groups for param in group["params"])
        return not any(isinstance(param, DTensor) or getattr(param, "_distopt_flat", None) for param in params)

    def attach_model(self, model: Callable[[], torch.nn.Module | None]) -> None:
        """Remember the model (by a weak reference) whose parameters these are, so that they are found again, by name,
        when the model is sharded after the optimizer was built."""
        self._model = model

    def _refresh_parameters(self) -> None:
        """Find the parameters of a model that was sharded after the optimizer was built."""
        model = self._model() if self._model is not None else None
        if model is None:
            return
        reshard(model)
        now = {strip_prefixes(name): param for name, param in model.named_parameters(remove_duplicate=False)}
        for group in self.param_groups:
            names = [strip_prefixes(name) for name in group["param_names"]]
            group["params"] = [now.get(name, param) for name, param in zip(names, group["params"])]


class _Engine(dict[str, Any]):
    """The keyword-only options. A deep copy shares the process groups, which cannot be copied."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Engine:
        return _Engine(self)
