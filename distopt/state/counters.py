"""Committed steps, per parameter as in torch.optim, in one tensor wherever parameters have always stepped together.

A counter per tensor costs more than the update of a small tensor, and parameters whose gradient came late, or not at all in
some steps, are few: so equal counts share a tensor, and parameters of different counts are stepped one count after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


class Counters:
    """The counters of one group. `entries` are the parameters' state dicts, whose "step" is kept here."""

    def __init__(self, entries: list[dict[str, Any]]) -> None:
        self.entries = entries
        self.assign([0] * len(entries))

    def assign(self, ages: Sequence[int]) -> None:
        """Make these the counts, by position."""
        self.ages = list(ages)
        self._shared = {age: torch.tensor(float(age)) for age in set(ages)}
        for entry, age in zip(self.entries, self.ages):
            entry["step"] = self._shared[age]

    def cohorts(self, inert: set[int]) -> list[tuple[int, set[int]]]:
        """(count, positions that rest meanwhile) of the parameters that step now, by ascending count."""
        if len(self._shared) == 1:
            return [(self.ages[0], inert)] if len(inert) < len(self.ages) else []
        everyone = set(range(len(self.ages)))
        found: dict[int, set[int]] = {}
        for position in everyone - inert:
            found.setdefault(self.ages[position], set()).add(position)
        return [(age, everyone - found[age]) for age in sorted(found)]

    def advance(self, inert: set[int]) -> None:
        """One more for every parameter that is not inert."""
        if inert:
            self.assign([age + (position not in inert) for position, age in enumerate(self.ages)])
            return
        self._shift(1)

    def retreat(self, inert: set[int]) -> None:
        """Take back an `advance`."""
        if inert:
            self.assign([age - (position not in inert) for position, age in enumerate(self.ages)])
            return
        self._shift(-1)

    def _shift(self, steps: int) -> None:
        self.ages = [age + steps for age in self.ages]
        self._shared = {age + steps: tensor.add_(steps) for age, tensor in self._shared.items()}
