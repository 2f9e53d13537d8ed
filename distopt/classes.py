"""The public classes: one per rule, with a constructor of that rule's hyperparameters."""

from __future__ import annotations

from dataclasses import fields
from functools import cache
from inspect import Parameter, Signature
from typing import Any

from distopt.optimizer import Optimizer
from distopt.options import ENGINE_OPTIONS, GROUP_OPTIONS, TORCH_OPTIONS, check_options
from distopt.rules import rule_class


@cache
def optimizer_class(name: str) -> type[Optimizer]:
    """The public class of a rule, the same at every call: torch.optim's constructor, then this package's keyword-only
    options."""
    rule = rule_class(name)
    parameters = [
        Parameter("self", Parameter.POSITIONAL_OR_KEYWORD),
        Parameter("params", Parameter.POSITIONAL_OR_KEYWORD),
    ]
    keyword_only: list[Parameter] = []
    for f in fields(rule):
        kind = Parameter.KEYWORD_ONLY if f.kw_only else Parameter.POSITIONAL_OR_KEYWORD
        (keyword_only if f.kw_only else parameters).append(Parameter(f.name, kind, default=f.default))
    for option, default in {**ENGINE_OPTIONS, **GROUP_OPTIONS, **dict.fromkeys(TORCH_OPTIONS)}.items():
        keyword_only.append(Parameter(option, Parameter.KEYWORD_ONLY, default=default))
    signature = Signature(parameters + keyword_only)

    def __init__(self: Optimizer, *args: Any, **kwargs: Any) -> None:
        check_options(name, set(kwargs) - {"params"})
        bound = signature.bind(self, *args, **kwargs)
        options = dict(bound.arguments)
        del options["self"]
        Optimizer.__init__(self, options.pop("params"), name, options)

    __init__.__signature__ = signature  # type: ignore[attr-defined]
    members = {"__init__": __init__, "__doc__": rule.__doc__, "__module__": "distopt", "rule_name": name}
    return type(rule.__name__, (Optimizer,), members)
