"""Plans on paper for people: tables, JSON, a plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from distopt.plan.cost import Rates
from distopt.plan.paper import Loads

PER_RANK = ("flops", "sent", "received", "state", "temporary", "compute", "memory", "wire")


@dataclass
class OnPaper:
    """One optimizer on one mesh: (group, strategy, loads) rows, and the seconds of its verdict's all-reduces."""

    optimizer: str
    ranks: int
    rows: list[tuple[str, str, Loads]] = field(default_factory=list)
    verdict: float = 0.0

    def add_verdict(self, parameters: int, rates: Rates) -> None:
        """The two small all-reduces of a step: who has which gradient, and the norm."""
        if self.ranks > 1:
            self.verdict = rates.all_reduce_seconds(range(self.ranks), 8 * parameters + 20, messages=2)

    @property
    def total(self) -> Loads:
        """All rows together."""
        return sum((loads for _, _, loads in self.rows), Loads())

    @property
    def steps(self) -> np.ndarray:
        """Expected time of each step of a cycle: that of the slowest rank, nothing overlapped."""
        return self.total.seconds.max(1) + self.verdict

    @property
    def seconds(self) -> float:
        """Expected time of the average step."""
        return float(self.steps.mean())

    @property
    def imbalance(self) -> float | None:
        """FLOPs of the busiest rank over the mean; None without any."""
        flops = np.broadcast_to(self.total.flops, self.ranks)
        return float(flops.max() / flops.mean()) if flops.any() else None

    def record(self) -> dict[str, Any]:
        """Everything as JSON values."""
        total = self.total
        return {
            "optimizer": self.optimizer,
            "seconds": self.seconds,
            "worst_step_seconds": float(self.steps.max()),
            "worst_over_median_step": float(self.steps.max() / np.median(self.steps)),
            "flops_imbalance": self.imbalance,
            "busiest_bytes": float(np.maximum(total.sent, total.received).max()),
            "rows": [
                {"group": group, "strategy": strategy, "matrices": loads.matrices, "elements": loads.elements}
                | {name: _spread(per_rank(loads, name)) for name in PER_RANK}
                for group, strategy, loads in self.rows
            ],
            "total": {name: _spread(per_rank(total, name)) for name in PER_RANK},
            "per_rank": {name: np.broadcast_to(per_rank(total, name), self.ranks).tolist() for name in PER_RANK},
        }


def table(plan: OnPaper, baseline: OnPaper) -> str:
    """One optimizer: a row per group and strategy."""
    columns = [
        "group", "strategy", "matrices", "elements", "TFLOP mean", "max/mean", "sent max", "received max",
        "state min", "mean", "max", "temp max", "compute ms", "memory ms", "wire ms",
    ]  # fmt: skip
    rows = [[group, strategy, *_cells(loads)] for group, strategy, loads in plan.rows]
    rows.append(["all", "", *_cells(plan.total)])
    ratio = plan.seconds / baseline.seconds
    lines = [
        f"{plan.optimizer}, per rank and step:",
        _aligned([columns, *rows]),
        f"expected step: {1e3 * plan.seconds:.3g} ms, nothing overlapped ({ratio:.2f} × AdamW's {1e3 * baseline.seconds:.3g} ms)",
    ]
    if len(plan.steps) > 1:
        lines.append(
            f"over a cycle of {len(plan.steps)} steps: median {1e3 * np.median(plan.steps):.3g} ms, worst "
            f"{1e3 * plan.steps.max():.3g} ms ({plan.steps.max() / np.median(plan.steps):.2f} × median)"
        )
    return "\n".join(lines)


def comparison(plans: Sequence[OnPaper], baseline: OnPaper) -> str:
    """Several optimizers: a row each."""
    columns = [
        "optimizer", "TFLOP mean", "max/mean", "busiest bytes", "state mean", "state max", "temp max", "step ms",
        "worst step ms", "× AdamW",
    ]  # fmt: skip
    rows = []
    for plan in plans:
        total = plan.total
        rows.append([
            plan.optimizer, f"{total.flops.mean() / 1e12:.3g}", _ratio(plan.imbalance),
            size(np.maximum(total.sent, total.received).max()), size(total.state.mean()), size(total.state.max()),
            size(total.temporary.max()), f"{1e3 * plan.seconds:.3g}", f"{1e3 * plan.steps.max():.3g}",
            f"{plan.seconds / baseline.seconds:.2f}",
        ])  # fmt: skip
    return _aligned([columns, *rows])


def draw(plans: Sequence[OnPaper], path: Path, title: str) -> None:
    """Write a PNG of what each rank computes, moves, keeps and waits for.

    Raises:
        ImportError: matplotlib is not there.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("a plot needs matplotlib (pip install 'distopt[launch]')") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(4, 1, figsize=(13, 11), sharex=True, constrained_layout=True)
    for plan in plans:
        total = plan.total
        for axis, values in zip(
            axes,
            (
                total.flops / 1e12, np.maximum(total.sent, total.received) / 2**20, total.state / 2**30,
                1e3 * total.seconds.mean(0),
            ),
        ):  # fmt: skip
            values = np.broadcast_to(values, plan.ranks)
            label = f"{plan.optimizer}: mean {values.mean():.3g}, max {values.max():.3g}"
            [line] = axis.step(range(plan.ranks), values, where="mid", label=label)
            axis.axhline(values.mean(), color=line.get_color(), linestyle=":", linewidth=1)
    for axis, label in zip(
        axes,
        ("TFLOP per step", "MiB per step, the larger of\nsent and received", "GiB of state", "ms, nothing overlapped"),
    ):
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize="small")
        axis.grid(alpha=0.3)
    axes[0].set_title(title)
    axes[-1].set_xlabel("rank")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def per_rank(loads: Loads, name: str) -> np.ndarray:
    """One of the loads' arrays over ranks; computation averaged over a cycle."""
    values: np.ndarray = getattr(loads, name)
    return values.mean(0) if values.ndim == 2 else values


def size(numbytes: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if numbytes < 1024:
            return f"{numbytes:.4g} {unit}"
        numbytes /= 1024
    return f"{numbytes:.4g} TiB"


def _cells(loads: Loads) -> list[str]:
    imbalance = float(loads.flops.max() / loads.flops.mean()) if loads.flops.any() else None
    times = [f"{1e3 * per_rank(loads, name).max():.3g}" for name in ("compute", "memory", "wire")]
    return [
        f"{loads.matrices:,}", f"{loads.elements:,}", f"{loads.flops.mean() / 1e12:.3g}", _ratio(imbalance),
        size(loads.sent.max()), size(loads.received.max()), size(loads.state.min()), size(loads.state.mean()),
        size(loads.state.max()), size(loads.temporary.max()), *times,
    ]  # fmt: skip


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _spread(values: np.ndarray) -> dict[str, float]:
    return {"min": float(values.min()), "mean": float(values.mean()), "max": float(values.max())}


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    )
