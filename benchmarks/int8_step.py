"""How fast is an AdamW step on int8 states, on a CPU, beside others' 8-bit AdamW and torch's fused fp32 one?

    python -m benchmarks.int8_step [--rounds 7] [--device cuda]

One process, nonfinite=None. The matrices of four GPT-2 124M layers, 28M parameters, beside torchao's and bitsandbytes' 8-bit
AdamW where they are installed, and the rule's own text without a compiled kernel; the same in bfloat16 with master_codec
"bits8". Then 10,000 tensors of 2,048 elements, or,
for fp32, of 1,000, beside one tensor of as many. Steps taken in turn; ratios are medians of ratios of one round.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import distopt
from benchmarks.adamw_step import tensors
from benchmarks.report import write_result
from benchmarks.shapes import gpt2_124m, hidden_matrices
from distopt.state import fused


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    device, rounds = arguments.device, arguments.rounds
    matrices = list(hidden_matrices(gpt2_124m()).values())
    layers = matrices[: len(matrices) // 3]
    makers: dict[str, Callable[[Any], Any]] = {
        "distopt int8": lambda p: distopt.AdamW(p, state_codec="int8", nonfinite=None),
        "torch fused fp32": lambda p: torch.optim.AdamW(p, fused=True),
        **peers(),
    }
    built = {name: make(tensors(layers, device)).step for name, make in makers.items()}
    first = seconds(built["distopt int8"])
    if device == "cpu":
        text = distopt.AdamW(tensors(layers, device), state_codec="int8", nonfinite=None)
        built["distopt int8, the rule's text"] = lambda: without_kernels(text.step)
    times = in_turn(built, rounds)
    ours = times["distopt int8"]
    rows: list[list[object]] = []
    reach = {"torch fused fp32": "≤ 4"}
    for name, found in times.items():
        ratio = statistics.median(a / b for a, b in zip(ours, found))
        to_reach = reach.get(name, "≤ 0.1" if name in peers() else None)
        rows.append([f"four GPT-2 layers, {name}", *spread(found), f"{ratio:.3f}", to_reach])
    low = {"distopt int8 + bits8": in_bfloat16(layers, device)}
    if device == "cpu":
        other = in_bfloat16(layers, device)
        low["distopt int8 + bits8, the rule's text"] = lambda: without_kernels(other)
    times = in_turn(low, rounds)
    for name, found in times.items():
        ratio = statistics.median(a / b for a, b in zip(times["distopt int8 + bits8"], found))
        rows.append([f"four GPT-2 layers in bfloat16, {name}", *spread(found), f"{ratio:.3f}", None])
    for codec, each in (("int8", 2048), ("fp32", 1000)):
        many, one = tensors([(each,)] * 10_000, device), tensors([(10_000 * each,)], device)
        pair = {
            "many": distopt.AdamW(many, state_codec=codec, nonfinite=None).step,
            "one": distopt.AdamW(one, state_codec=codec, nonfinite=None).step,
        }
        times = in_turn(pair, rounds)
        ratio = statistics.median(a / b for a, b in zip(times["many"], times["one"]))
        rows.append([f"10,000 tensors of {each:,}, {codec}", *spread(times["many"]), f"{ratio:.3f}", "≤ 2"])
        rows.append([f"one tensor of as many, {codec}", *spread(times["one"]), "1", None])
    for row in rows:
        print(*row, sep=" | ")
    columns = ["AdamW, one process", "ms (median)", "fastest", "slowest", "ours ÷ this (many ÷ one)", "to reach"]
    note = (
        f"First step of ours, with what it builds if nothing was built before: {first:.1f} s. Steps in turn in one run."
    )
    write_result("int8_step" if device == "cpu" else "int8_step_gpu", {"columns": columns, "rows": rows, "note": note})


def in_bfloat16(shapes: list[tuple[int, ...]], device: str) -> Callable[[], Any]:
    """The step on parameters and gradients of 2 bytes."""
    params = [torch.nn.Parameter(param.detach().bfloat16()) for param in tensors(shapes, device)]
    for param in params:
        param.grad = torch.randn_like(param) * 1e-3
    return distopt.AdamW(params, state_codec="int8", master_codec="bits8", nonfinite=None).step


def peers() -> dict[str, Callable[[Any], Any]]:
    """8-bit AdamW of other packages, as far as they are installed."""
    found: dict[str, Callable[[Any], Any]] = {}
    try:
        import bitsandbytes

        found["bitsandbytes AdamW8bit"] = bitsandbytes.optim.AdamW8bit
    except ImportError:
        pass
    try:
        from torchao.optim import AdamW8bit

        found["torchao AdamW8bit"] = AdamW8bit
    except ImportError:
        pass
    return found


def without_kernels(step: Callable[[], Any]) -> None:
    """A step by the rule's text."""
    find, fused.Fused.find = fused.Fused.find, lambda self, unit: None  # type: ignore[method-assign]
    try:
        step()
    finally:
        fused.Fused.find = find  # type: ignore[method-assign]


def in_turn(steps: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every step in every round; one more round before warms up."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            elapsed = seconds(step) * 1e3
            if number:
                times[name].append(elapsed)
    return times


def seconds(step: Callable[[], Any]) -> float:
    """One step, with the device's work."""
    start = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def spread(times: list[float]) -> list[str]:
    """Median, fastest and slowest."""
    return [f"{statistics.median(times):.1f}", f"{min(times):.1f}", f"{max(times):.1f}"]


if __name__ == "__main__":
    main()
