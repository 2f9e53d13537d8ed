"""What there is: the rules by name, and what each keeps, sees and comes from, read off the rules themselves."""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass, fields
from typing import Any

from distopt.rule import Rule, Shape, State
from distopt.rules import RULES, rule_class

MATRIX, VECTOR = Shape(1009, 2003), Shape(1, 2003, 1)
"""Example shapes whose sizes no rule's constants can be mistaken for; what is said about them is said about any."""


@dataclass(frozen=True, kw_only=True)
class OptimizerInfo:
    """One update rule, with its default options.

    Attributes:
        name: What `create_optimizer` and a group's `rule` call it.
        optimizer: The class in `distopt`.
        family: What the rule must see: "elementwise" (any slice), "reduce" (sums too), "matrix" (whole matrices).
        matrix_states: Shape of each state of a matrix of rows × cols, in words, by name.
        vector_states: The same for a vector of n; None where the rule takes no vectors.
        defaults: The rule's own options.
        description: What it does, the units of lr and the deviations from the paper.
        source: The paper or page that it was written from.
    """

    name: str
    optimizer: str
    family: str
    matrix_states: dict[str, str]
    vector_states: dict[str, str] | None
    defaults: dict[str, Any]
    description: str
    source: str


def list_optimizers() -> list[str]:
    """The names of all rules, as `optimizer_info` and `create_optimizer` take them."""
    return list(RULES)


def optimizer_info(name: str) -> OptimizerInfo:
    """What is known of a rule.

    Raises:
        ValueError: there is none of this name; names the nearest.
    """
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
        description=inspect.cleandoc(cls.__doc__ or ""),
        source=inspect.cleandoc(sys.modules[cls.__module__].__doc__ or ""),
    )


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
        "optimizer": "1 per group",
        "owner": " × ".join(words.get(size, str(size)) for size in state.shape),
    }[state.kind]
