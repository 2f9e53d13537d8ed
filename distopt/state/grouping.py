"""A param group as the plan reads it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from distopt.plan.buckets import Group, Spec
from distopt.plan.build import WIRE
from distopt.plan.cost import Rates
from distopt.rules import group_rule
from distopt.state.codecs import group_storage


def planned_group(
    options: Mapping[str, Any],
    specs: Iterable[Spec],
    replicas: tuple[int, ...] | None,
    *,
    gpu: bool,
    rates: Rates | None = None,
) -> Group:
    """What `plan_group` plans.

    Args:
        options: of the group, complete: the rule's, and those of storage and of the plan.
        specs: its parameters.
        replicas: ranks to partition states over.
        gpu: whether it runs on one.
        rates: of the machine, where they are not those of the device's preset.

    Raises:
        ValueError: a hyperparameter out of range, an unknown codec.
    """
    return Group(
        group_rule(dict(options)),
        tuple(specs),
        replicas,
        gpu,
        group_storage(options),
        options["split"],
        options["strategy"],
        rates,
        wire=WIRE[options["wire_dtype"]],
    )
