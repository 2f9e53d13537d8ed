"""What benchmarks are made of: shapes, and the way from a result to the README."""

import json
import math
from pathlib import Path

import pytest

from benchmarks import optimizers_60s, report
from benchmarks.shapes import gpt2_124m, hidden_matrices, llama3_8b


def test_shapes_add_up_to_the_published_counts() -> None:
    assert sum(map(math.prod, gpt2_124m().values())) == 124_439_808
    assert sum(map(math.prod, llama3_8b().values())) == 8_030_261_248


def test_hidden_matrices_leave_out_embeddings_and_head() -> None:
    assert sum(map(math.prod, hidden_matrices(gpt2_124m()).values())) == 12 * 12 * 768**2
    assert len(hidden_matrices(llama3_8b())) == 32 * 7


def test_a_written_result_fills_its_marked_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    report.write_result(
        "speed",
        {
            "columns": ["what", "ratio"],
            "rows": [["fast", 1.23456], ["slow", 0], ["absent", None]],
            "note": "Higher is better.",
        },
    )
    saved = json.loads((tmp_path / "speed.json").read_text())
    assert saved["environment"]["torch"]
    assert saved["environment"]["threads"] >= 1
    before = "# Title\n<!-- benchmark:speed -->\nold\n<!-- /benchmark:speed -->\nend\n"
    after = report.fill(before, tmp_path)
    table = "| what | ratio |\n| --- | --- |\n| fast | 1.23 |\n| slow | 0 |\n| absent | – |\n"
    assert f"{table}\nHigher is better. Measured with torch" in after
    assert after.startswith("# Title\n<!-- benchmark:speed -->\n")
    assert after.endswith("<!-- /benchmark:speed -->\nend\n")
    assert "old" not in after
    assert report.fill(after, tmp_path) == after


def test_a_marker_without_a_result_and_a_ragged_row_are_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        report.fill("<!-- benchmark:absent -->\n<!-- /benchmark:absent -->\n", tmp_path)
    with pytest.raises(ValueError, match="3 cells for 2 columns"):
        report.write_result("ragged", {"columns": ["a", "b"], "rows": [[1, 2, 3]]})


def test_trials_go_on_until_the_best_rate_lies_between_two_others() -> None:
    losses = {0.0001: 2.5, 0.0003: 2.4, 0.001: 2.6, 0.003: 2.7, 0.01: None}
    runs: list[dict[str, object]] = []
    for name, (lrs, _) in optimizers_60s.TRIALS.items():
        others = [1.0, 0.5, 1.0] if name != "adamw" else [losses[lr] for lr in sorted(lrs)]
        runs += [{"name": name, "lr": lr, "val_loss": loss} for lr, loss in zip(sorted(lrs), others)]
    tried = []
    while (trial := optimizers_60s.wanted(runs)) is not None:
        tried.append(trial)
        runs.append({"name": trial[0], "lr": trial[1], "val_loss": losses[trial[1]]})
    assert tried == [("adamw", 0.0003), ("adamw", 0.0001)]
