"""What does it cost to have states in pages, and does what moves agree with the plan?

    python -m benchmarks.paging [--device cuda] [--disk DIRECTORY]

One process, 8 matrices of 1,024 × 1,024 (8.4M elements) for AdamW in fp32 and int8, two for Muon in int8: steps with states
on the device, in host memory ("cpu_pages"), there and stepped there ("cpu_step") and in a file, medians of steps taken in
turn; bytes of pages to the device and back per step as planned and as counted. On a CPU the device is memory as well, so
"cpu_pages" and "cpu_step" show the cost of the engine alone, and of copying weights and gradients.

On a GPU then AdamW int8 + bits8 in pages, on 64 bfloat16 matrices of 2,048 × 2,048 (268M elements): the rate at which pages
move, both ways together, beside that of pinned copies both ways at once, and bitsandbytes' paged AdamW where it is installed.
--dry-run: that on a CPU, with tiny matrices.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

import distopt
from benchmarks.int8_step import in_turn
from benchmarks.report import write_result

ROUNDS = 7


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--disk", default=None)
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    if arguments.dry_run:
        beside_copies("cpu", 64)
        return
    rows: list[list[Any]] = []
    with tempfile.TemporaryDirectory(dir=arguments.disk) as directory:
        for rule, codec, count in (("AdamW", "fp32", 8), ("AdamW", "int8", 8), ("Muon", "int8", 2)):
            places = {"device": None, "cpu_pages": "cpu_pages", "cpu_step": "cpu_step", "disk": f"disk:{directory}"}
            if rule == "Muon":  # whose states are never stepped on the host
                del places["cpu_step"]
            optimizers = {}
            for place, offload in places.items():
                params = [torch.nn.Parameter(torch.randn(1024, 1024, device=arguments.device)) for _ in range(count)]
                for param in params:
                    param.grad = torch.randn_like(param)
                optimizers[place] = getattr(distopt, rule)(params, lr=1e-4, state_codec=codec, offload=offload)
            times: dict[str, list[float]] = {place: [] for place in places}
            for _ in range(ROUNDS):
                for place, optimizer in optimizers.items():
                    optimizer.plan  # noqa: B018 - binds
                    optimizer.reset_traffic()
                    start = time.perf_counter()
                    optimizer.step()
                    if arguments.device != "cpu":
                        torch.cuda.synchronize()
                    times[place].append((time.perf_counter() - start) * 1e3)
            resident = statistics.median(times["device"][2:])
            for place, optimizer in optimizers.items():
                plan, moved = optimizer.plan.summary(), optimizer.traffic()
                planned = plan["page_bytes_read_per_step"] + plan["page_bytes_written_per_step"]
                counted = moved.get("page_bytes_read", 0) + moved.get("page_bytes_written", 0)
                median = statistics.median(times[place][2:])
                rows.append(
                    [
                        f"{rule} {codec}, {place}",
                        f"{median:.1f}",
                        f"{median / resident:.2f}",
                        f"{planned:,}",
                        f"{counted:,}",
                    ]
                )
                print(*rows[-1], sep=" | ", flush=True)
    if arguments.device != "cpu":
        beside_copies(arguments.device, 2048)
    columns = ["states", "ms per step", "beside resident", "planned bytes per step", "moved"]
    note = "Steps interleaved in one run; bytes of pages to the device and back."
    write_result(
        "paging" if arguments.device == "cpu" else "paging_gpu", {"columns": columns, "rows": rows, "note": note}
    )


def beside_copies(device: str, side: int) -> None:
    """Measure steps in pages beside pinned copies and bitsandbytes; write the result if that is on a GPU."""
    size = 64 * side * side
    host = [torch.empty(size, dtype=torch.uint8, pin_memory=device != "cpu") for _ in range(2)]
    there = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
    streams = [torch.cuda.Stream() if device != "cpu" else None for _ in range(2)]

    def copy_both_ways() -> None:
        for stream, target, source in zip(streams, (there[0], host[1]), (host[0], there[1])):
            with torch.cuda.stream(stream):
                target.copy_(source, non_blocking=True)

    steps: dict[str, Callable[[], Any]] = {"pinned copies, both ways at once": copy_both_ways}
    paged = distopt.AdamW(
        matrices(side, device), state_codec="int8", master_codec="bits8", offload="cpu_pages", nonfinite=None
    )
    steps["AdamW int8 + bits8 in pages"] = paged.step
    try:
        import bitsandbytes

        if device != "cpu":
            steps["bitsandbytes PagedAdamW8bit"] = bitsandbytes.optim.PagedAdamW8bit(matrices(side, device)).step
    except ImportError:
        pass
    times = {name: statistics.median(found) for name, found in in_turn(steps, ROUNDS).items()}
    summary = paged.plan.summary()
    moved = summary["page_bytes_read_per_step"] + summary["page_bytes_written_per_step"]
    [copies, ours, *theirs] = times.values()
    rate, pages = 2 * size / copies / 1e6, moved / ours / 1e6
    rows = [
        ["pinned copies, both ways at once", f"{copies:.2f}", f"{rate:.1f}", "1", None],
        ["AdamW int8 + bits8 in pages", f"{ours:.2f}", f"{pages:.1f}", f"{pages / rate:.2f}", "≥ 0.85"],
        *(
            ["bitsandbytes PagedAdamW8bit", f"{t:.2f}", None, f"{t / ours:.1f} × the time of ours", "≥ 5 ×"]
            for t in theirs
        ),
    ]
    for row in rows:
        print(*row, sep=" | ")
    if device != "cpu":
        columns = ["64 matrices of 2,048², bfloat16", "ms (median)", "GB/s", "of the copies'", "to reach"]
        write_result("paging_gpu_bandwidth", {"columns": columns, "rows": rows, "note": "Steps in turn in one run."})


def matrices(side: int, device: str) -> list[torch.nn.Parameter]:
    """64 of them, with gradients."""
    params = [torch.nn.Parameter(torch.randn(side, side, device=device).bfloat16()) for _ in range(64)]
    for param in params:
        param.grad = torch.randn_like(param) * 1e-3
    return params


if __name__ == "__main__":
    main()
