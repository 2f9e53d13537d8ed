"""The Transformers Trainer, and Accelerate: what to write, what is supported and what is not.

Needs `transformers>=5.2` and `accelerate>=1.13`: `pip install 'distopt[transformers]'`.

**Trainer, from Python.** One argument, and the Trainer's parameter groups, sharding and checkpoints as before:

    trainer = Trainer(
        model, args, train_dataset=data,
        optimizer_cls_and_kwargs=distopt.integrations.transformers.optimizer("muon", lr=3e-3, weight_decay=0.1),
    )

The options are those of `distopt.create_optimizer`, which routes the parameters: hidden matrices to the matrix rule,
embeddings, head, norms, biases and scalars to AdamW (`rest=`, `rest_options=`); norms and biases are not decayed. The
Trainer hands such a factory nothing of TrainingArguments, so that learning rate and weight decay are given here.

**Trainer, by name.** After `distopt.integrations.transformers.register()`, `optim="distopt_muon"` and the other rules
of `distopt.list_optimizers()` work in TrainingArguments, as `--optim` on the command line and in config files:

- `_8bit` at the end of a name keeps the states in 8 bits (`state_codec="int8"`), for the rules that can.
- `learning_rate` and `weight_decay` are those of all groups.
- `adam_beta1`, `adam_beta2` and `adam_epsilon` reach the rules that have them (of the matrices and of the rest) where
  they differ from their defaults in TrainingArguments; at those defaults a rule keeps its own. What no rule has is
  ignored with a warning.
- `optim_args="momentum=0.9,nesterov=false,rest=lion,rest.beta1=0.95"` are further options; `beta1`, `beta2`, … stand for
  the entries of `betas`, `rest.` for the options of the rest's rule. An unknown one is an error that names the nearest.
- `optim_target_modules` (names, a regular expression, or "all-linear") chooses the modules whose weights a matrix rule
  takes. For other rules, and where it matches nothing, it is an error.

`register` adds names to transformers' enum of optimizers, which it validates against; nothing is added without the call.
A process that unpickles TrainingArguments with such a name calls `register()` before.

**Accelerate.** `accelerator.prepare(model, optimizer)` takes any optimizer of this package: those made by
`distopt.create_optimizer(name, model, …)` and `distopt.AdamW(model.parameters(), …)` alike. Nothing is allocated before
the model is sharded; layouts are read on the first step. `accelerator.clip_grad_norm_`, `accumulate`, mixed precision,
`save_state` and `load_state` work as they do with torch's optimizers.

| | one process | DDP | FSDP2 | FSDP1, DeepSpeed |
| --- | --- | --- | --- | --- |
| Trainer, both ways | yes | yes, states on every rank | yes | no, an error |
| Accelerate | yes | yes, states on every rank | yes | never tried |
| resume, same world size | bit-identical | bit-identical | bit-identical | |
| `partition=True`, with `NativeCheckpoint` | | yes, states divided | no need: they are divided | |

**States divided over DDP's ranks.** The Trainer saves the optimizer on one rank, which under DDP is right only where
every rank has all states. `optimizer("muon", lr=…, partition=True)` divides them; a callback then writes them, with the
weights, in the package's own checkpoint beside the Trainer's files, on all ranks, and reads them back on resume:

    trainer = Trainer(…, callbacks=[distopt.integrations.transformers.NativeCheckpoint()])

**Not supported.** The Trainer under FSDP1 or DeepSpeed, which is an error (`distopt.integrations.deepspeed` is for scripts
that call `deepspeed.initialize`); optimizers that need a closure (L-BFGS and its kin), of which the Trainer has none;
parameters on several devices (`device_map="auto"`); fp64. With fp16 (read in the sources, not run) a skipped step is
skipped on all ranks and not counted, but the learning rate's schedule moves on, as with torch's fused optimizers: only the
optimizer knows that it skipped.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Callable
from dataclasses import MISSING, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from distopt import checkpoint
from distopt.build import create_optimizer
from distopt.optimizer import Optimizer
from distopt.rule import require
from distopt.rules import RULES, rule_class

try:
    from transformers import TrainerCallback, trainer, trainer_optimizer
    from transformers.integrations.deepspeed import deepspeed_config
    from transformers.trainer_utils import check_target_module_exists
    from transformers.training_args import OptimizerNames
except ImportError as error:
    raise ImportError(
        "distopt.integrations.transformers needs transformers >= 5.2 and accelerate >= 1.13; "
        f"pip install 'distopt[transformers]' ({error})"
    ) from error

PREFIX = "distopt_"
EIGHT_BIT = "_8bit"
NATIVE = "distopt_native"
"""Marks a state dict whose states are in a native checkpoint beside it; also the name of that checkpoint's directory."""


def optimizer(
    name: str, *, lr: float, target_modules: str | list[str] | None = None, partition: bool = False, **options: Any
) -> tuple[type[Factory], dict[str, Any]]:
    """What `Trainer(optimizer_cls_and_kwargs=…)` takes.

    Args:
        name: of a rule, as in `distopt.list_optimizers()`.
        lr: learning rate of all groups, in the rule's units.
        target_modules: the modules whose weights a matrix rule takes: parts of their names, a regular expression, or
            "all-linear"; None leaves it to their roles.
        partition: divide the states over DDP's ranks; needs the callback `NativeCheckpoint` to be saved.
        options: of `distopt.create_optimizer`: `weight_decay`, `rest`, `rest_options`, the rule's, and the keyword-only
            ones that all optimizers have.

    Raises:
        ValueError: there is no such rule (the nearest is named), or the DeepSpeed config has an optimizer of its own.
    """
    rule_class(name)
    _check_deepspeed(name)
    return Factory, {"name": name, "lr": lr, "target_modules": target_modules, "partition": partition, **options}


class Factory:
    """What the Trainer calls, as `Factory()(model, **options)`, when the model is there and not yet sharded."""

    def __call__(
        self,
        model: nn.Module,
        *,
        name: str,
        target_modules: str | list[str] | None = None,
        partition: bool = False,
        **options: Any,
    ) -> Optimizer:
        """Build the optimizer; see `optimizer`.

        Raises:
            ValueError: as `distopt.create_optimizer`; or FSDP1 or DeepSpeed holds the parameters.
        """
        if deepspeed_config() is not None:
            raise ValueError(
                "the Trainer under DeepSpeed is not supported; give deepspeed.initialize the optimizer of "
                "distopt.integrations.deepspeed, as launch/train_deepspeed.py does"
            )
        from torch.distributed.fsdp import FullyShardedDataParallel

        if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
            raise ValueError(
                "the model is wrapped by FSDP1, which shows flattened pieces instead of matrices; choose FSDP2: "
                "fsdp_config={'version': 2} in TrainingArguments, fsdp_version: 2 in Accelerate's config"
            )
        if target_modules is not None:
            options["select"] = _selects(target_modules)
        if partition and dist.is_initialized() and dist.get_world_size() > 1:
            options["process_group"] = dist.group.WORLD
        try:
            built = create_optimizer(name, model, **options)
        except ValueError as error:
            if target_modules is None:
                raise
            raise ValueError(f"target_modules (optim_target_modules) = {target_modules!r}: {error}") from None
        if options.get("process_group") is not None:
            built.__class__ = type(type(built).__name__, (_StatesElsewhere, type(built)), {})
        built.register_load_state_dict_pre_hook(_check_where_states_are)
        return built


def _selects(target_modules: str | list[str]) -> Callable[[str], bool]:
    """Transformers' reading of `optim_target_modules`, on names of weights."""
    if isinstance(target_modules, str) and target_modules.replace("_", "-") == "all-linear":
        return lambda name: True
    return lambda name: bool(check_target_module_exists(target_modules, name.rpartition(".")[0]))


# ---- by name


def register() -> None:
    """Make `optim="distopt_<name>"` known to transformers, for the name of every rule; see the module."""
    for name in _names():
        if name not in OptimizerNames._value2member_map_:
            _add_member(OptimizerNames, name)
        trainer_optimizer._OPTIMIZER_HANDLERS[OptimizerNames(name)] = _handle
    type.__setattr__(OptimizerNames, "_missing_", classmethod(_missing))
    callbacks: list[type[TrainerCallback]] = trainer.DEFAULT_CALLBACKS  # type: ignore[assignment]
    if _RefuseTwo not in callbacks:
        callbacks.append(_RefuseTwo)


def _names() -> list[str]:
    """Everything after `optim=` that is ours."""
    names = [PREFIX + name for name in RULES]
    return names + [name + EIGHT_BIT for name in names]


def _add_member(enum: Any, value: str) -> None:
    """One more member of an enum of strings, whose class has no public way to get one."""
    member = str.__new__(enum, value)
    member._name_, member._value_ = value.upper(), value
    type.__setattr__(enum, member._name_, member)
    enum._member_map_[member._name_] = member
    enum._member_names_.append(member._name_)
    enum._value2member_map_[value] = member


def _missing(cls: Any, value: object) -> None:
    if isinstance(value, str) and value.startswith(PREFIX.rstrip("_")):
        [near] = get_close_matches(value, _names(), n=1, cutoff=0.0)
        raise ValueError(f"optim={value!r} is not known; did you mean {near!r}? (known: {', '.join(_names())})")
    super(cls, cls)._missing_(value)


def _handle(context: Any) -> tuple[type[Factory], dict[str, Any]]:
    """The entry in transformers' table: TrainingArguments to the options of `Factory`."""
    args = context.args
    name = str(args.optim.value).removeprefix(PREFIX)
    options: dict[str, Any] = {"lr": args.learning_rate, "weight_decay": args.weight_decay}
    if name.endswith(EIGHT_BIT):
        name, options["state_codec"] = name.removesuffix(EIGHT_BIT), "int8"
    own, of_rest = _parse(context.optim_args)
    matrix = rule_class(name).reach == "matrix"
    rest = own.get("rest", "adamw")
    adam = {key: value for key, value in _changed(args).items() if key.startswith("adam_")}
    used: set[str] = set()
    options |= _settings(name, adam, own, used)
    if matrix:
        options["rest_options"] = _settings(rest, adam, of_rest, used)
    elif of_rest or "rest" in own:
        raise ValueError(f"optim_args: 'rest' has no meaning for {name}, which takes every parameter")
    for key in sorted(adam.keys() - used):
        warnings.warn(f"{key}={adam[key]} is ignored: {args.optim.value} has no such setting", stacklevel=2)
    return Factory, {"name": name, "target_modules": args.optim_target_modules, **options}


def _parse(optim_args: dict[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Values of `optim_args`, with what begins with `rest.` apart.

    Raises:
        ValueError: a setting that TrainingArguments has a field for.
    """
    own: dict[str, Any] = {}
    of_rest: dict[str, Any] = {}
    for key, text in optim_args.items():
        for name, field in (("lr", "learning_rate"), ("weight_decay", "weight_decay")):
            if key == name:
                raise ValueError(f"optim_args: {name} is TrainingArguments' {field}; set it there")
        target = of_rest if key.startswith("rest.") else own
        target[key.removeprefix("rest.")] = _value(text)
    return own, of_rest


def _value(text: str) -> Any:
    if text.lower() in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        found = getattr(torch, text, None)
        return found if isinstance(found, torch.dtype) else text


def _changed(args: Any) -> dict[str, Any]:
    """What differs from the defaults of TrainingArguments."""
    return {
        field.name: getattr(args, field.name)
        for field in fields(args)
        if field.default is not MISSING and getattr(args, field.name) != field.default
    }


def _settings(name: str, adam: dict[str, float], given: dict[str, Any], used: set[str]) -> dict[str, Any]:
    """Options of one rule: Adam's settings where it has them, noted in `used`, then what is given explicitly.

    Raises:
        ValueError: a value of the wrong type.
    """
    defaults = {field.name: field.default for field in fields(rule_class(name))}
    options: dict[str, Any] = {}
    betas = defaults.get("betas")
    if isinstance(betas, tuple):
        now = list(betas)
        for position in range(len(now)):
            for source, key in ((adam, f"adam_beta{position + 1}"), (given, f"beta{position + 1}")):
                if key in source:
                    now[position] = source[key]
                    used.add(key)
        if now != list(betas):
            options["betas"] = tuple(now)
        # Of the rules with betas only: elsewhere eps is another number (Muon's is of its matrices' norms).
        if "adam_epsilon" in adam and isinstance(defaults.get("eps"), float):
            options["eps"] = adam["adam_epsilon"]
            used.add("adam_epsilon")
    options |= {key: value for key, value in given.items() if key not in used}
    for key, value in options.items():
        default = defaults.get(key)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if (isinstance(default, bool) and not isinstance(value, bool)) or (
            isinstance(default, int | float) and not isinstance(default, bool) and not number
        ):
            raise ValueError(f"optim_args: {key}={value!r} of {name}: expected a {type(default).__name__}")
    return options


# ---- what cannot go together


def _check_deepspeed(name: str) -> None:
    """Refuse a second optimizer in the DeepSpeed config of the TrainingArguments that were made last: the Trainer would
    take that one and never look at ours."""
    config = deepspeed_config()
    if config and "optimizer" in config:
        raise ValueError(
            f"both the Trainer ({name}) and the DeepSpeed config ({config['optimizer'].get('type')}) choose an optimizer; "
            "remove the section 'optimizer' from the DeepSpeed config, or ours from the Trainer"
        )


class _RefuseTwo(TrainerCallback):
    """Looks at every Trainer that is made: with an optimizer in the DeepSpeed config `optim` is never looked at."""

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        name = str(getattr(args.optim, "value", args.optim))
        if name.startswith(PREFIX):
            _check_deepspeed(name)


# ---- states divided over DDP's ranks


class _StatesElsewhere(Optimizer):
    """An optimizer whose states are divided over replicas, so that the Trainer's file, written by one rank, holds the
    hyperparameters only."""

    written = False  # there is a NativeCheckpoint
    awaited = False  # hyperparameters were loaded, states not yet

    def state_dict(self) -> dict[str, Any]:
        """Hyperparameters, and a mark.

        Raises:
            ValueError: nobody writes the states.
        """
        if self._is_fresh():
            return super().state_dict()
        require(
            self.written,
            "states are divided over the ranks (partition=True), no rank has them all: add "
            "callbacks=[distopt.integrations.transformers.NativeCheckpoint()] to the Trainer",
        )
        self._stateless = True
        try:
            return {**torch.optim.Optimizer.state_dict(self), NATIVE: True}
        finally:
            self._stateless = False

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Hyperparameters of a marked state dict, whose states `NativeCheckpoint` brings."""
        self.awaited = NATIVE in state_dict
        super().load_state_dict({key: value for key, value in state_dict.items() if key != NATIVE})

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """As Optimizer.step.

        Raises:
            ValueError: resumed without the states.
        """
        require(
            not self.awaited,
            f"hyperparameters were resumed, the states in '{NATIVE}' were not: add the callback NativeCheckpoint to the "
            "Trainer",
        )
        return super().step(closure)


def _check_where_states_are(optimizer: Any, state_dict: dict[str, Any]) -> None:
    if NATIVE in state_dict:
        raise ValueError(
            f"this checkpoint was saved with partition=True, its states are in '{NATIVE}'; resume with partition=True on "
            "more than one rank, or load that directory with distopt.checkpoint.load"
        )


class NativeCheckpoint(TrainerCallback):
    """Writes a native checkpoint (weights and states, on all ranks) into each of the Trainer's checkpoints, and reads it
    back when the Trainer resumes. Does nothing where states are whole on every rank.

    Args:
        resume_from: the Trainer's checkpoint to resume from, where it is not `<output_dir>/checkpoint-<step>`.
    """

    def __init__(self, resume_from: str | Path | None = None) -> None:
        self.resume_from = resume_from

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read the states, if the Trainer resumed.

        Raises:
            CheckpointError: there are none, or they do not fit; the same on every rank.
        """
        optimizer = _unwrapped(kwargs["optimizer"])
        if optimizer is None:
            return
        optimizer.written = True
        if optimizer.awaited:
            directory = Path(self.resume_from or _directory(args, state))
            checkpoint.load(directory / NATIVE, model=kwargs["model"], optimizer=optimizer)
            optimizer.awaited = False

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the states; collective.

        Raises:
            CheckpointError: the same on every rank.
        """
        optimizer = _unwrapped(kwargs["optimizer"])
        if optimizer is not None:
            checkpoint.save(_directory(args, state) / NATIVE, model=kwargs["model"], optimizer=optimizer)


def _unwrapped(optimizer: Any) -> _StatesElsewhere | None:
    """The optimizer under Accelerate's wrapper, if its states are divided."""
    found = getattr(optimizer, "optimizer", optimizer)
    return found if isinstance(found, _StatesElsewhere) else None


def _directory(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
