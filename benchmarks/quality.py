"""Do Muon, SOAP and Shampoo beat a tuned AdamW after the same tokens, and after the same time? And what does a matrix
rule lose where every rank orthogonalizes its own shard instead of the whole matrix?

    python -m benchmarks.quality [--steps 300] [--runs N]

configs/pretrain_60s.yaml (a byte-level Llama of 0.7M parameters on the Python standard library), one process, one
thread. Every optimizer gets the same learning rates, a factor of about 3 apart, on seed 0; then seeds 1 and 2 at its
best one. A matrix rule hands embeddings, head and norms to AdamW at that same learning rate, so it has as many numbers
tuned as AdamW has. "Shard-local" Muon cuts every weight into 8 blocks of rows, as 8 ranks of FSDP hold them, and
orthogonalizes each by itself. Runs that the result has already are not repeated: --runs does so many more and stops.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.optimizers_60s import train
from benchmarks.report import RESULTS, write_result

NAME = "quality"
LRS = (3e-3, 1e-3, 1e-2, 3e-2, 3e-4)
SEEDS = (0, 1, 2)
RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "AdamW": ("adamw", {}),
    "Muon": ("muon", {}),
    "SOAP": ("soap", {}),
    "Shampoo": ("shampoo", {}),
    "Muon, shard-local": ("muon", {"split": "heads=8"}),
}
"""Title → name and options."""
Runs = dict[str, list[dict[str, Any]]]


def best_lr(runs: list[dict[str, Any]]) -> float | None:
    """The learning rate with the lowest validation loss on seed 0."""
    finite = [run for run in runs if run["seed"] == 0 and run["val_loss"] is not None]
    return float(min(finite, key=lambda run: run["val_loss"])["lr"]) if finite else None


def at(runs: list[dict[str, Any]], lr: float | None) -> list[dict[str, Any]]:
    """The runs of all seeds with one learning rate, by seed."""
    return sorted((run for run in runs if run["lr"] == lr), key=lambda run: run["seed"])


def next_trial(runs: Runs) -> tuple[str, float, int] | None:
    """What is to be run next: title, learning rate, seed; None when there is nothing left."""
    done = {(title, run["lr"], run["seed"]) for title, mine in runs.items() for run in mine}
    wanted = [(title, lr, 0) for lr in LRS for title in RULES]
    wanted += [(title, lr, seed) for seed in SEEDS for title in RULES if (lr := best_lr(runs[title])) is not None]
    return next((trial for trial in wanted if trial not in done), None)


def summarize(runs: Runs, steps: int) -> dict[str, Any]:
    """The result, best optimizer first."""
    found = {title: at(mine, best_lr(mine)) for title, mine in runs.items() if best_lr(mine) is not None}
    means = {title: mean(run["val_loss"] for run in mine) for title, mine in found.items()}
    rows = []
    for title in sorted(means, key=means.__getitem__):
        trials = sorted((run for run in runs[title] if run["seed"] == 0), key=lambda run: run["lr"])
        lr, edges = found[title][0]["lr"], (trials[0]["lr"], trials[-1]["lr"])
        rows.append(
            [
                title,
                f"{means[title]:.3f}",
                f"{means[title] - means['AdamW']:+.3f}",
                ", ".join(f"{run['val_loss']:.3f}" for run in found[title]),
                f"{lr:g}{', at the edge' if lr in edges else ''}",
                ", ".join(f"{run['lr']:g}: {run['val_loss'] or float('nan'):.3f}" for run in trials),
                f"{mean(run['tokens_per_second'] for run in found[title]):,.0f}",
            ]
        )
    columns = [
        "optimizer",
        "validation, nats/byte, mean of seeds",
        "against AdamW",
        "by seed",
        "lr",
        "seed 0 by lr",
        "tokens/s, one thread of a shared machine",
    ]
    note = f"{steps} steps of 1,536 tokens, the same for all; the lr chosen on seed 0 from the same trials for all."
    return {"columns": columns, "rows": rows, "note": note, "steps": steps, "runs": runs}


def plot(runs: Runs, path: Path) -> None:
    """Loss of seed 0's best run against tokens and against time; whole-matrix against shard-local Muon, by lr."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (by_tokens, by_time, by_lr) = plt.subplots(1, 3, figsize=(15, 4.5))
    for title, mine in runs.items():
        chosen = at(mine, best_lr(mine))
        if not chosen:
            continue
        steps, losses = zip(*chosen[0]["losses"], strict=True)
        tokens = [step * 1536 for step in steps]
        by_tokens.plot(tokens, losses, label=f"{title}, lr {chosen[0]['lr']:g}")
        speed = chosen[0]["tokens_per_second"]
        by_time.plot([token / speed for token in tokens], losses, label=f"{title}, {speed:,.0f} tokens/s")
        if title.startswith("Muon"):
            trials = sorted((run for run in mine if run["seed"] == 0 and run["val_loss"]), key=lambda run: run["lr"])
            by_lr.plot([run["lr"] for run in trials], [run["val_loss"] for run in trials], "o-", label=title)
    by_tokens.set(xlabel="tokens", ylabel="training loss, nats/byte", title="after the same tokens", ylim=(None, 4))
    by_time.set(xlabel="seconds, one thread", title="after the same time", ylim=(None, 4))
    by_lr.set(
        xlabel="lr", ylabel="validation loss, nats/byte", xscale="log", title="the whole matrix or each shard's rows"
    )
    for axes in (by_tokens, by_time, by_lr):
        axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Do the runs that are missing, and write what there is after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--runs", type=int, default=10**6, help="at most so many")
    arguments = parser.parse_args()
    path = RESULTS / f"{NAME}.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    runs: Runs = {title: [] for title in RULES} | (known["runs"] if known.get("steps") == arguments.steps else {})
    for _ in range(arguments.runs):
        trial = next_trial(runs)
        if trial is None:
            break
        title, lr, seed = trial
        name, options = RULES[title]
        rest = [] if title == "AdamW" else ["--optimizer.rest", "adamw"]
        run = train(name, lr, options, arguments.steps, ["--seed", str(seed), *rest])
        runs[title].append({**run, "seed": seed})
        print(title, f"{lr:g}", seed, run["val_loss"], run.get("failed", ""), flush=True)
        write_result(NAME, summarize(runs, arguments.steps))
    write_result(NAME, summarize(runs, arguments.steps))
    plot(runs, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
