"""What a run shows and leaves: progress bar, metrics as JSON lines and TensorBoard, loss curves, one-screen summary."""

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
import torch
import torch.distributed as dist
from settings import LoggingConfig
from torch import nn
from tqdm import tqdm

import distopt

METRICS_FILE = "metrics.jsonl"


class Metrics:
    """Writes scalars of one rank to `metrics.jsonl`, TensorBoard and a progress bar; the other ranks' is inert.

    Args:
        directory: the run's folder, which exists.
        config: whether to write TensorBoard events.
        first_step: steps already done. Later lines of an earlier attempt are dropped: they will be written again.
        total_steps: the length of the bar.
        active: whether this process writes.
    """

    def __init__(
        self, directory: Path, config: LoggingConfig, *, first_step: int, total_steps: int, active: bool
    ) -> None:
        self.active = active
        if not active:
            return
        kept = [line for line in read_metrics(directory) if line["step"] <= first_step] if first_step else []
        self._file = (directory / METRICS_FILE).open("w", encoding="utf-8")
        self._file.writelines(json.dumps(line) + "\n" for line in kept)
        self._events: Any = None
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(directory / "tensorboard"), purge_step=first_step + 1)
        self._shown: dict[str, str] = {}
        # A log file gets a line now and then, not one per step.
        interval = 0.1 if sys.stderr.isatty() else 15.0
        self._bar = tqdm(total=total_steps, initial=first_step, unit="step", mininterval=interval, dynamic_ncols=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.active:
            self._bar.close()
            self._file.close()
            if self._events is not None:
                self._events.close()

    def advance(self) -> None:
        """One step is done."""
        if self.active:
            self._bar.update()

    def write(self, step: int, **values: float | None) -> None:
        """Record named scalars of `step` (steps done, so 1 after the first); a None is a null in the file only."""
        if not self.active:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            if value is None:
                continue
            if self._events is not None:
                self._events.add_scalar(name, value, step)
            self._shown[name.removesuffix("_bytes")] = human_bytes(value) if name.endswith("_bytes") else f"{value:.4g}"
        self._bar.set_postfix(self._shown, refresh=False)


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`, in order; a last line that a killed run left half-written is dropped."""
    path = directory / METRICS_FILE
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def plot_losses(directory: Path, title: str, unit: str) -> Path:
    """Draw training and validation loss against the step, from `metrics.jsonl`, into `loss.png`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = read_metrics(directory)
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for key, label, style in (("loss", "training", {"linewidth": 1.0}), ("val_loss", "validation", {"marker": "o"})):
        points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
        if points:
            steps, losses = zip(*points, strict=True)
            axes.plot(steps, losses, label=f"{label}, last {losses[-1]:.3f}", **style)
    axes.set(xlabel="step", ylabel=f"loss ({unit})", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    path = directory / "loss.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def memory_in_use(device: torch.device) -> int:
    """Bytes: the peak allocated on a GPU; on a CPU, what the process holds now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss


def human_bytes(count: float) -> str:
    """`count` with a binary unit: 1536 → '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def precision_row(model: nn.Module, optimizer: distopt.Optimizer, *, bf16: bool) -> str:
    """The number formats of weights, compute, gradients and every kind of optimizer state."""
    weights = {dtype_name(parameter) for parameter in model.parameters()}
    found: dict[str, set[str]] = {
        "weights": weights,
        "compute": {"bfloat16"} if bf16 else weights,
        "gradients": weights,
    }
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and name != "step":
                found.setdefault(name, set()).add(dtype_name(value))
    return ", ".join(f"{name} {'/'.join(sorted(dtypes))}" for name, dtypes in found.items())


def optimizer_rows(optimizer: distopt.Optimizer, steps: int, device: torch.device) -> dict[str, str]:
    """State bytes, and bytes exchanged per step as planned and as measured since `reset_traffic`; collective."""
    plan, traffic = optimizer.plan.summary(), optimizer.traffic()
    state, planned, measured = sum_over_ranks(
        [plan["state_bytes"], plan["bytes_sent_per_step"], traffic["bytes_sent"] / max(1, steps)], device
    )
    return {
        "state": f"{plan['state_bytes_per_parameter']:.2f} bytes per parameter; {human_bytes(state)} over all ranks",
        "exchange": f"per step over all ranks: {planned:,.0f} bytes planned, {measured:,.0f} measured (verdict included)",
    }


def loss_rows(directory: Path, unit: str) -> dict[str, str]:
    """The last training and validation loss in the run's metrics."""
    lines = read_metrics(directory)
    last = {key: [line[key] for line in lines if key in line][-1] for key in ("loss", "val_loss")}
    return {"loss": f"training {last['loss']:.4f}, validation {last['val_loss']:.4f} {unit}"}


def sum_over_ranks(values: Iterable[float], device: torch.device) -> list[float]:
    """Add each value over all processes; the same list everywhere."""
    total = torch.tensor(list(values), dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.tolist()


def summary(rows: Mapping[str, str]) -> str:
    """A table of two columns, framed by rules."""
    width = max(len(name) for name in rows)
    body = [f"{name:<{width}}  {value}" for name, value in rows.items()]
    rule = "─" * min(100, max(len(line) for line in body))
    return "\n".join([rule, *body, rule])


def dtype_name(tensor: torch.Tensor) -> str:
    """`torch.float32` → 'float32'."""
    return str(tensor.dtype).removeprefix("torch.")
