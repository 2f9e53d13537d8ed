"""Two sets of weights, those that are trained and those to evaluate (Schedule-Free), exchanged in the model."""

from __future__ import annotations

from typing import Any

from distopt.bound import Bound
from distopt.rule import StateView
from distopt.rules import group_rule


def swap(bound: Bound, groups: list[dict[str, Any]], wanted: list[bool]) -> None:
    """Exchange the weights that are trained for those to evaluate, or back, in the groups that are `wanted`."""
    for group, settings, changes in zip(bound.groups, groups, wanted):
        if not changes:
            continue
        rule = group_rule(settings)
        other = rule.evaluated if settings["train_mode"] else rule.trained
        for number, window in enumerate(group.windows):
            unit = group.units.of.get(number)
            if unit is None:
                weight = window.weight()
                weight.copy_(other(weight.float(), StateView(window.state)))
            else:
                coded = {name: group.units.read(number, None, name) for name in unit.stores}
                value = other(unit.weight(number), StateView({**window.state, **coded}))
                unit.set_weight(number, value)
            window.finish()
        bound.gather(group)
