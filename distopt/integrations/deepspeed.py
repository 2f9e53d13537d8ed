"""DeepSpeed: any rule of this package as the client optimizer of `deepspeed.initialize`, whole-matrix rules included.

    import distopt.integrations.deepspeed
    optimizer = distopt.integrations.deepspeed.optimizer("muon", model, lr=1e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

with `"zero_allow_untested_optimizer": true` in the config (DeepSpeed knows its own optimizers by their type). A config
that names the optimizer, `"optimizer": {"type": "distopt_muon", "params": {"lr": 1e-3}}`, takes two lines:

    optimizer, config = distopt.integrations.deepspeed.from_config("ds_config.json", model)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

How it works. DeepSpeed replaces the parameters of its optimizer by flat fp32 partitions in which matrices are cut in the
middle of a row. This optimizer keeps the parameters it was built with, reads from them, on the first step of a group,
where DeepSpeed put their pieces, and declares the pieces as flat ranges (`distopt.layouts.flat_shard`): views of
DeepSpeed's own memory, stepped by an ordinary distopt optimizer. A rule sees the whole matrix on every ZeRO stage, and
the update is the mathematics of one process. Nothing of DeepSpeed is patched. On the first step the partitions are
compared with the weights they should hold, so that a DeepSpeed that cuts in another way is an error and not a wrong
model.

Under Accelerate's DeepSpeed plugin and the Transformers Trainer the same optimizer is built by one line of
`distopt.integrations.accelerate` and `.transformers`, with the trainer's config checked.

Supported, each with a test, with DeepSpeed 0.19.8 (0.18.0 fails some of them): ZeRO stages 0, 1, 2 and 3; fp32, bf16
and, from stage 1 on, fp16; fp32 gradient accumulation of bf16; `offload_optimizer` to CPU, at stage 3 `offload_param`
too; several parameter groups (each matrix rule makes at least two); stage 3 with `zero.Init` before the optimizer is
built, and with small `sub_group_size`; `round_robin_gradients`; gradient accumulation; `gradient_clipping`, which is
on the gradient, before the rule; DeepSpeed's learning-rate schedulers; `save_checkpoint` / `load_checkpoint` on the
same number of ranks, bit for bit. Clipping, loss scaling and the skipping of steps are DeepSpeed's. A parameter
without a gradient counts as one with a zero gradient, as it does for every optimizer under ZeRO. Give `zero.Init` the
config: with `dtype=torch.float32` alone it rounds weights to bf16 on CPUs without fp16.

Not supported:

- Options that change what an optimizer is handed, in ways that were never run here: NVMe offload, `ratio`, ZenFlow,
  SuperOffload, MiCS, hpZ, quantized communication, MoE, pipeline, tensor and sequence parallelism, amp and torch
  autocast, elastic and universal checkpoints. `from_config`, and `optimizer(…, config=…)`, refuse every option that was
  not tested; without a config only what can be seen at the first step is refused.
- Another number of ranks on resume: DeepSpeed's own partitioned checkpoints do not do that.
- `safe_get_full_optimizer_state` and `offload_states`: states are the inner optimizers' (`ClientOptimizer.parts`).
- `max_grad_norm`, `norm_group`, `process_group` and `missing_grad`, which DeepSpeed does in its own way.
- Rules that are shown more than gradients (`optimizer.observe`) or keep other weights for evaluation, and quasi-Newton
  methods, which step with a closure.
- A rule with a state for all parameters together, under stage 3 where DeepSpeed cuts the group into sub-groups.

At stage 0 with bf16 or fp16 DeepSpeed takes one step with zero gradients when it is initialized, which decays the
weights and counts as a step for torch.optim.AdamW; it is recognised here and left out.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distopt.build import create_optimizer
from distopt.integrations.zero import Cut, Members, cuts_of, described, is_partitioned
from distopt.layouts import flat_shard
from distopt.optimizer import Optimizer
from distopt.rule import Shape
from distopt.rules import group_rule, rule_class

REFUSED = {
    "max_grad_norm": "set gradient_clipping in the DeepSpeed config: DeepSpeed steps one group after the other, and only "
    "DeepSpeed sees the norm of all",
    "norm_group": "DeepSpeed takes the norm over its own ranks",
    "process_group": "use ZeRO stage 1, which partitions states over replicas",
    "missing_grad": "DeepSpeed fills missing gradients with zeros before an optimizer sees them",
}

FP16_AT_STAGE_0 = (
    "fp16 at stage 0: DeepSpeed 0.19 divides gradients by a loss scale that it never multiplied the loss by; use "
    "zero_optimization.stage 1, or bf16"
)

SUPPORTED = {
    "": """train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping steps_per_print
        wall_clock_breakdown memory_breakdown dump_state zero_allow_untested_optimizer zero_force_ds_cpu_optimizer
        scheduler optimizer fp16 bf16 data_types zero_optimization checkpoint tensorboard wandb csv_monitor comms_logger
        flops_profiler""",
    "zero_optimization": """stage contiguous_gradients overlap_comm reduce_scatter reduce_bucket_size allgather_partitions
        allgather_bucket_size round_robin_gradients offload_optimizer offload_param sub_group_size
        stage3_max_live_parameters stage3_max_reuse_distance stage3_prefetch_bucket_size
        stage3_param_persistence_threshold stage3_gather_16bit_weights_on_model_save""",
    "zero_optimization.offload_optimizer": "device pin_memory",
    "zero_optimization.offload_param": "device pin_memory",
    "fp16": "enabled auto_cast loss_scale initial_scale_power loss_scale_window hysteresis min_loss_scale",
    "bf16": "enabled",
    "data_types": "grad_accum_dtype",
    "checkpoint": "tag_validation",
}
"""Options by section that were run with this optimizer, or that no optimizer can notice."""


def optimizer(name: str, model: nn.Module, *, config: Any = None, **options: Any) -> ClientOptimizer:
    """Build the optimizer to hand to `deepspeed.initialize(optimizer=…)`.

    Args:
        name: of a rule, as in `distopt.rules.RULES`.
        model: before `deepspeed.initialize`; may have been made under `deepspeed.zero.Init`.
        config: the DeepSpeed config (dict or path of a JSON file), to be checked; see the module.
        options: of `distopt.create_optimizer`: `lr`, `weight_decay`, `rest`, …

    Raises:
        ValueError: an option that DeepSpeed does in its own way; no parameter for a matrix rule; a config that sets up
            an optimizer too, or uses what was not tested.
    """
    if config is not None:
        settings = _read(config)
        if "optimizer" in settings:
            raise ValueError(
                f"the DeepSpeed config sets up an optimizer too ({settings['optimizer'].get('type')!r}); delete that "
                "section, or build this one from it: distopt.integrations.deepspeed.from_config(config, model)"
            )
        check_config(settings)
        offload = (settings.get("zero_optimization") or {}).get("offload_optimizer") or {}
        if offload.get("device", "none") != "none" and settings.get("zero_force_ds_cpu_optimizer", True):
            raise ValueError(
                "offloaded states, and zero_force_ds_cpu_optimizer is not false: DeepSpeed would take its own Adam, or "
                'nothing; add "zero_force_ds_cpu_optimizer": false to the DeepSpeed config'
            )
    return ClientOptimizer(name, model, options)


def from_config(config: Any, model: nn.Module) -> tuple[ClientOptimizer, dict[str, Any]]:
    """Build the optimizer that a DeepSpeed config names: `"optimizer": {"type": "distopt_<rule>", "params": {…}}`.

    Args:
        config: dict, or path of a JSON file.
        model: before `deepspeed.initialize`.

    Returns:
        The optimizer, and the config to give to `deepspeed.initialize` with it: without that section, and with the
        settings that DeepSpeed wants to see for an optimizer that is not its own.

    Raises:
        ValueError: see `optimizer`; the type is not one of this package's, with the nearest.
    """
    settings = _read(config)
    check_config(settings)
    section = settings.pop("optimizer", None) or {}
    kind, params = section.get("type"), dict(section.get("params", {}))
    if not isinstance(kind, str) or not kind.lower().startswith("distopt_"):
        raise ValueError(
            f"the DeepSpeed config has optimizer type {kind!r}; it takes \"distopt_<rule>\" here, such as 'distopt_muon'"
        )
    rule_class(kind.lower().removeprefix("distopt_"))
    for key, value in params.items():
        if value == "auto":
            raise ValueError(f"optimizer.params.{key} is 'auto', which only a trainer can fill in; give a value")
    settings["zero_allow_untested_optimizer"] = True
    settings["zero_force_ds_cpu_optimizer"] = False
    lists = {key: tuple(value) if isinstance(value, list) else value for key, value in params.items()}
    return ClientOptimizer(kind.lower().removeprefix("distopt_"), model, lists), settings


def check_config(config: dict[str, Any]) -> None:
    """Refuse what was never run with this optimizer.

    Raises:
        ValueError: names the option, and the nearest that is known.
    """
    for section, known in SUPPORTED.items():
        found: Any = config
        for key in section.split(".") if section else ():
            found = (found or {}).get(key, {})
        for key, value in (found or {}).items():
            if key not in known.split() and not _is_off(value):
                near = difflib.get_close_matches(key, known.split(), n=1, cutoff=0.8)
                raise ValueError(
                    f"the DeepSpeed option {f'{section}.{key}' if section else key!r} was not tested with this optimizer"
                    f"{f'; did you mean {near[0]!r}?' if near else '; remove it'}"
                )
    zero = config.get("zero_optimization") or {}
    if (config.get("fp16") or {}).get("enabled") is True and not zero.get("stage", 0):
        raise ValueError(FP16_AT_STAGE_0)
    for section in ("offload_optimizer", "offload_param"):
        device = (zero.get(section) or {}).get("device", "none")
        if device not in ("none", "cpu"):
            raise ValueError(f"zero_optimization.{section}.device: 'cpu' or 'none', got {device!r}")


def _is_off(value: Any) -> bool:
    """Whether an option is written down, as trainers do, and not used."""
    if isinstance(value, dict):
        return value.get("enabled") is False or value.get("device") == "none"
    return value in (None, False, "none")


def _read(config: Any) -> dict[str, Any]:
    if isinstance(config, dict):
        return dict(config)
    return dict(json.loads(Path(config).read_text()))


class Part:
    """What one call of DeepSpeed steps together: tensors as DeepSpeed hands them over, and an ordinary optimizer.

    Attributes:
        cuts: where the shards lie in the one flat tensor; None where the tensors are parameters, or fp32 copies of them.
        copies: whether they are such copies.
    """

    def __init__(self, inner: Optimizer, tensors: list[Tensor], cuts: list[Cut] | None, copies: bool) -> None:
        self.inner, self.tensors, self.cuts, self.copies = inner, tensors, cuts, copies
        self.stepped = False

    @property
    def shards(self) -> list[Tensor]:
        """The parameters of the inner optimizer."""
        return list(self.inner.param_groups[0]["params"])

    def step(self, group: dict[str, Any]) -> None:
        """Step with the hyperparameters that the group has now."""
        if self.copies and not self.stepped and not any(t.grad is not None and t.grad.any() for t in self.tensors):
            return  # DeepSpeed's step with zero gradients before the first
        if self.cuts is not None:
            self.follow()
        mine = self.inner.param_groups[0]
        mine.update({key: value for key, value in group.items() if key in mine and key != "params"})
        self.inner.step()
        self.stepped = True
        for shard in self.shards if self.cuts is not None else ():
            shard.grad = None

    def follow(self) -> None:
        """Let the shards show the partition as it lies now, and its gradient."""
        assert self.cuts is not None
        (flat,) = self.tensors
        if not self.stepped:
            self.compare(flat)
        for shard, cut in zip(self.shards, self.cuts):
            place = slice(cut.offset, cut.offset + cut.numel)
            shard.data = flat.detach()[place]
            shard.grad = None if flat.grad is None else flat.grad.detach()[place]

    def compare(self, flat: Tensor) -> None:
        """The partition holds what the model does, or it is cut in a way that is not known here.

        Raises:
            ValueError: on every rank of the group.
        """
        assert self.cuts is not None
        wrong = []
        for cut in self.cuts:
            weights = cut.weights().to(flat.device)
            if not torch.equal(flat.detach()[cut.offset : cut.offset + cut.numel].to(weights), weights):
                wrong.append(cut.name)
        group = self.shards[0]._distopt_flat.group  # type: ignore[attr-defined]
        votes = torch.tensor(float(len(wrong)), device=flat.device)
        dist.all_reduce(votes, group=group)
        if votes:
            raise ValueError(
                f"DeepSpeed's fp32 partition does not hold the weights of {', '.join(map(repr, wrong[:3])) or 'another rank'}: "
                "either weights were loaded into the module after deepspeed.initialize (call "
                "engine.optimizer.refresh_fp32_params()), or this version of DeepSpeed partitions in another way "
                "(0.19.8 is known)"
            )


class ClientOptimizer(torch.optim.Optimizer):
    """See the module. Its class name is free of the rule's: DeepSpeed treats a class called Muon as its own.

    Attributes:
        routing: per parameter its name, rule and why, as `distopt.Optimizer.routing`.
        parts: the inner optimizers, in the order in which DeepSpeed stepped them first.
    """

    def __init__(self, name: str, model: nn.Module, options: dict[str, Any]) -> None:
        for key in options.keys() & REFUSED.keys():
            raise ValueError(f"{key} is not available under DeepSpeed: {REFUSED[key]}")
        for rule in (name, options.get("rest", "adamw")):
            if rule_class(rule).observes or rule_class(rule).modes:
                raise ValueError(
                    f"{rule} wants more than steps (optimizer.observe, or train and eval), which was not tested with DeepSpeed"
                )
        with described(model):
            made = create_optimizer(name, model, **options)
        self.routing, self._engine = made.routing, dict(made.engine)
        self._members = [list(zip(group["param_names"], group["params"])) for group in made.param_groups]
        self._options = [group.keys() - {"params", "param_names"} for group in made.param_groups]
        groups = [
            {**{key: value for key, value in group.items() if key != "param_names"}, "number": number}
            for number, group in enumerate(made.param_groups)
        ]
        self.parts: list[Part] = []
        self._gloo: dict[tuple[int, ...], dist.ProcessGroup] = {}
        super().__init__(groups, dict(made.defaults))

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Step the groups that DeepSpeed shows at this moment.

        Raises:
            ValueError: on the first step, what cannot be served; later see `distopt.Optimizer.step`.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for part in self._parts_of(group):
                part.step(group)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """What this rank needs to continue; collective where DeepSpeed partitions, as its save_checkpoint is."""
        groups = [{**group, "params": [number]} for number, group in enumerate(self.param_groups)]
        parts = [part.inner.state_dict() for group in self.param_groups for part in self._parts_of(group)]
        return {"state": {}, "param_groups": groups, "parts": parts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave on this rank of as many ranks.

        Raises:
            ValueError: it comes from another optimizer, or from other partitions.
        """
        if "parts" not in state_dict:
            raise ValueError("the checkpoint was written with another optimizer than distopt's; it cannot be continued")
        parts = [part for group in self.param_groups for part in self._parts_of(group)]
        if len(parts) != len(state_dict["parts"]) or len(state_dict["param_groups"]) != len(self.param_groups):
            raise ValueError(
                f"the checkpoint has {len(state_dict['param_groups'])} groups in {len(state_dict['parts'])} partitions, "
                f"here there are {len(self.param_groups)} in {len(parts)}; keep the ZeRO stage and its sub_group_size"
            )
        for part, saved in zip(parts, state_dict["parts"]):
            part.inner.load_state_dict(saved)
        for group, saved in zip(self.param_groups, state_dict["param_groups"]):
            group.update({key: value for key, value in saved.items() if key != "params"})

    def _parts_of(self, group: dict[str, Any]) -> list[Part]:
        """The parts of what a group holds now; those that are new are made, which is collective."""
        tensors = list(group["params"])
        members = self._members[group["number"]]
        if not tensors:
            return []
        if is_partitioned(members[0][1]):
            return [self._find([flat]) or self._partitioned(group, flat, members) for flat in tensors]
        return [self._find(tensors) or self._replicated(group, tensors, members)]

    def _find(self, tensors: list[Tensor]) -> Part | None:
        for part in self.parts:
            if len(part.tensors) == len(tensors) and all(a is b for a, b in zip(part.tensors, tensors)):
                return part
        return None

    def _replicated(self, group: dict[str, Any], tensors: list[Tensor], members: Members) -> Part:
        """Stage 0: the parameters themselves, or fp32 copies of them, whole on every rank."""
        if [t.shape for t in tensors] != [param.shape for _, param in members]:
            raise ValueError(
                "the parameters of this optimizer were replaced in a way that is not known; was it handed to "
                "deepspeed.initialize(model=…, optimizer=…) with the model that it was built for?"
            )
        if any(param.dtype == torch.float16 for _, param in members):
            raise ValueError(FP16_AT_STAGE_0)
        named = [(name, tensor) for (name, _), tensor in zip(members, tensors)]
        copies = any(tensor is not param for tensor, (_, param) in zip(tensors, members))
        return self._add(group, named, tensors, None, copies)

    def _partitioned(self, group: dict[str, Any], flat: Tensor, members: Members) -> Part:
        """Stages 1, 2 and 3: pieces of parameters in a flat partition."""
        cuts, ranks = cuts_of(flat, members)
        if len(cuts) < len(members) and any(
            state.kind == "group" for state in group_rule(group).states(Shape(4, 4)).values()
        ):
            raise ValueError(
                f"{group['rule']} keeps a state for all parameters together, and DeepSpeed's stage 3 cuts them into "
                "sub-groups; raise zero_optimization.sub_group_size above the number of parameters"
            )
        reachable = self._reachable(ranks, flat.device)
        named: Members = []
        for cut in cuts:
            local = flat.detach()[cut.offset : cut.offset + cut.numel]
            named.append((cut.name, flat_shard(local, shape=cut.shape, start=cut.start, group=reachable)))
        return self._add(group, named, [flat], cuts, copies=False)

    def _add(self, group: Any, named: Members, tensors: list[Tensor], cuts: list[Cut] | None, copies: bool) -> Part:
        options = {key: group[key] for key in self._options[group["number"]]}
        inner = Optimizer([{**options, "params": named}], group["rule"], self._engine)
        self.parts.append(Part(inner, tensors, cuts, copies))
        return self.parts[-1]

    def _reachable(self, group: dist.ProcessGroup, device: torch.device) -> dist.ProcessGroup:
        """The group, or one of the same ranks that carries tensors of this device: partitions that are offloaded lie on
        the CPU, which nccl does not serve."""
        if f"{device.type}:" in dist.get_backend_config(group):
            return group
        ranks = tuple(dist.get_process_group_ranks(group))
        if ranks not in self._gloo:
            self._gloo[ranks] = dist.new_group(list(ranks), backend="gloo", use_local_synchronization=True)
        return self._gloo[ranks]
