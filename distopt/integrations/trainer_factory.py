"""What the Transformers Trainer calls to make an optimizer, and what it may not be combined with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import TrainerCallback, trainer
from transformers.integrations.deepspeed import deepspeed_config
from transformers.trainer_utils import check_target_module_exists

from distopt.build import create_optimizer
from distopt.integrations import accelerate
from distopt.integrations.trainer_states import StatesElsewhere, check_where_states_are
from distopt.rule import require

PREFIX = "distopt_"


class Promise(str):
    """The name of a rule in the options that a Trainer holds; as long as the Trainer does, and nothing was built."""

    __slots__ = ("__weakref__",)


_promised: WeakValueDictionary[int, Promise] = WeakValueDictionary()


def promise(name: str) -> Promise:
    """A name that `RefuseTwo` knows of until the optimizer is built."""
    made = Promise(name)
    _promised[id(made)] = made
    return made


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
    ) -> torch.optim.Optimizer:
        """Build the optimizer; see `distopt.integrations.transformers.optimizer`.

        Raises:
            ValueError: as `distopt.create_optimizer`; FSDP1 holds the parameters; under DeepSpeed, as
                `distopt.integrations.deepspeed.optimizer`.
        """
        _promised.pop(id(name), None)
        name = str(name)  # what state dicts hold is a plain string
        if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
            raise ValueError(
                "the model is wrapped by FSDP1, which shows flattened pieces instead of matrices; choose FSDP2: "
                "fsdp_config={'version': 2} in TrainingArguments, fsdp_version: 2 in Accelerate's config"
            )
        if target_modules is not None:
            options["select"] = _selects(target_modules)
        try:
            if deepspeed_config() is not None:
                require(
                    not partition, "partition=True is for DDP; ZeRO stage 1 divides states over the ranks by itself"
                )
                return accelerate.create_optimizer(name, model, **options)
            if partition and dist.is_initialized() and dist.get_world_size() > 1:
                options["process_group"] = dist.group.WORLD
            built = create_optimizer(name, model, **options)
        except ValueError as error:
            if target_modules is None:
                raise
            raise ValueError(f"target_modules (optim_target_modules) = {target_modules!r}: {error}") from None
        if options.get("process_group") is not None:
            built.__class__ = type(type(built).__name__, (StatesElsewhere, type(built)), {})
        built.register_load_state_dict_pre_hook(check_where_states_are)
        return built


def _selects(target_modules: str | list[str]) -> Callable[[str], bool]:
    """Transformers' reading of `optim_target_modules`, on names of weights."""
    if isinstance(target_modules, str) and target_modules.replace("_", "-") == "all-linear":
        return lambda name: True
    return lambda name: bool(check_target_module_exists(target_modules, name.rpartition(".")[0]))


def check_deepspeed(name: str) -> None:
    """Refuse a second optimizer in the DeepSpeed config of the TrainingArguments that were made last: the Trainer would
    take that one and never look at ours."""
    config = deepspeed_config()
    if config and "optimizer" in config:
        raise ValueError(
            f"both the Trainer ({name}) and the DeepSpeed config ({config['optimizer'].get('type')}) choose an optimizer; "
            "remove the section 'optimizer' from the DeepSpeed config, or ours from the Trainer"
        )


class RefuseTwo(TrainerCallback):
    """Looks at every Trainer that is made: with an optimizer in the DeepSpeed config the Trainer's is never looked at."""

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse both.

        Raises:
            ValueError: names both.
        """
        name = str(getattr(args.optim, "value", args.optim))
        for ours in ([name] if name.startswith(PREFIX) else []) + list(_promised.values()):
            check_deepspeed(ours)


def refuse_two() -> None:
    """Let `RefuseTwo` look at the Trainers that are made from now on."""
    callbacks: list[type[TrainerCallback]] = trainer.DEFAULT_CALLBACKS  # type: ignore[assignment]
    if RefuseTwo not in callbacks:
        callbacks.append(RefuseTwo)
