"""What a rule observes beside gradients, brought to its states: a curvature that is estimated every few steps, the
largest attention logit of each head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from distopt.bound import Bound
from distopt.names import strip_prefixes
from distopt.verdict import reach_verdict, square_sum


def observe(
    bound: Bound,
    groups: list[dict[str, Any]],
    engine: dict[str, Any],
    name: str,
    values: Mapping[str | Tensor, Tensor] | None,
) -> bool:
    """Verdict, then states; see Optimizer.observe."""
    kinds = {name: kind for plan in bound.plans for name, kind in plan.rule.observes.items()}
    if name not in kinds:
        raise ValueError(f"no rule here observes {name!r}; what can be observed: {sorted(kinds) or 'nothing'}")
    like = kinds[name] == "like"
    takes = [name in plan.rule.observes for plan in bound.plans for _ in plan.specs]
    found: list[Tensor | None] = [p.grad if like and take else None for p, take in zip(bound.params, takes)]
    squares: list[tuple[float, float]] = []
    error: ValueError | None = None
    try:
        rules = bound.settings.rules(groups, bound.plans)
        if like and values is not None:
            raise ValueError(f"{name!r} is read from .grad, where a backward pass has left it; give no values")
        if like:
            for group, span in zip(bound.groups, bound.spans):
                if takes[span.start]:
                    group.collect(found[span])
                    squares += group.squares()
        else:
            found = _rows(bound, name, takes, values or {})
            squares = [(square_sum(value), 1) for value in found if value is not None]
    except ValueError as refused:
        error, found = refused, [None] * len(takes)
    present = [value is not None for value in found]
    union = bound.union
    verdict = reach_verdict(squares, present, bound.holds, union, union, bound.device, error=error)
    if verdict.partial and engine["missing_grad"] == "raise":
        missing = ", ".join(repr(bound.names[i]) for i in sorted(verdict.partial)[:5])
        raise ValueError(f"the observation of {name!r} for {missing} is missing on some ranks")
    if len(verdict.inert) == len(takes):
        raise ValueError(f"there is nothing to observe for {name!r}: no gradient, or no value, on any rank")
    if not verdict.finite:
        if engine["nonfinite"] != "skip":
            raise ValueError(
                f"the observation of {name!r} is not finite; nothing was changed. Or pass nonfinite='skip'"
            )
        return False
    rows = None if like else _largest(bound, takes, found)
    for group, rule, counters, span in zip(bound.groups, rules, bound.counters, bound.spans):
        if not takes[span.start]:
            continue
        if like and engine["maximize"]:
            group.negate()
        inert = {i - span.start for i in verdict.inert if span.start <= i < span.stop}
        for age, others in counters.cohorts(inert):
            group.observe(rule, name, age + 1, None if rows is None else rows[span], others)
    return True


def _rows(bound: Bound, name: str, takes: list[bool], values: Mapping[str | Tensor, Tensor]) -> list[Tensor | None]:
    """One number per row of every parameter that a value was given for.

    Raises:
        ValueError: a value for nobody, or one whose length does not divide the rows.
    """
    places: dict[str | Tensor, int] = {key: i for i, key in enumerate(bound.names)}
    places.update({param: i for i, param in enumerate(bound.params)})
    counts = _row_counts(bound)
    found: list[Tensor | None] = [None] * len(takes)
    for key, value in values.items():
        place = places.get(strip_prefixes(key) if isinstance(key, str) else key)
        if place is None or not takes[place]:
            raise ValueError(f"{name!r} was given for {key!r}, which is no parameter whose rule observes it")
        rows = counts[place]
        if value.ndim != 1 or len(value) == 0 or rows % len(value):
            raise ValueError(
                f"{bound.names[place]!r} has {rows} rows, {name!r} for it has shape {tuple(value.shape)}: give one number "
                "for each of equal blocks of rows, of the whole parameter on every rank"
            )
        found[place] = value.detach().to(bound.device, torch.float32).repeat_interleave(rows // len(value))
    return found


def _row_counts(bound: Bound) -> list[int]:
    return [plan.logical(number).starts("row")[-1] for plan in bound.plans for number in range(len(plan.specs))]


def _largest(bound: Bound, takes: list[bool], found: list[Tensor | None]) -> list[Tensor]:
    """Row by row the largest number that any rank gave: each has seen its part of the batch."""
    counts = [count if take else 0 for count, take in zip(_row_counts(bound), takes)]
    flat = torch.full((sum(counts),), -torch.inf, device=bound.device)
    views = list(flat.split(counts))
    for view, value in zip(views, found):
        if value is not None:
            view.copy_(value)
    work = bound.union.all_reduce(flat, "max")
    if work is not None:
        work.wait()
    return views
