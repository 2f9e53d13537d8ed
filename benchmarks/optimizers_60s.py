"""Which optimizers learn at all in a minute, and which learns most after the same tokens, each with its own lr?

    python -m benchmarks.optimizers_60s [--steps 150] [--runs N]

The main job on configs/pretrain_60s.yaml (a byte-level Llama of 0.7M parameters on the Python standard library), one
process, one thread. Every optimizer gets three learning rates, a factor of about 3 apart around what its authors take
for small models, and then more of them (1, 3, 10, 30, …) until its best one lies between two others; nothing else is
tuned. All warm up for 20 steps and decay by a cosine, except Schedule-Free. A matrix rule has AdamW at lr 3e-3 for
embeddings, head and norms, so it has two lrs where others have one. Runs that are in the result already are not
repeated: --runs does so many more and stops. One seed; seeds differ by about .01.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import RESULTS, write_result

ROOT = Path(__file__).parents[1]
NAME = "optimizers_60s"
LOW_RANK = {"rank": 32, "update_proj_gap": 50}
TRIALS: dict[str, tuple[tuple[float, ...], dict[str, Any]]] = {
    "adamw": ((3e-3, 1e-3, 1e-2), {}),
    "sophia_g": ((1e-3, 3e-4, 3e-3), {"bs": 12 * 128}),
    "galore": ((1e-2, 3e-3, 3e-2), LOW_RANK),
    "apollo": ((1e-2, 3e-3, 3e-2), LOW_RANK),
    "came": ((1e-3, 3e-4, 3e-3), {}),
    "schedule_free_adamw": ((1e-2, 3e-3, 3e-2), {}),
    "prodigy": ((1.0, 0.3, 3.0), {}),
    "lion": ((3e-4, 1e-4, 1e-3), {}),
    "ademamix": ((1e-3, 3e-4, 3e-3), {}),
    "mars": ((3e-3, 1e-3, 1e-2), {}),
    "adam_mini": ((1e-3, 3e-4, 3e-3), {}),
    "muon": ((1e-2, 3e-3, 3e-2), {}),
    "soap": ((3e-3, 1e-3, 1e-2), {}),
}
"""Name → learning rates to begin with, the middle one first, and options."""
MATRIX = {"galore", "apollo", "muon", "soap"}
CONSTANT = {"schedule_free_adamw"}


def train(name: str, lr: float, options: dict[str, Any], steps: int, extra: Sequence[str] = ()) -> dict[str, Any]:
    """One run, with `extra` arguments: its losses, what it keeps, and how long it took; or how it failed."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            str(ROOT / "launch" / "pretrain.py"),
            "--config",
            f"{ROOT}/configs/pretrain_60s.yaml",
        ]
        command += ["--optimizer.name", name, "--optimizer.lr", str(lr), "--train.steps", str(steps)]
        command += ["--logging.dir", "run"]
        for key, value in options.items():
            command += [f"--optimizer.options.{key}", str(value)]
        if name in MATRIX:
            command += ["--optimizer.rest", "adamw", "--optimizer.rest_options.lr", "3e-3"]
        if name in CONSTANT:
            command += ["--schedule.kind", "constant"]
        command += extra
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        run: dict[str, Any] = {"name": name, "lr": lr, "options": options, "steps": steps}
        if done.returncode:
            return {**run, "val_loss": None, "failed": done.stderr.strip().splitlines()[-1]}
        lines = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    kept = re.search(r"^state +([\d.]+) bytes", done.stdout, re.MULTILINE)
    assert kept, done.stdout
    return {
        **run,
        "val_loss": next(line["val_loss"] for line in lines if "val_loss" in line),
        "losses": [[line["step"], line["loss"]] for line in lines if "loss" in line],
        "state_bytes_per_parameter": float(kept[1]),
        "tokens_per_second": max(line["tokens_per_second"] for line in lines if "loss" in line),
    }


def best(runs: list[dict[str, Any]], name: str) -> dict[str, Any] | None:
    """The run of an optimizer with the lowest validation loss."""
    finite = [run for run in runs if run["name"] == name and run["val_loss"] is not None]
    return min(finite, key=lambda run: run["val_loss"]) if finite else None


def wanted(runs: list[dict[str, Any]]) -> tuple[str, float] | None:
    """The next run: of the lrs to begin with, middle ones first; then one beyond the edge where the best one lies."""
    done = {(run["name"], run["lr"]) for run in runs}
    for i in range(3):
        for name, (lrs, _) in TRIALS.items():
            if (name, lrs[i]) not in done:
                return name, lrs[i]
    for name in TRIALS:
        tried = sorted(lr for other, lr in done if other == name)
        found = best(runs, name)
        if found is None or found["lr"] == tried[0]:
            return name, neighbour(tried[0], -1)
        if found["lr"] == tried[-1]:
            return name, neighbour(tried[-1], 1)
    return None


def neighbour(lr: float, direction: int) -> float:
    """The next one up or down of …, .1, .3, 1, 3, 10, …"""
    place = round(2 * math.log10(lr)) + direction
    return float(f"{(1, 3)[place % 2]}e{place // 2}")


def summarize(runs: list[dict[str, Any]], steps: int) -> dict[str, Any]:
    """The result, best optimizer first."""
    rows: list[list[Any]] = []
    for name in TRIALS:
        mine = sorted((run for run in runs if run["name"] == name), key=lambda run: run["lr"])
        found = best(runs, name)
        if not mine:
            continue
        tried = ", ".join(f"{run['lr']:g}: {_loss(run)}" for run in mine)
        falls = f"{found['losses'][0][1]:.2f} → {found['losses'][-1][1]:.2f}" if found else "failed"
        edges = {mine[0]["lr"]: ", the lowest tried", mine[-1]["lr"]: ", the highest tried"}
        lr = found and f"{found['lr']:g}{edges.get(found['lr'], '')}"
        row = [name, found and f"{found['val_loss']:.3f}", lr, tried, falls]
        rows.append([*row, found and found["state_bytes_per_parameter"]])
    rows.sort(key=lambda row: row[1] or "9")
    columns = [
        "optimizer",
        "validation, nats/byte",
        "best lr",
        "validation by lr",
        "training loss",
        "state, bytes/param",
    ]
    note = (
        f"{steps} steps of 1,536 tokens, the same for all, one seed (seeds differ by about .01). A best lr at the edge of "
        "what was tried is not tuned."
    )
    return {"columns": columns, "rows": rows, "note": note, "steps": steps, "runs": runs}


def _loss(run: dict[str, Any]) -> str:
    return "failed" if run["val_loss"] is None else f"{run['val_loss']:.3f}"


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """The training loss of every optimizer's best run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    chosen = [run for name in TRIALS if (run := best(runs, name))]
    for run in sorted(chosen, key=lambda run: run["val_loss"]):
        label = f"{run['name']}, lr {run['lr']:g}: {run['val_loss']:.3f}"
        axes.plot(*zip(*run["losses"], strict=True), label=label)
    axes.set(
        xlabel="step", ylabel="training loss, nats/byte", title="best of the learning rates tried: validation loss"
    )
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Do the runs that are missing, and write what there is after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--runs", type=int, default=10**6, help="at most so many")
    arguments = parser.parse_args()
    path = RESULTS / f"{NAME}.json"
    known = json.loads(path.read_text()) if path.exists() else {"steps": arguments.steps, "runs": []}
    runs = known["runs"] if known["steps"] == arguments.steps else []
    for _ in range(arguments.runs):
        trial = wanted(runs)
        if trial is None:
            break
        name, lr = trial
        runs.append(train(name, lr, TRIALS[name][1], arguments.steps))
        print(name, f"{lr:g}", _loss(runs[-1]), runs[-1].get("failed", ""), flush=True)
        write_result(NAME, summarize(runs, arguments.steps))
    write_result(NAME, summarize(runs, arguments.steps))
    plot(runs, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
