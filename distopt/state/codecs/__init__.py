"""The table of codecs: one line each. A codec is one file here."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from distopt.plan.pages import parse_offload
from distopt.plan.tiles import Storage
from distopt.rule import Rule, Shape
from distopt.rules import group_rule
from distopt.state.codecs.base import Codec
from distopt.state.codecs.bf16 import BF16, BF16Stochastic
from distopt.state.codecs.fp8 import Fp8
from distopt.state.codecs.fp32 import FP32
from distopt.state.codecs.int4 import Int4
from distopt.state.codecs.int8 import Int8
from distopt.state.master import MASTERS

__all__ = ["CODECS", "FP32", "STORAGE_OPTIONS", "Codec", "group_storage", "state_names"]

CODECS: dict[str, type[Codec]] = {
    "fp32": FP32,
    "bf16": BF16,
    "bf16_sr": BF16Stochastic,
    "int8": Int8,
    "int4": Int4,
    "fp8": Fp8,
}


STORAGE_OPTIONS: dict[str, Any] = {"state_codec": "fp32", "master_codec": "none", "rounding_seed": 0, "offload": None}
"""Options of every group that say how states are stored, whatever the rule, with their defaults."""


def state_names(rule: Rule) -> set[str]:
    """The states that a rule keeps for a matrix or a vector."""
    return {name for shape in (Shape(2, 3), Shape(1, 3, 1)) if not rule.refuse(shape) for name in rule.states(shape)}


def group_storage(group: Mapping[str, Any]) -> Storage:
    """How a group's states are stored. `state_codec` is the name of a codec for all states, or a dict of names by state,
    in which the states that it leaves out are fp32; `packed` stores half of each symmetric state; `master_codec` says
    what is kept of fp32 weights beside parameters of lower precision; `rounding_seed` is the seed of stochastic rounding;
    `offload` says where states lie (`plan.pages`).

    Raises:
        ValueError: an unknown codec, state or place; `packed` where no state is symmetric.
    """
    asked = group["state_codec"]
    asked = asked if isinstance(asked, Mapping) else {"": asked}
    rule = group_rule(dict(group))
    names = state_names(rule)
    for state in asked:
        if state and state not in names:
            raise ValueError(f"state_codec: there is no state {state!r}; this rule keeps {sorted(names)}")
    for codec in asked.values():
        if codec not in CODECS:
            near = get_close_matches(str(codec), CODECS, n=1)
            raise ValueError(
                f"state_codec: {codec!r} is not a codec{f', did you mean {near[0]!r}?' if near else ''} "
                f"(known: {', '.join(CODECS)})"
            )
    chosen = {state: (CODECS[c](True), CODECS[c](False)) for state, c in asked.items() if c != "fp32"}
    if group["packed"] and not any(state.symmetric for state in rule.states(Shape(2, 3)).values()):
        raise ValueError(
            f"packed: {type(rule).__name__} keeps no symmetric matrices; leave the option out of this group"
        )
    if group["master_codec"] not in MASTERS:
        raise ValueError(f"master_codec: one of {', '.join(MASTERS)}, got {group['master_codec']!r}")
    offload = parse_offload(group["offload"])
    exact, packing = (FP32() if given else None for given in (offload is not None, group["packed"]))
    return Storage(
        chosen, int(group["rounding_seed"]), MASTERS[group["master_codec"]], packing, offload=offload, exact=exact
    )
