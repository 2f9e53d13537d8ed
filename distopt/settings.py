"""What the groups of an optimizer said when it was bound, and whether they still say it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from distopt.agreement import jsonable
from distopt.plan.buckets import GroupPlan
from distopt.plan.geometry import READING
from distopt.rule import Rule, Shape
from distopt.rules import group_rule
from distopt.state.codecs import STORAGE_OPTIONS

KEPT = (*STORAGE_OPTIONS, "packed", "strategy", "wire_dtype")


class Settings:
    """Of these groups, which are the optimizer's param_groups."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        self._rules = [group_rule(group) for group in groups]
        self._stored = [{name: group[name] for name in KEPT} for group in groups]
        self._readings = _readings(groups)

    def words(self) -> list[str]:
        """What must be the same on every rank."""
        words = [f"group {i}: {type(rule).__name__} {jsonable(asdict(rule))}" for i, rule in enumerate(self._rules)]
        words += [f"group {i}: {jsonable(stored)}" for i, stored in enumerate(self._stored)]
        return words + [f"group {i}: {jsonable(reading)}" for i, reading in enumerate(self._readings)]

    def rules(self, groups: list[dict[str, Any]], plans: Sequence[GroupPlan]) -> list[Rule]:
        """The rules with their present hyperparameters; `plans` learn the present seed of rounding.

        Raises:
            ValueError: one out of range, or one that was changed though states depend on it.
        """
        for i, (group, stored, plan) in enumerate(zip(groups, self._stored, plans)):
            plan.storage.seed = group["rounding_seed"]
            fixed = [name for name in stored if name.endswith("codec") or name in ("packed", "offload")]
            if any(group[name] != stored[name] for name in fixed):
                raise ValueError(
                    f"group {i}: how states are stored was changed after bind (from {stored}); load the state dict into an "
                    "optimizer that was built so"
                )
        rules = [group_rule(group) for group in groups]
        if self._readings != (now := _readings(groups)):
            raise ValueError(
                f"split, block_size or whole_parts were changed after bind, from {self._readings} to {now}; build a new optimizer"
            )
        shape = Shape(4, 4)
        for plan, rule in zip(plans, rules):
            if rule != plan.rule and rule.states(shape).keys() != plan.rule.states(shape).keys():
                raise ValueError(
                    f"{type(rule).__name__}: an option that decides which states are kept was changed after bind "
                    f"({sorted(plan.rule.states(shape))} → {sorted(rule.states(shape))}); build a new optimizer"
                )
        return rules


def _readings(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: group[key] for key in READING if key in group} for group in groups]
