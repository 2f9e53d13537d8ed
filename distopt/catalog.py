"""What there is, by name: rules and quasi-Newton methods, and what each keeps, sees and comes from, read off themselves."""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass, fields
from typing import Any

import torch

from distopt.quasi_newton import DRIVERS, driver_class
from distopt.rule import Rule, Shape, State
from distopt.rules import RULES, nearest, rule_class

MATRIX, VECTOR = Shape(1009, 2003), Shape(1, 2003, 1)
"""Example shapes whose sizes no rule's constants can be mistaken for; what is said about them is said about any."""


@dataclass(frozen=True, kw_only=True)
class OptimizerInfo:
    """One optimizer, with its default options.

    Attributes:
        name: What `create_optimizer` and, for a rule, a group's `rule` call it.
        optimizer: The class in `distopt`.
        family: What it must see: "elementwise" (any slice), "reduce" (sums too), "matrix" (whole matrices), "closure"
            (the loss, where it likes).
        matrix_states: Shape of each state of a matrix of rows × cols, in words, by name.
        vector_states: The same for a vector of n; None where the rule takes no vectors.
        defaults: Its own options.
        lr: The units of the learning rate.
        start: Sensible starting values, with their source.
        description: What it does, when it pays, and the deviations from the paper.
        source: The paper or page that it was written from.
    """

    name: str
    optimizer: str
    family: str
    matrix_states: dict[str, str]
    vector_states: dict[str, str] | None
    defaults: dict[str, Any]
    lr: str
    start: str
    description: str
    source: str


def list_optimizers() -> list[str]:
    """The names of all optimizers, as `optimizer_info` and `create_optimizer` take them: those of `distopt.rules.RULES`,
    and those of `distopt.quasi_newton.DRIVERS`, which need closures."""
    return [*RULES, *DRIVERS]


def optimizer_info(name: str) -> OptimizerInfo:
    """What is known of an optimizer.

    Raises:
        ValueError: there is none of this name; names the nearest.
    """
    if name in DRIVERS:
        return _driver_info(name)
    if name not in RULES:
        known = list_optimizers()
        raise ValueError(f"no optimizer is called {name!r}{nearest(name, known)} (known: {', '.join(known)})")
    cls = rule_class(name)
    rule = cls()
    return OptimizerInfo(
        name=name,
        optimizer=RULES[name],
        family=rule.reach,
        matrix_states={key: _words(state, MATRIX, rule) for key, state in rule.states(MATRIX).items()},
        vector_states=None
        if rule.refuse(VECTOR)
        else {key: _words(state, VECTOR, rule) for key, state in rule.states(VECTOR).items()},
        defaults={field.name: field.default for field in fields(cls)},
        **_written(cls),
    )


def _driver_info(name: str) -> OptimizerInfo:
    cls = driver_class(DRIVERS[name])
    signature = inspect.signature(cls).parameters
    defaults = {key: p.default for key, p in signature.items() if p.default is not p.empty and key != "process_group"}
    rows, cols, history = 3, 5, 7
    kept = []
    for shape in ((rows, cols), (rows * cols,)):
        param = torch.zeros(shape, requires_grad=True)
        optimizer = cls([param], **({"history_size": history} if "history_size" in defaults else {}))
        words = {history: "history_size", rows * cols: "n"} | ({rows: "rows", cols: "cols"} if len(shape) == 2 else {})
        kept.append(
            {
                key: " × ".join(words[size] for size in state.shape)
                for key, state in optimizer.state[param].items()
                if key != "progress"
            }
        )
    return OptimizerInfo(
        name=name,
        optimizer=DRIVERS[name],
        family="closure",
        matrix_states=kept[0],
        vector_states=kept[1],
        defaults=defaults,
        **_written(cls),
    )


def _written(cls: type) -> dict[str, str]:
    """What the docstrings say: of the class, its paragraphs on lr and on how to start; of the module, the source."""
    description = inspect.cleandoc(cls.__doc__ or "")
    paragraphs = [" ".join(paragraph.split()) for paragraph in description.split("\n\n")]
    return {
        "lr": next((text for text in paragraphs if text.startswith("lr")), ""),
        "start": next((text.removeprefix("Start: ") for text in paragraphs if text.startswith("Start: ")), ""),
        "description": description,
        "source": inspect.cleandoc(sys.modules[cls.__module__].__doc__ or ""),
    }


def _words(state: State, shape: Shape, rule: Rule) -> str:
    """The shape of a state in terms of the parameter's, and of the rule's `rank` where it has one (at most the shorter
    side of a matrix)."""
    whole = "rows × cols" if shape.is_matrix else "n"
    words = {getattr(rule, "rank", 0): "rank", 1: "1", shape.rows: "rows", shape.cols: "cols"}
    return {
        "like": whole,
        "row": "rows × 1" if shape.is_matrix else "1",
        "col": "1 × cols" if shape.is_matrix else whole,
        "matrix": "1",
        "group": "1 per group",
        "owner": " × ".join(words.get(size, str(size)) for size in state.shape),
    }[state.kind]
