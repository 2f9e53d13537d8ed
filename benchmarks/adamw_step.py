"""How fast is an AdamW step beside torch's fused one?

    python -m benchmarks.adamw_step [--device cuda]

One process, fp32. GPT-2 124M shapes: without a check, with the verdict on non-finite gradients, and clipping, beside
torch.optim.AdamW(fused=True) alone and with torch.nn.utils.clip_grad_norm_. Then 1,000 tensors of 64 elements with the
verdict on. Each row is the median of ratios of interleaved steps.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

import distopt
from benchmarks.report import write_result
from benchmarks.shapes import gpt2_124m


def tensors(shapes: list[tuple[int, ...]], device: str) -> list[torch.nn.Parameter]:
    """Parameters of these shapes with gradients."""
    params = [torch.nn.Parameter(torch.randn(shape, device=device) * 0.02) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param) * 1e-3
    return params


def compare(ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> tuple[float, float, float]:
    """(median ms of ours, of theirs, median ratio), steps taken in turn."""
    times: list[tuple[float, float]] = []
    for _ in range(rounds + 2):
        pair = []
        for step in (ours, theirs):
            start = time.perf_counter()
            step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            pair.append((time.perf_counter() - start) * 1e3)
        times.append((pair[0], pair[1]))
    times = times[2:]
    return (
        statistics.median(a for a, _ in times),
        statistics.median(b for _, b in times),
        statistics.median(a / b for a, b in times),
    )


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cpu")
    device = parser.parse_args().device
    rows: list[list[object]] = []
    shapes = list(gpt2_124m().values())
    small = [(64,)] * 1000
    for name, sizes, options, clip, reach, rounds in (
        ("GPT-2 124M, nonfinite=None", shapes, {"nonfinite": None}, False, "≤ 1.05", 61),
        ("GPT-2 124M, verdict on", shapes, {}, False, "≤ 1.20", 61),
        (
            "GPT-2 124M, max_grad_norm=1 (torch: clip_grad_norm_ + step)",
            shapes,
            {"max_grad_norm": 1.0},
            True,
            "< 1.00",
            61,
        ),
        ("1,000 tensors of 64, verdict on", small, {}, False, "≤ 0.40", 60),
    ):
        params, others = tensors(sizes, device), tensors(sizes, device)
        ours = distopt.AdamW(params, lr=1e-3, **options)
        theirs = torch.optim.AdamW(others, lr=1e-3, fused=True)

        def torch_step(theirs: torch.optim.Optimizer = theirs, others: list = others, clip: bool = clip) -> None:
            if clip:
                for param in others:
                    assert param.grad is not None
                torch.nn.utils.clip_grad_norm_(others, 1.0, foreach=True)
            theirs.step()

        mine, torchs, ratio = compare(ours.step, torch_step, rounds)
        rows.append([name, f"{mine:.2f}", f"{torchs:.2f}", f"{ratio:.3f}", reach])
        print(*rows[-1], sep=" | ")
    columns = ["AdamW, fp32, one process", "distopt ms", "torch fused ms", "ratio (median)", "to reach"]
    name = "adamw_step" if device == "cpu" else "adamw_step_gpu"
    write_result(name, {"columns": columns, "rows": rows, "note": "Steps interleaved in one run."})


if __name__ == "__main__":
    main()
