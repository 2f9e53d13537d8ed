"""Every strategy, forced, on every layout: 20 steps at 2 and 4 ranks against one process; and what the cost model chooses.

Measured bytes are held against planned ones in each of these runs too: a strategy is what it moves.
"""

from functools import cache
from typing import Any

import pytest
import torch

from tests.cases import collect
from tests.distributed import training
from tests.distributed.layouts import LAYOUTS, Full
from tests.distributed.pool import pool
from tests.distributed.test_layouts import distances
from tests.distributed.training import one_process

SHARDED = [(name, size) for name, layout in LAYOUTS.items() if layout.is_sharded for size in layout.world_sizes]
# What one owner computes is what one process computes; Gram matrices are another order of summation.
LIMITS = {"owner": 0.0, "gather": 0.0, "gram": 1e-4, "split": 1e-4}


def shapes_of(layout: str) -> dict[str, tuple[int, ...]]:
    return collect()["muon"].accepted(LAYOUTS[layout].shapes)


@cache
def reference(layout: str, method: str) -> Full:
    return one_process("Muon", {"ns": method}, shapes_of(layout))[0]


@pytest.mark.parametrize("strategy", LIMITS)
@pytest.mark.parametrize(("layout", "world_size"), SHARDED)
def test_forced_strategy_equals_one_process(layout: str, world_size: int, strategy: str) -> None:
    options: dict[str, Any] = {"strategy": strategy}
    expected = reference(layout, "quintic")
    answers = pool(world_size).run(
        f"{training.__name__}:on_ranks", "Muon", options, layout, shapes_of(layout), expected
    )
    limit = max(LIMITS[strategy], 1e-5 if LAYOUTS[layout].has_repeated_shapes else 0.0)
    found = distances([report for report, _ in answers])
    assert set(found) == set(shapes_of(layout))
    assert all(distance <= limit for distance in found.values()), found


@pytest.mark.parametrize("strategy", LIMITS)
@pytest.mark.parametrize(("layout", "world_size"), SHARDED)
def test_bytes_of_a_strategy_are_the_planned_ones(layout: str, world_size: int, strategy: str) -> None:
    answers = pool(world_size).run("tests.distributed.traffic:one_step", "Muon", layout, {"strategy": strategy})
    for counted, reported, planned in answers:
        assert counted == reported == planned


@pytest.mark.parametrize(
    ("rule", "layout", "strategy"),
    [("muon", "fsdp", "owner"), ("muon", "fsdp-tp", "gather"), ("soap", "fsdp", "owner")],
)
def test_matrices_that_travel_in_bf16_move_half_and_all_layouts_agree(rule: str, layout: str, strategy: str) -> None:
    world_size = 4
    case = collect()[rule]
    shapes = case.accepted(LAYOUTS[layout].shapes)
    options = {"strategy": strategy, "wire_dtype": "bf16", "nonfinite": None}
    expected = one_process(case.optimizer, {"wire_dtype": "bf16"}, shapes)[0]
    exact = one_process(case.optimizer, {}, shapes)[0]
    assert any(not torch.equal(expected[name], exact[name]) for name in shapes)
    answers = pool(world_size).run(f"{training.__name__}:on_ranks", case.optimizer, options, layout, shapes, expected)
    limit = 1e-5 if LAYOUTS[layout].has_repeated_shapes else 0.0
    assert all(distance <= limit for distance in distances([report for report, _ in answers]).values())
    narrow, wide = (
        pool(world_size).run(
            "tests.distributed.traffic:one_step", case.optimizer, layout, {**options, "wire_dtype": dtype}
        )
        for dtype in ("bf16", "fp32")
    )
    votes = 8 * len(shapes) + 4
    for (counted, reported, planned), (all_counted, _, _) in zip(narrow, wide):
        assert counted == reported == planned
        assert 2 * (counted["sent"] - votes) == all_counted["sent"] - votes
