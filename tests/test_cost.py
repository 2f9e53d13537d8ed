"""Bytes, collectives and FLOPs become seconds."""

import dataclasses
import json
from pathlib import Path

import pytest

from distopt.plan.cost import CPU, H100, Link, Rates, load_rates, save_rates

TWO = Rates(
    "two levels",
    {"float32": 1e9, "bfloat16": 4e9, "eigh": 1e6},
    1e10,
    (Link("tp", 4, 1e9, 1e-3), Link("dp", 16, 1e8, 1e-2)),
)


def test_a_group_of_ranks_runs_on_the_narrowest_link_that_joins_them() -> None:
    assert TWO.link([4, 5, 7]).name == "tp"
    assert TWO.link([3, 4]).name == "dp"
    assert TWO.link([0, 4, 8]).name == "dp"
    assert TWO.link([0, 1000]).name == "dp"


def test_seconds_are_latencies_and_bytes_over_bandwidth() -> None:
    assert TWO.link([0, 1]).seconds(2e9, messages=3) == pytest.approx(2.003)
    assert TWO.link([0, 8]).seconds(0) == pytest.approx(1e-2)
    assert TWO.memory_seconds(5e9) == pytest.approx(0.5)
    assert TWO.all_reduce_seconds(range(4), 1e9) == pytest.approx(1e-3 + 1.5)
    assert TWO.all_reduce_seconds([3], 1e9) == 0


def test_work_of_each_kind_has_its_rate_and_fp32s_where_there_is_none() -> None:
    assert TWO.compute_seconds({"bfloat16": 4e9, "eigh": 2e6}) == pytest.approx(3)
    assert TWO.compute_seconds({"qr": 3e9}) == pytest.approx(3)
    assert TWO.compute_seconds({}) == 0


@pytest.mark.parametrize("rates", [H100, CPU, TWO])
def test_rates_are_the_same_after_a_file(rates: Rates, tmp_path: Path) -> None:
    save_rates(rates, tmp_path / "rates.json")
    assert load_rates(str(tmp_path / "rates.json")) == rates


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"flops": {"float32": 1e9, "bfloat16": 1e9, "float8": 1}}, "float8"),
        ({"flops": {"float32": 1e9}}, "bfloat16"),
        ({"flops": {"float32": 0, "bfloat16": 1e9}}, "float32 must be"),
        ({"memory_bandwidth": float("nan")}, "memory_bandwidth"),
        ({"links": ()}, "spans"),
        ({"links": TWO.links[::-1]}, "spans"),
        ({"links": (Link("dp", 4, -1, 0),)}, "bandwidth of link 'dp'"),
    ],
)
def test_rates_out_of_range_are_refused_by_name(change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(TWO, **change)


def test_a_file_that_is_no_rates_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no preset"):
        load_rates(str(tmp_path / "absent.json"))
    path = tmp_path / "rates.json"
    for content in (
        "{",
        "{}",
        json.dumps({**dataclasses.asdict(TWO), "speed": 1}),
        json.dumps({**dataclasses.asdict(TWO), "links": [{}]}),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"rates\.json"):
            load_rates(str(path))
