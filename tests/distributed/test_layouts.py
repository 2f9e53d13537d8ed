"""Every update rule on every layout: 20 steps at 2 and 4 ranks against one process, identical full gradients, float32.

The reference runs in the test's own process without a process group; the ranks compare the elements that lie on them.
A cover of all pairs (rule, layout), (variant, ranks), (layout, ranks) runs by default, the rest of the product with
`pytest -m slow`.
"""

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import pytest
import torch

from tests.cases import collect
from tests.distributed import training
from tests.distributed.layouts import LAYOUTS, Full
from tests.distributed.pool import pool
from tests.distributed.training import STEPS, Shapes, gradients, one_process

Row = tuple[str, str, str, int]  # case, variant, layout, ranks


def shapes_of(case: str, layout: str) -> Shapes:
    """The model of a layout, as far as the rule takes it."""
    return collect()[case].accepted(LAYOUTS[layout].shapes)


@cache
def reference(case: str, variant: str, layout: str) -> Full:
    declared = collect()[case]
    return one_process(declared.optimizer, declared.variants[variant], shapes_of(case, layout), declared.observes)[0]


def distances(reports: list[dict[str, tuple[bool, float, float]]]) -> dict[str, float]:
    """Per parameter ‖Δ − Δref‖ / ‖Δref‖ over all ranks; 0 exactly where every rank has equal bits."""
    result = {}
    for name in {name: None for report in reports for name in report}:
        parts = [report[name] for report in reports if name in report]
        error, change = (sum(part[i] for part in parts) for i in (1, 2))
        result[name] = 0.0 if all(part[0] for part in parts) else max((error / change) ** 0.5 if change else 1.0, 1e-30)
    return result


def product() -> list[Row]:
    """Every rule with every variant on every layout at every number of ranks."""
    return [
        (case, variant, layout, world_size)
        for case, declared in collect().items()
        for variant in declared.variants
        for layout in LAYOUTS
        for world_size in LAYOUTS[layout].world_sizes
    ]


def cover(rows: list[Row]) -> list[Row]:
    """Few rows with all pairs."""
    pairs: dict[Row, set[object]] = {
        (case, variant, layout, size): {(case, layout), (case, variant, size), (layout, size)}
        for case, variant, layout, size in rows
    }
    missing = set().union(*pairs.values())
    # Every rule meets every layout: of those rows the most useful one each; then rows for what is still missing.
    meetings: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        meetings.setdefault((row[0], row[2]), []).append(row)
    chosen = []
    for candidates in [*meetings.values(), *([row] for row in rows)]:
        best = max(candidates, key=lambda row: len(missing & pairs[row]))
        if missing & pairs[best]:
            chosen.append(best)
            missing -= pairs[best]
    return chosen


def parametrized(rows: Iterable[Row]) -> Callable[..., Any]:
    arguments = [pytest.param(*row, id="-".join(map(str, row))) for row in rows]
    return pytest.mark.parametrize(("case", "variant", "layout", "world_size"), arguments)


def check(case: str, variant: str, layout: str, world_size: int) -> None:
    declared, shapes = collect()[case], shapes_of(case, layout)
    options, expected = declared.variants[variant], reference(case, variant, layout)
    answers = pool(world_size).run(
        f"{training.__name__}:on_ranks", declared.optimizer, options, layout, shapes, expected, declared.observes
    )
    limit = declared.limit(LAYOUTS[layout].has_repeated_shapes)
    found = distances([report for report, _ in answers])
    assert set(found) == set(shapes)
    assert all(distance <= limit for distance in found.values()), f"limit {limit} ({declared.sharded.why}): {found}"


COVER = cover(product())


@parametrized(COVER)
def test_sharded_equals_one_process(case: str, variant: str, layout: str, world_size: int) -> None:
    check(case, variant, layout, world_size)


@pytest.mark.slow
@parametrized([row for row in product() if row not in COVER])
def test_sharded_equals_one_process_in_the_rest_of_the_product(
    case: str, variant: str, layout: str, world_size: int
) -> None:
    check(case, variant, layout, world_size)


LAYOUTS_AND_RANKS = [(name, size) for name, layout in LAYOUTS.items() for size in layout.world_sizes]


@pytest.mark.parametrize(("layout", "world_size"), LAYOUTS_AND_RANKS)
def test_clipping_uses_the_norm_of_the_whole_model(layout: str, world_size: int) -> None:
    shapes = LAYOUTS[layout].shapes
    options = {"lr": 0.1, "momentum": 0.9, "max_grad_norm": 0.5}
    expected, _ = one_process("SGD", options, shapes)
    answers = pool(world_size).run(f"{training.__name__}:on_ranks", "SGD", options, layout, shapes, expected)
    norms = [
        torch.cat([g.flatten().double() for g in gradients(shapes, step).values() if g is not None]).norm().item()
        for step in range(STEPS)
    ]
    for _, measured in answers:
        assert measured == pytest.approx(norms, rel=1e-6), "each shard once, whatever mesh it lies on"
    found = distances([report for report, _ in answers])
    assert all(distance <= 1e-6 for distance in found.values()), found


@pytest.mark.parametrize(("layout", "world_size"), LAYOUTS_AND_RANKS)
def test_layouts_hold_what_was_laid_out(layout: str, world_size: int) -> None:
    for gathers, _, _ in pool(world_size).run(f"{training.__name__}:placed", layout):
        assert gathers


@pytest.mark.parametrize("layout", [name for name, layout in LAYOUTS.items() if layout.is_sharded])
def test_four_ranks_have_uneven_shards_and_most_layouts_empty_ones(layout: str) -> None:
    divided = {"tp", "fsdp-tp", "experts-fsdp"}  # every dim has more rows than ranks along its axis
    for _, uneven, empty in pool(4).run(f"{training.__name__}:placed", layout):
        assert uneven
        assert empty != (layout in divided)


# Flat ranges become a layout when an optimizer is bound; until then they are only a declaration.
@pytest.mark.parametrize(("layout", "world_size"), [row for row in LAYOUTS_AND_RANKS if not row[0].startswith("flat")])
def test_regions_are_the_elements_that_torch_put_there(layout: str, world_size: int) -> None:
    assert pool(world_size).run(f"{training.__name__}:regions", layout) == [[]] * world_size
