"""FLOPs are counted; bytes, collectives and FLOPs become seconds."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from distopt.plan.cost import CPU, H100, Link, Rates, load_rates, save_rates
from distopt.plan.flops import flops_of
from distopt.plan.trace import trace
from distopt.rule import Shape
from distopt.rules.muon import Muon
from distopt.rules.shampoo import Shampoo
from distopt.rules.soap import SOAP

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


class Counted(TorchDispatchMode):
    """Adds up what operations cost."""

    def __init__(self) -> None:
        super().__init__()
        self.work: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        kind, flops = flops_of(func, args, kwargs or {}, out) or ("", 0)
        self.work[kind] = self.work.get(kind, 0) + flops
        return out


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, device="meta", dtype=dtype)


N = 300


@pytest.mark.parametrize(
    ("run", "kind", "flops"),
    [
        (lambda: meta(8, 16, dtype=torch.bfloat16) @ meta(16, 4, dtype=torch.bfloat16), "bfloat16", 2 * 8 * 16 * 4),
        (lambda: meta(5, 8, 16) @ meta(5, 16, 4), "float32", 5 * 2 * 8 * 16 * 4),
        (lambda: torch.linalg.eigh(meta(2, N, N)), "eigh", 2 * 9 * N**3),
        (lambda: torch.linalg.qr(meta(N, N)), "qr", 8 / 3 * N**3),
        (lambda: torch.linalg.qr(meta(2 * N, N)), "qr", 4 * N**2 * (2 * N - N / 3)),
        (lambda: torch.linalg.qr(meta(N, 2 * N), mode="r"), "qr", 2 * N**2 * (2 * N - N / 3)),
        (lambda: torch.linalg.qr(meta(2 * N, N), mode="complete"), "qr", (4 * 4 - 4 * 2 + 4 / 3 + 10 / 3) * N**3),
        (lambda: torch.linalg.svd(meta(2 * N, N), full_matrices=False), "svd", (6 * 2 + 20) * N**3),
        (lambda: torch.linalg.svd(meta(N, 2 * N)), "svd", (4 * 4 + 22) * N**3),
        (lambda: torch.linalg.cholesky(meta(3, N, N)), "cholesky", N**3),
        (lambda: torch.linalg.solve(meta(N, N), meta(N, 7)), "solve", 2 / 3 * N**3 + 2 * N**2 * 7),
        (lambda: torch.linalg.solve(meta(N, N), meta(N)), "solve", 2 / 3 * N**3 + 2 * N**2),
        (lambda: torch.linalg.inv(meta(N, N)), "solve", 2 * N**3),
        (lambda: torch.linalg.solve_triangular(meta(N, N), meta(N, 7), upper=False), "solve", 7 * N**2),
        (lambda: torch.cholesky_solve(meta(N, 7), meta(N, N)), "solve", 2 * 7 * N**2),
    ],
)
def test_cubic_operations_are_counted(run: Any, kind: str, flops: float) -> None:
    with torch.no_grad(), Counted() as counted:
        run()
    assert {k: v for k, v in counted.work.items() if v} == {kind: pytest.approx(flops, abs=1)}


def test_owners_pay_for_factorizations_and_each_kind_of_work_is_told_apart() -> None:
    work = dict(trace(Shampoo(), Shape(64, 256), 1, True).work)
    assert work["eigh"] == 9 * (64**3 + 256**3)
    refresh = dict(trace(SOAP(precondition_frequency=10), Shape(64, 256), 11, True).work)
    assert refresh["qr"] == pytest.approx(8 / 3 * (64**3 + 256**3), abs=8)
    assert "qr" not in dict(trace(SOAP(precondition_frequency=10), Shape(64, 256), 2, True).work)
    assert set(dict(trace(Muon(), Shape(64, 256), 2, True).work)) == {"bfloat16"}
    assert set(dict(trace(Muon(), Shape(64, 256), 2, False).work)) == {"float32"}
