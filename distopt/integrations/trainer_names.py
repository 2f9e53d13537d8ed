"""`optim="distopt_<name>"`: names in transformers' enum of optimizers, and how TrainingArguments become options."""

from __future__ import annotations

import ast
import warnings
from dataclasses import MISSING, fields
from difflib import get_close_matches
from typing import Any

import torch
from transformers import trainer_optimizer
from transformers.training_args import OptimizerNames

from distopt.integrations.trainer_factory import PREFIX, Factory, refuse_two
from distopt.rules import RULES, rule_class

EIGHT_BIT = "_8bit"


def register() -> None:
    """Make `optim="distopt_<name>"` known to transformers, for the name of every rule; see the module."""
    for name in _names():
        if name not in OptimizerNames._value2member_map_:
            _add_member(OptimizerNames, name)
        trainer_optimizer._OPTIMIZER_HANDLERS[OptimizerNames(name)] = _handle
    type.__setattr__(OptimizerNames, "_missing_", classmethod(_missing))
    refuse_two()


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
