"""How close does Newton–Schulz come to the rate of its own matrix products, and how does it compare with torch's?

    python -m benchmarks.newton_schulz                        # the matrices of one GPT-2 124M layer, all dtypes
    python -m benchmarks.newton_schulz --model llama3_8b --device cuda

For each shape, in one run and in turns: the 15 products of 5 steps alone, with `out=` (the matmul rate);
`orthogonalize` with full and with one-triangle products, in Gram form and with Polar Express; torch.optim.Muon's own
function, which computes in bfloat16 whatever it is given; and its expressions in the dtype at hand.

A figure is the median over rounds of (time of the products alone) / (time of the method): 1 is the matmul rate with all
FLOPs counted in full, so the symmetric and Gram forms can exceed it. `spread` is the middle half of the ratios of the
default method. With --threads 1 the times are CPU time, which other work on the machine does not stretch.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim._muon import _zeropower_via_newtonschulz as torch_muon

from benchmarks import shapes
from benchmarks.report import write_result
from distopt.matrix.newton_schulz import MUON_COEFFICIENTS, flops, orthogonalize

STEPS, EPS = 5, 1e-7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=["gpt2_124m", "llama3_8b"], default="gpt2_124m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16", "float16"], default=None)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=None)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    on_cpu = arguments.device == "cpu"
    dtypes = [getattr(torch, name) for name in arguments.dtype or (["float32", "bfloat16"] if on_cpu else ["bfloat16"])]
    layer = sorted(set(shapes.hidden_matrices(getattr(shapes, arguments.model)()).values()))

    torch.manual_seed(0)
    measured = [measure(rows, cols, dtype, arguments) for dtype in dtypes for rows, cols in layer]
    names = list(measured[0]["ratio"])
    name = f"newton_schulz_{arguments.model}" + ("" if on_cpu else f"_{arguments.device}")
    path = write_result(
        name,
        {
            "question": __doc__.splitlines()[0],
            "command": " ".join(["python -m benchmarks.newton_schulz", *sys.argv[1:]]),
            "columns": ["matrix", "dtype", "matmul GFLOP/s", *names, "spread"],
            "rows": [
                [
                    f"{m['rows']}×{m['cols']}",
                    m["dtype"],
                    round(m["matmul_gflops"]),
                    *(m["ratio"][n] and f"{m['ratio'][n]:.2f}" for n in names),
                    "{:.2f}–{:.2f}".format(*m["spread"]),
                ]
                for m in measured
            ],
            "note": "Rate of each method over the rate of its matrix products alone, FLOPs counted in full.",
            "measured": measured,
        },
    )
    print(path.read_text())


def measure(rows: int, cols: int, dtype: torch.dtype, arguments: argparse.Namespace) -> dict[str, Any]:
    """Times all methods on one shape, in turns."""
    x = torch.randn(rows, cols, device=arguments.device)
    run = partial(orthogonalize, x, steps=STEPS, eps=EPS, dtype=dtype)
    methods: dict[str, Callable[[], Any] | None] = {
        "products alone": products_alone(x.to(dtype)),
        "default": run,
        "full products": partial(run, symmetric=False),
        "one triangle": partial(run, symmetric=True),
        "gram": partial(run, method="gram"),
        "polar_express": partial(run, method="polar_express"),
        "torch, bfloat16": partial(torch_muon, x, MUON_COEFFICIENTS, STEPS, EPS),
        "torch, same dtype": None if dtype == torch.bfloat16 else partial(torch_muon_in, x, dtype),
    }
    alone = arguments.device == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name, method in methods.items() if method is not None}
    for turn in range(arguments.rounds + 1):
        for name, method in methods.items():
            if method is None:
                continue
            seconds = timed(method, arguments.device, clock)
            if turn:  # the first warms up
                times[name].append(seconds)
    baseline = times.pop("products alone")
    ratios = {name: sorted(b / t for b, t in zip(baseline, seconds)) for name, seconds in times.items()}
    quarter = len(ratios["default"]) // 4
    return {
        "rows": rows,
        "cols": cols,
        "dtype": str(dtype).removeprefix("torch."),
        "matmul_gflops": flops(rows, cols, steps=STEPS) / statistics.median(baseline) / 1e9,
        "ratio": {n: statistics.median(ratios[n]) if n in ratios else None for n in methods if n != "products alone"},
        "spread": [ratios["default"][quarter], ratios["default"][-1 - quarter]],
        "milliseconds": {
            name: 1e3 * statistics.median(t) for name, t in [("products alone", baseline), *times.items()]
        },
    }


def products_alone(x: Tensor) -> Callable[[], None]:
    """The matrix products of 5 steps and nothing else, into memory that is there."""
    wide = x.mT if x.shape[0] > x.shape[1] else x
    gram, poly, update = wide @ wide.mT, wide @ wide.mT, torch.empty_like(wide)

    def run() -> None:
        for _ in range(STEPS):
            torch.mm(wide, wide.mT, out=gram)
            torch.mm(gram, gram, out=poly)
            torch.mm(poly, wide, out=update)

    return run


def torch_muon_in(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The expressions of torch.optim.Muon in another dtype than its own."""
    a, b, c = MUON_COEFFICIENTS
    x = x.to(dtype, copy=True)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x.div_(x.norm().clamp(min=EPS))
    for _ in range(STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def timed(method: Callable[[], Any], device: str, clock: Callable[[], float]) -> float:
    """Seconds of one call, the device's work included."""
    if device != "cpu":
        torch.cuda.synchronize(device)
    start = clock()
    method()
    if device != "cpu":
        torch.cuda.synchronize(device)
    return clock() - start


if __name__ == "__main__":
    main()
