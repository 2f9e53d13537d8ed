"""Strategies without ranks: slices and what they are summed from, the choice on shapes of Llama 3 8B, refusals."""

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import distopt
from benchmarks.shapes import hidden_matrices, llama3_8b
from distopt.layouts import Flat, Layout, Sharded
from distopt.layouts.dtensor import Axis
from distopt.matrix.newton_schulz import Method, Orthogonalize, orthogonalize
from distopt.matrix.triangle import pack, packed_rows, unpack
from distopt.plan.buckets import Group, GroupPlan, Spec
from distopt.plan.build import plan_group
from distopt.plan.cost import CPU, H100, Link, Rates
from distopt.plan.geometry import geometry_of, logical_of
from distopt.plan.report import PlanReport, exchanged_bytes
from distopt.plan.strategies import Home, Payload, equal_slices, held, slices_where_it_lies
from distopt.rules.muon import Muon


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 8, 33])
def test_half_of_a_symmetric_matrix_is_all_of_it(n: int) -> None:
    matrix = torch.randn(3, n, n)
    matrix = matrix + matrix.mT
    packed = pack(matrix)
    assert packed.shape == (3, packed_rows(n), n)
    assert packed[0].numel() <= n * (n + 1) / 2 + n / 2
    assert torch.equal(unpack(packed), matrix)


def sliced(transform: Orthogonalize, x: Tensor, cuts: list[int]) -> Tensor:
    """A wide matrix by slices, the sums made here."""
    runs = [transform.by_slices(part[None]) for part in x.tensor_split(cuts, dim=1)]
    partials = [next(run) for run in runs]
    found: list[Tensor] = []
    while not found:
        total = torch.stack(partials).sum(0)
        partials = []
        for run in runs:
            try:
                partials.append(run.send(total))
            except StopIteration as end:
                found.append(end.value[0])
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("method", ["quintic", "polar_express", "gram"])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_slices_give_what_the_whole_gives(method: str, scale: float) -> None:
    x = scale * torch.randn(24, 70, generator=torch.Generator().manual_seed(0))
    expected = orthogonalize(x, method=method)  # type: ignore[arg-type]
    found = sliced(Orthogonalize(method), x, [1, 40])  # type: ignore[arg-type]
    assert expected.norm() > 0
    assert (found - expected).norm() <= 1e-4 * expected.norm()


def test_slices_in_bfloat16_are_as_close_as_the_whole_is() -> None:
    x = torch.randn(24, 70, generator=torch.Generator().manual_seed(0))
    exact = orthogonalize(x)
    whole = orthogonalize(x, dtype=torch.bfloat16).float()
    found = sliced(Orthogonalize(dtype=torch.bfloat16), x.bfloat16(), [30]).float()
    assert (found - exact).norm() <= 2 * (whole - exact).norm()


def test_a_zero_slice_and_a_zero_matrix_stay_finite() -> None:
    x = torch.zeros(4, 9)
    assert torch.equal(sliced(Orthogonalize(), x, [5]), x)
    x[:, :5] = torch.randn(4, 5)
    assert torch.allclose(sliced(Orthogonalize(), x, [5]), orthogonalize(x), atol=1e-5)


FSDP = (Axis(4, 0),)
LAYOUTS: dict[str, Callable[[tuple[int, ...]], Layout]] = {
    "rows": lambda shape: Sharded(shape, (0, 1, 2, 3), FSDP),
    "columns": lambda shape: Sharded(shape, (0, 1, 2, 3), (Axis(4, 1),)),
    "strided": lambda shape: Sharded(shape, (0, 1, 2, 3), (Axis(2, 0, strided=True), Axis(2, 0))),
    "both": lambda shape: Sharded(shape, (0, 1, 2, 3), (Axis(2, 0), Axis(2, 1))),
    "flat": lambda shape: Flat(shape, (0, 1, 2, 3), (0, 11, 11, 90), (11, 11, 90, shape[0] * shape[1])),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(37, 16), (18, 130), (24, 24), (3, 20), (50, 1), (1, 40)])
def test_slices_cover_the_long_side_once(layout: str, shape: tuple[int, int]) -> None:
    placed = LAYOUTS[layout](shape) if shape[0] * shape[1] > 90 else LAYOUTS["rows"](shape)
    geometry = geometry_of(placed, logical_of(shape, Muon()))
    for homes in (slices_where_it_lies(geometry, 0), equal_slices(geometry, 0, [0, 2, 3])):
        assert [home.start for home in homes] == [0, *(home.stop for home in homes[:-1])]
        assert homes[-1].stop == max(shape)
        assert len({home.rank for home in homes}) == len(homes)
        there = held(geometry, 0, tuple((home.start, home.stop) for home in homes))
        assert there.sum() == shape[0] * shape[1]


@pytest.mark.parametrize(("layout", "shape"), [("rows", (37, 16)), ("strided", (37, 16)), ("columns", (18, 130))])
def test_a_matrix_cut_along_its_long_side_stays_where_it_lies(layout: str, shape: tuple[int, int]) -> None:
    plan = plan_group(Group(Muon(), (Spec("w", LAYOUTS[layout](shape), 0),), strategy="gram"), 0)
    (bucket,) = plan.buckets
    assert bucket.strategy == "gram" and not bucket.travels
    other = plan_group(Group(Muon(), (Spec("w", LAYOUTS["both"](shape), 0),), strategy="gram"), 0)
    assert other.buckets[0].travels


def test_parts_of_sums_are_what_is_sent() -> None:
    assert [Payload(5000, torch.float32).moved(3, i) for i in range(3)] == [
        3334 + 2 * 1666,
        3333 + 2 * 1667,
        3333 + 2 * 1667,
    ]
    assert Payload(5000, torch.float32).moved(2, 0) == 5000, "two homes need one way only"
    assert Payload(1, torch.float64).moved(4, 0) == 3


@cache
def llama(ranks: int, strategy: str = "auto") -> tuple[GroupPlan, int]:
    """Muon's plan on FSDP2 shards of the hidden matrices, and their elements."""
    shapes = hidden_matrices(llama3_8b())
    specs = [Spec(name, Sharded(shape, tuple(range(ranks)), (Axis(ranks, 0),)), 0) for name, shape in shapes.items()]
    elements = sum(rows * cols for rows, cols in shapes.values())
    return plan_group(Group(Muon(), tuple(specs), gpu=True, strategy=strategy), 0), elements  # type: ignore[arg-type]


@pytest.mark.parametrize(("ranks", "compute", "numbytes"), [(64, 1.06, 1.10), (128, 1.06, 1.10), (256, 1.25, 1.35)])
def test_llama_is_balanced_in_compute_and_bytes(ranks: int, compute: float, numbytes: float) -> None:
    plan, elements = llama(ranks)
    (loads,), (moved,) = plan.loads.values(), exchanged_bytes(plan).values()
    assert loads.max() / loads.mean() <= compute
    mean = 2 * 2 * elements * (ranks - 1) / ranks**2  # bfloat16
    assert moved.max() / mean <= numbytes


def test_splitting_halves_the_time_of_the_slowest_rank_where_ranks_are_more_than_matrices() -> None:
    owned, split = (llama(256, strategy)[0] for strategy in ("owner", "auto"))
    assert {bucket.strategy for bucket in split.buckets} == {"owner", "split"}
    (before,), (after,) = owned.loads.values(), split.loads.values()
    assert after.max() <= 0.55 * before.max()
    assert after.sum() <= 1.1 * before.sum()


def strategies(
    rates: Rates, shape: tuple[int, int], count: int, axes: tuple[Axis, ...], method: Method = "quintic"
) -> set[str]:
    ranks = tuple(range(int(np.prod([axis.size for axis in axes]))))
    specs = tuple(Spec(str(i), Sharded(shape, ranks, axes), 0) for i in range(count))
    return {bucket.strategy for bucket in plan_group(Group(Muon(ns=method), specs, gpu=True, rates=rates), 0).buckets}


def test_gram_is_chosen_for_long_matrices_over_few_ranks_and_owners_elsewhere() -> None:
    two, many = (Axis(2, 0),), (Axis(64, 0),)
    assert strategies(H100, (32768, 1024), 64, two) == {"gram"}
    assert strategies(H100, (32768, 1024), 64, two, "gram") == {"gram"}, "less travels, though the FLOPs are no fewer"
    assert strategies(H100, (1024, 32768), 64, two, "gram") == {"owner"}, "as much travels: it is cut the other way"
    assert strategies(H100, (4096, 4096), 64, two) == {"owner"}
    assert strategies(H100, (32768, 1024), 640, many) == {"owner"}, "each rank would iterate on every Gram matrix"


def test_tiny_matrices_are_gathered_where_a_collective_costs_more_than_they_do() -> None:
    slow = Rates("slow to begin", H100.flops, H100.memory_bandwidth, (Link("far", 8, 1e9, 1.0),))
    assert strategies(slow, (64, 64), 4, (Axis(2, 0),)) == {"gather"}
    assert strategies(CPU, (512, 512), 64, (Axis(4, 0),)) == {"owner"}


def test_explain_and_summary_name_the_strategies() -> None:
    plan, _ = llama(256)
    report = PlanReport([plan], ["hidden"], 0)
    assert report.summary()["groups"][0]["strategies"] == {"owner": 128, "split": 96}
    assert "Gram matrices summed over up to 2 of 256 ranks" in report.explain()
    assert "owner through all-to-all over 256 ranks" in report.explain()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda w: distopt.Muon([w], strategy="grams"), "strategy: one of auto"),
        (lambda w: distopt.SOAP([w], strategy="gram"), "SOAP needs whole matrices"),
        (lambda w: distopt.NorMuon([w], strategy="gather"), "keeps states with the one rank"),
        (lambda w: distopt.AdamW([w], strategy="owner"), "AdamW works where parameters lie"),
    ],
)
def test_a_strategy_that_a_rule_cannot_have_is_refused_at_construction(make: Callable, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make(nn.Parameter(torch.randn(4, 4)))


def test_groups_of_other_rules_do_not_inherit_a_strategy() -> None:
    matrix, vector = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))
    built = distopt.Muon([{"params": [matrix]}, {"params": [vector], "rule": "adamw"}], strategy="gram")
    assert [group["strategy"] for group in built.param_groups] == ["gram", "auto"]


def test_a_home_is_a_slice_of_the_long_side() -> None:
    tall = logical_of((10, 4), Muon()).shape
    layout = Sharded((10, 4), (0, 1), (Axis(2, 0),))
    (rect,) = layout.rects(0, 1)
    assert Home(1, 3, 8).cut(tall, rect) == (3, 5, 0, 4)
    assert Home(1, 6, 8).cut(tall, rect) is None
