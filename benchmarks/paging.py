"""What does it cost to have states in pages, and does what moves agree with the plan?

    python -m benchmarks.paging [--device cuda] [--disk DIRECTORY]

One process, 8 matrices of 1,024 × 1,024 (8.4M elements) for AdamW in fp32 and int8, two for Muon in int8: steps with states
on the device, in host memory ("cpu_pages"), there and stepped there ("cpu_step") and in a file, medians of steps taken in
turn; bytes of pages to the device and back per step as planned and as counted. On a CPU the device is memory as well, so
"cpu_pages" and "cpu_step" show the cost of the engine alone, and of copying weights and gradients.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from typing import Any

import torch

import distopt
from benchmarks.report import write_result

ROUNDS = 7


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--disk", default=None)
    arguments = parser.parse_args()
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
    columns = ["states", "ms per step", "beside resident", "planned bytes per step", "moved"]
    note = "Steps interleaved in one run; bytes of pages to the device and back."
    write_result(
        "paging" if arguments.device == "cpu" else "paging_gpu", {"columns": columns, "rows": rows, "note": note}
    )


if __name__ == "__main__":
    main()
