"""Does AdamW with int8 states and 24-bit weights (bf16 + bits8) learn as AdamW in fp32 does?

    python -m benchmarks.storage_quality [--runs N]

The main job with AdamW (configs/pretrain_tiny_adamw.yaml), all its tokens, one process and one thread, three seeds of
weights and data. Beside fp32 throughout: parameters in bf16 with `master_codec="bits8"`, gradients rounded to bf16,
`state_codec="int8"`; the forward and backward passes read the bf16 weights and compute in fp32, because bf16 products
are a hundred times slower on this CPU. And the same without master bits, as a control that the comparison can fail.
Runs that the result has already are not repeated: --runs does so many more and stops.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from benchmarks.report import RESULTS, write_result

LAUNCH = Path(__file__).parents[1] / "launch"
sys.path.insert(0, str(LAUNCH))
from config import load_config  # noqa: E402
from data import load_corpora  # noqa: E402
from model import build_model, model_config, resolve_mesh  # noqa: E402
from pretrain import Passes, build_schedule  # noqa: E402
from settings import Config  # noqa: E402

import distopt  # noqa: E402

NAME = "storage_quality"
CONFIG = LAUNCH.parent / "configs" / "pretrain_tiny_adamw.yaml"
SEEDS = (0, 1, 2)
STORAGE: dict[str, dict[str, str]] = {
    "fp32": {},
    "bf16 + bits8, states int8": {"state_codec": "int8", "master_codec": "bits8"},
    "bf16, no master bits, states int8": {"state_codec": "int8", "master_codec": "none"},
}


def train(options: dict[str, str], seed: int, steps: int | None) -> dict[str, Any]:
    """One run: losses of validation by step, bytes of weights and states per parameter."""
    arguments = ["--config", str(CONFIG), "--seed", str(seed)]
    config = load_config(Config, arguments + (["--train.steps", str(steps)] if steps else []))
    shape = model_config(config.model, config.data.seq_len)
    training, validation = load_corpora(config.data)
    torch.manual_seed(seed)
    computing = build_model(config.model, shape)
    torch.manual_seed(seed)
    kept = build_model(config.model, shape).bfloat16() if options else computing
    chosen = config.optimizer
    betas = tuple(chosen.options["betas"])
    optimizer = distopt.create_optimizer(
        "adamw",
        kept,
        lr=chosen.lr,
        weight_decay=chosen.weight_decay,
        max_grad_norm=chosen.max_grad_norm,
        betas=betas,
        **options,
    )
    schedule, pairs = build_schedule(config), list(zip(computing.parameters(), kept.parameters(), strict=True))
    base = [group["lr"] for group in optimizer.param_groups]
    passes = Passes(computing, config, resolve_mesh(config.mesh, shape, 1), 0, torch.device("cpu"), shape.vocab_size)
    losses = []

    def read_weights() -> None:
        with torch.no_grad():
            for wide, narrow in pairs:
                wide.copy_(narrow)

    for step in range(config.train.steps):
        for group, lr in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = lr * schedule(step)
        read_weights()
        passes.accumulate_gradients(training, step, config.train.batch_size)
        if options:
            for wide, narrow in pairs:
                assert wide.grad is not None
                narrow.grad, wide.grad = wide.grad.bfloat16(), None
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % config.eval.every == 0 or step + 1 == config.train.steps:
            read_weights()
            losses.append([step + 1, passes.evaluate(validation)])
    numel = sum(p.numel() for p in kept.parameters())
    weights = sum(p.nbytes for p in kept.parameters())
    states = optimizer.plan.summary()["state_bytes"]
    return {"seed": seed, "losses": losses, "val_loss": losses[-1][1], "bytes": (weights + states) / numel}


def summarize(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The result."""
    exact = {run["seed"]: run["val_loss"] for run in runs["fp32"]}
    spread = max(exact.values()) - min(exact.values()) if exact else 0.0
    rows = []
    for title, mine in runs.items():
        differences = [run["val_loss"] - exact[run["seed"]] for run in mine if run["seed"] in exact]
        if mine and differences:
            values = [run["val_loss"] for run in mine]
            rows.append(
                [
                    title,
                    f"{mine[0]['bytes']:.2f}",
                    f"{mean(values):.4f}",
                    f"{stdev(values):.4f}" if len(values) > 1 else "",
                    ", ".join(f"{value:.4f}" for value in values),
                    f"{mean(differences):+.4f}",
                ]
            )
    columns = [
        "storage",
        "weights + states, bytes/param",
        "validation, nats/byte, mean",
        "sd of seeds",
        "by seed",
        "mean difference from fp32",
    ]
    return {
        "columns": columns,
        "rows": rows,
        "note": f"The seeds' own spread in fp32 (largest − smallest): {spread:.4f}.",
        "runs": runs,
    }


def main() -> None:
    """Do the runs that are missing, and write what there is after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=None, help="fewer than the recipe's, to try this script")
    parser.add_argument("--runs", type=int, default=10**6, help="at most so many")
    arguments = parser.parse_args()
    path = RESULTS / f"{NAME}.json"
    runs: dict[str, list[dict[str, Any]]] = {title: [] for title in STORAGE}
    runs |= json.loads(path.read_text())["runs"] if path.exists() else {}
    *compared, control = STORAGE
    wanted = [(title, seed) for seed in SEEDS for title in compared] + [(control, seed) for seed in SEEDS]
    missing = [(title, seed) for title, seed in wanted if seed not in [run["seed"] for run in runs[title]]]
    for title, seed in missing[: arguments.runs]:
        runs[title].append(train(STORAGE[title], seed, arguments.steps))
        print(title, seed, runs[title][-1]["val_loss"], runs[title][-1]["bytes"], flush=True)
        write_result(NAME, summarize(runs))


if __name__ == "__main__":
    main()
