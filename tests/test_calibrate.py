"""Rates are measured, on one process and on ranks, and the plan reads them."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import distopt
from distopt.cli import main
from distopt.cli.calibrate import measure
from distopt.plan.cost import CPU, WORK, Link, load_rates, save_rates
from distopt.plan.paper import Mesh
from tests.distributed.layouts import LAYOUTS, lay_out
from tests.distributed.pool import pool


def test_one_process_measures_computation_and_a_plan_reads_it(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "rates.json"
    main(["calibrate", "--device", "cpu", "--size", "128", "--mib", "1", "--out", str(out)])
    rates = load_rates(str(out))
    assert set(rates.flops) == set(WORK) - {"float16", "float64"}
    assert rates.links == CPU.links
    assert "run under torchrun" in capsys.readouterr().out
    (tmp_path / "model.json").write_text(json.dumps({"layers.0.up.weight": [64, 32]}))
    main(
        ["plan", "--model", str(tmp_path / "model.json"), "--mesh", "dp=2", "--optimizer", "muon", "--rates", str(out)]
    )
    assert rates.name in capsys.readouterr().out


def test_rates_are_those_of_this_machine() -> None:
    rates = measure(Mesh(), torch.device("cpu"), 512, 1 << 20)
    # Slower than a second for 0.3 GFLOP, or faster than any core: the units would be wrong.
    assert 3e8 < rates.flops["float32"] < 1e13
    assert 1e8 < rates.memory_bandwidth < 1e12


def on_ranks() -> dict[str, Any]:
    """What one rank measures."""
    return asdict(measure(Mesh(dp=2, tp=2), torch.device("cpu"), 64, 1 << 20))


def test_links_are_measured_per_axis_and_agreed_upon() -> None:
    found = pool(4).run(f"{__name__}:on_ranks")
    assert all(rates == found[0] for rates in found)
    assert [(link["name"], link["span"]) for link in found[0]["links"]] == [("tp", 2), ("dp", 4)]
    assert all(0 < link["latency"] < 1 and 1e5 < link["bandwidth"] < 1e12 for link in found[0]["links"])


def strategies(rates: str | None) -> dict[str, int]:
    """How a tall matrix that is cut into rows is computed."""
    laid = lay_out(LAYOUTS["fsdp"], {"tall": torch.ones(512, 16)})
    groups: list[dict[str, int]] = distopt.Muon(laid.named(), rates=rates).plan.summary()["groups"]
    return groups[0]["strategies"]  # type: ignore[return-value]


def test_a_run_chooses_strategies_by_the_rates_that_it_is_given(tmp_path: Path) -> None:
    slow = replace(CPU, links=(Link("slow", 2, 1e3, 1e-6),))
    save_rates(slow, tmp_path / "rates.json")
    assert pool(2).run(f"{__name__}:strategies", None) == [{"gather": 1}] * 2
    assert pool(2).run(f"{__name__}:strategies", str(tmp_path / "rates.json")) == [{"gram": 1}] * 2


def test_rates_that_are_not_there_are_refused_at_construction() -> None:
    with pytest.raises(ValueError, match=r"rates 'absent\.json': no such file"):
        distopt.Muon([torch.nn.Parameter(torch.ones(4, 4))], rates="absent.json")


def test_torchrun_writes_one_file(tmp_path: Path) -> None:
    out = tmp_path / "rates.json"
    words = ["--nproc-per-node", "2", "-m", "distopt", "calibrate", "--device", "cpu", "--size", "32", "--mib", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", *words, "--out", str(out)],
        capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written to") == 1
    assert [link.name for link in load_rates(str(out)).links] == ["dp"]


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--mesh", "dp=2"], "start it with torchrun"), (["--speed"], "unknown"), (["--size", "0"], "--size must be")],
)
def test_wrong_arguments_end_with_a_message(words: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["calibrate", "--device", "cpu", "--out", str(tmp_path / "rates.json"), *words])
    assert said in str(ended.value)
    assert not list(tmp_path.iterdir())
