"""The options of optimizers and their groups: names, defaults, and what is refused before anything is bound."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from distopt.layouts import global_shape
from distopt.plan.build import WIRE, check_served
from distopt.plan.cost import load_rates
from distopt.plan.strategies import check_strategy
from distopt.rule import require
from distopt.rules import group_rule, rule_class
from distopt.state.codecs import STORAGE_OPTIONS, group_storage

ENGINE_OPTIONS: dict[str, Any] = {
    "max_grad_norm": None,
    "nonfinite": "raise",
    "missing_grad": "zero",
    "process_group": None,
    "norm_group": None,
    "maximize": False,
    "rates": None,
    "device_budget": None,
}
OWN_OPTIONS: dict[str, Any] = {"packed": False, "split": None, "strategy": "auto", "wire_dtype": "fp32"}
GROUP_OPTIONS: dict[str, Any] = {**STORAGE_OPTIONS, **OWN_OPTIONS}
"""Options of a group beside its rule's."""
TORCH_OPTIONS = ("foreach", "capturable", "differentiable", "fused")
BOOKKEEPING = {"params", "param_names", "rule", "initial_lr", "train_mode"}


def rule_defaults(rule: str) -> dict[str, Any]:
    """The hyperparameters of a rule that have a default."""
    return {f.name: f.default for f in fields(rule_class(rule)) if f.default is not MISSING}


def known_options(rule: str) -> list[str]:
    """What a group of this rule may set."""
    return [*(f.name for f in fields(rule_class(rule))), *GROUP_OPTIONS]


def check_options(rule: str, options: Iterable[str]) -> None:
    """Raise TypeError for the name of an option that neither the rule nor the engine has."""
    known = [*known_options(rule), *ENGINE_OPTIONS]
    for name in sorted(set(options) - set(known) - set(TORCH_OPTIONS)):
        near = get_close_matches(name, known, n=1)
        raise TypeError(f"{rule} has no option {name!r}{f'; did you mean {near[0]!r}?' if near else ''}")


def engine_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the whole optimizer, complete.

    Raises:
        ValueError: a value out of range; rates that cannot be read.
    """
    for name in TORCH_OPTIONS:
        if options.get(name):
            warnings.warn(f"{name}={options[name]!r} has no meaning here and is ignored", stacklevel=4)
    engine = {key: options.get(key, default) for key, default in ENGINE_OPTIONS.items()}
    require(
        engine["nonfinite"] in ("raise", "skip", None),
        f"nonfinite: 'raise', 'skip' or None, got {engine['nonfinite']!r}",
    )
    require(
        engine["missing_grad"] in ("zero", "raise"),
        f"missing_grad: 'zero' or 'raise', got {engine['missing_grad']!r}",
    )
    limit = engine["max_grad_norm"]
    require(limit is None or (math.isfinite(limit) and limit > 0), f"max_grad_norm must be > 0 or None, got {limit}")
    if isinstance(engine["rates"], str | Path):
        engine["rates"] = load_rates(str(engine["rates"]))
    return engine


def optimizer_defaults(rule: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """What groups of an optimizer have where they say nothing."""
    known = {**rule_defaults(rule), **GROUP_OPTIONS}
    return {"rule": rule, **known, **{name: options[name] for name in known_options(rule) if name in options}}


def complete_group(group: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A group with all its options. Where it has a rule of its own, hyperparameters default to that rule's, lr, weight decay
    and storage to the optimizer's `defaults`.

    Raises:
        ValueError: an unknown option or rule.
    """
    name = group.get("rule", defaults["rule"])
    allowed = known_options(name)
    for key in group.keys() - {*allowed, *BOOKKEEPING, *TORCH_OPTIONS}:
        near = get_close_matches(key, sorted(allowed), n=1)
        raise ValueError(f"a group for {name} has no option {key!r}{f'; did you mean {near[0]!r}?' if near else ''}")
    complete = {**group, "rule": name}
    if name != defaults["rule"]:
        shared: dict[str, Any] = {
            key: defaults[key] for key in ("lr", "weight_decay") if key in allowed and key in defaults
        }
        own = dict(OWN_OPTIONS)
        if isinstance(defaults["state_codec"], Mapping):  # of the other rule's states
            own["state_codec"] = GROUP_OPTIONS["state_codec"]
        complete = {**rule_defaults(name), **own, **shared, **complete}
    if rule_class(name).modes:
        complete.setdefault("train_mode", True)
    return complete | {key: value for key, value in defaults.items() if key in allowed and key not in complete}


def check_group(group: dict[str, Any], position: int) -> None:
    """Refuse options out of range, and parameters that the group's rule cannot serve.

    Raises:
        ValueError: names the parameter, what is wrong with it and the remedy.
    """
    rule = group_rule(group)
    group_storage(group)
    check_strategy(rule, group["strategy"])
    require(group["wire_dtype"] in WIRE, f"wire_dtype: {' or '.join(WIRE)}, got {group['wire_dtype']!r}")
    names = group.get("param_names") or [f"group {position} parameter {i}" for i in range(len(group["params"]))]
    if group["split"] and rule.reach == "elementwise":
        warnings.warn(f"split={group['split']!r} is ignored: {group['rule']} sees no matrices", stacklevel=5)
    first: dict[Tensor, str] = {}
    for name, param in zip(names, group["params"]):
        require(param not in first, f"{name!r} is twice in this group, as {first.get(param)!r} before; list it once")
        first[param] = name
        require(
            param.is_floating_point(),
            f"{name!r} has dtype {param.dtype}; optimizers need real floating-point parameters",
        )
        require(
            param.dtype != torch.float64,
            f"{name!r} is float64; states and mathematics are fp32 here: cast the model, or leave it to torch.optim",
        )
        require(
            param.layout == torch.strided, f"{name!r} is sparse; make it dense, or leave it to torch.optim.SparseAdam"
        )
        require(
            not param.is_meta, f"{name!r} is on the meta device; materialize the model (to_empty) before the optimizer"
        )
        if isinstance(param, DTensor):
            unserved = [placement for placement in param.placements if placement.is_partial()]
            require(not unserved, f"{name!r} has placement {unserved}; redistribute it to Shard or Replicate first")
        require(
            rule.reach == "elementwise" or not hasattr(param, "_fsdp_flattened") or hasattr(param, "_distopt_flat"),
            f"{name!r} is a piece of a vector that FSDP1 cut; build the optimizer with distopt.create_optimizer(name, "
            "model), which finds the tensors again",
        )
        check_served(name, global_shape(param), rule, group["split"])


def check_shapes(groups: list[dict[str, Any]], known: set[tuple[int, ...]]) -> None:
    """Refuse flat pieces that took the place of matrices: a rule would see vectors, and say nothing."""
    for group in groups:
        for param in group["params"] if rule_class(group["rule"]).reach != "elementwise" else ():
            require(
                global_shape(param) in known,
                f"a parameter of shape {tuple(param.shape)} took the place of those that {group['rule']} was built for: it "
                "was flattened by FSDP1 (build the optimizer afterwards, with distopt.create_optimizer(name, model)) or "
                "DeepSpeed (use distopt.integrations.deepspeed.optimizer(name, model))",
            )
