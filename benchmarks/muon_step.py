"""How long does a whole Muon step take beside torch.optim.Muon and dion's?

    python -m benchmarks.muon_step [--dion <a checkout of github.com/microsoft/dion>]

One process. 1,000 matrices of 64 × 64, 100 of 128 × 512, and the four matrices of one GPT-2 124M layer; ours in bf16, in
which the others always compute, and in fp32, our default on a CPU. Median of steps taken in turn.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any

import torch

import distopt
from benchmarks.report import write_result
from benchmarks.shapes import gpt2_124m, hidden_matrices


def parameters(shapes: list[tuple[int, ...]]) -> list[torch.nn.Parameter]:
    """Parameters with gradients, the same in every call."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator)
    return params


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--dion")
    dion = parser.parse_args().dion
    peers: dict[str, Any] = {
        "distopt, bf16": lambda p: distopt.Muon(p, lr=1e-2, ns_dtype=torch.bfloat16),
        "distopt, fp32": lambda p: distopt.Muon(p, lr=1e-2),
        "torch.optim.Muon": lambda p: torch.optim.Muon(p, lr=1e-2),
    }
    if dion:
        sys.path.insert(0, dion)
        from dion import MuonReference

        peers["dion MuonReference"] = lambda p: MuonReference(p, lr=1e-2)
    layer = [shape for name, shape in hidden_matrices(gpt2_124m()).items() if ".0." in name]
    sets = {
        "1,000 of 64 × 64": [(64, 64)] * 1000,
        "100 of 128 × 512": [(128, 512)] * 100,
        "one GPT-2 124M layer": layer,
    }
    rows: list[list[str]] = []
    for title, shapes in sets.items():
        optimizers = {name: make(parameters(shapes)) for name, make in peers.items()}
        times: dict[str, list[float]] = {name: [] for name in optimizers}
        for _ in range(7):
            for name, optimizer in optimizers.items():
                start = time.perf_counter()
                optimizer.step()
                times[name].append((time.perf_counter() - start) * 1e3)
        medians = {name: statistics.median(values[2:]) for name, values in times.items()}
        rows.append([title, *(f"{medians[name]:.1f}" for name in peers)])
        print(*rows[-1], sep=" | ")
    write_result("muon_step", {"columns": ["Muon step, ms", *peers], "rows": rows})


if __name__ == "__main__":
    main()
