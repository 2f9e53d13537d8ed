"""How close do fused steps come to the copy bandwidth of a GPU, and how do they compare with others' optimizers?

    python -m benchmarks.gpu_kernels [--model llama3_8b --layers 4] [--rounds 20]
    python -m benchmarks.gpu_kernels --dry-run       # the same table of what would run, on a CPU and tiny shapes

The matrices of some layers. Copy bandwidth: a copy of 1 GiB, read and written bytes over time. Of a step: the bytes that it
has to read and write (weights, rest of master weights, gradients, states, scales) over time. Then what is elementwise in rules
that are not, as one kernel per stretch and as torch's operations, on one stack of as many elements; and their states and
weights, decoded and encoded so.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

import numpy as np
import torch

import distopt
from benchmarks import shapes
from benchmarks.int8_step import in_turn
from benchmarks.report import write_result
from distopt.kernels import state_kernels, stretch_kernels
from distopt.plan.tiles import whole_tiles
from distopt.rules import adafactor, muon
from distopt.state import coded
from distopt.state.codecs import CODECS
from distopt.state.coded import Coded
from distopt.state.master import MASTERS
from distopt.state.noise import Key

VARIANTS: dict[str, tuple[torch.dtype, dict[str, Any], float]] = {
    "AdamW int8 + bits8": (torch.bfloat16, {"state_codec": "int8", "master_codec": "bits8"}, 12 + 8 / 64),
    "AdamW int8": (torch.bfloat16, {"state_codec": "int8"}, 10 + 8 / 64),
    "AdamW fp8 + bits8": (torch.bfloat16, {"state_codec": "fp8", "master_codec": "bits8"}, 12 + 8 / 64),
    "AdamW int4 + bits8": (torch.bfloat16, {"state_codec": "int4", "master_codec": "bits8"}, 10 + 8 / 64),
    "AdamW int8 + bits8, float16": (torch.float16, {"state_codec": "int8", "master_codec": "bits8"}, 12 + 8 / 64),
    "AdamW bf16_sr + bits16": (torch.bfloat16, {"state_codec": "bf16_sr", "master_codec": "bits16"}, 18),
    "AdamW int8, fp32 weights": (torch.float32, {"state_codec": "int8"}, 16 + 8 / 64),
    "AdamW fp32 (torch's kernel)": (torch.float32, {}, 28),
    "Lion int8 + bits8": (torch.bfloat16, {"state_codec": "int8", "master_codec": "bits8"}, 10 + 4 / 64),
}
"""Dtype of weights, options, bytes read and written per element and step."""


def parameters(sizes: list[tuple[int, ...]], dtype: torch.dtype, device: str) -> list[torch.nn.Parameter]:
    """Parameters with gradients."""
    params = [torch.nn.Parameter(torch.randn(size, device=device).mul_(0.02).to(dtype)) for size in sizes]
    for param in params:
        param.grad = torch.randn_like(param).mul_(1e-3)
    return params


def others() -> dict[str, tuple[torch.dtype, Callable[[Any], Any]]]:
    """Other packages' optimizers, as far as they are installed, and torch's."""
    found: dict[str, tuple[torch.dtype, Callable[[Any], Any]]] = {
        "torch AdamW fused, fp32": (torch.float32, lambda p: torch.optim.AdamW(p, fused=True))
    }
    try:
        import bitsandbytes

        found["bitsandbytes AdamW8bit, bf16"] = (torch.bfloat16, bitsandbytes.optim.AdamW8bit)
    except ImportError:
        pass
    try:
        from torchao.optim import AdamW8bit

        found["torchao AdamW8bit, bf16"] = (torch.bfloat16, AdamW8bit)
    except ImportError:
        pass
    try:
        from flashoptim import FlashAdamW

        found["FlashOptim AdamW, bf16"] = (torch.bfloat16, FlashAdamW)
    except ImportError:
        pass
    return found


def copying(size: int, device: str, rounds: int) -> float:
    """Milliseconds (median) of copying so many bytes."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return statistics.median(in_turn({"copy": lambda: target.copy_(source)}, rounds)["copy"])


def stretches(numel: int, device: str) -> dict[str, tuple[Callable[[], Any], Callable[[], Any], int]]:
    """Stretches of rules: by kernel (on a CPU as well by the text), by the text, bytes read and written per element."""
    shape = (4, max(numel // (4 * 4096), 1), min(numel // 4, 4096))
    wide, other = (torch.randn(shape, device=device) for _ in range(2))
    row, col, one = wide[:, :, :1].square(), wide[:, :1].square(), wide[:, :1, :1].square()
    given: dict[str, tuple[Callable[..., Any], tuple[Any, ...], int]] = {
        "Muon, momentum to bf16": (muon.prepare, (wide, other, 0.95, True, torch.bfloat16), 14),
        "Muon, new weights": (muon.apply, (wide, other.bfloat16(), 0.99, -0.02), 10),
        "Adafactor, update": (adafactor.precondition, (wide, row, col, one, 1e-7), 12),
        "Adafactor, new weights": (adafactor.apply, (wide, other, one, 0.99), 12),
    }
    kernels = stretch_kernels(torch.device(device))
    return {
        name: (partial(kernels.get(text, text), *args), partial(text, *args), moved)
        for name, (text, args, moved) in given.items()
    }


def states(numel: int, device: str) -> dict[str, tuple[Callable[[], Any], Callable[[], Any], float]]:
    """What is stored: read and written by kernel (on a CPU as well by the text), and so on as `stretches`."""
    there, found = torch.device(device), {}
    x, kernels = torch.randn(numel, device=device), state_kernels(there)
    tiles, key = whole_tiles(1, numel), Key(0, 1, "x")

    def by_text(function: Callable[..., Any], *args: Any) -> Any:
        coded.state_kernels = lambda device: None
        try:
            return function(*args)
        finally:
            coded.state_kernels = state_kernels

    for codec, size in (("int8", 1 + 4 / 128), ("int4", 0.5 + 4 / 128), ("bf16_sr", 2)):
        store = Coded(CODECS[codec](True), tiles, there, 0.0, np.arange(tiles.count) * 128)
        for name, run in (("read", partial(store.read)), ("write", partial(store.write, x, None, key))):
            found[f"{name} {codec}"] = run, partial(by_text, run), 4 + size
    master = MASTERS["bits8"]
    param, rest = master.split(x, torch.bfloat16)
    join, split = partial(master.join, param, rest), partial(master.split, x, torch.bfloat16)
    if kernels is not None:
        found["join bits8"] = partial(kernels.join, param, rest), join, 7
        found["split bits8"] = partial(kernels.split, x, param, rest), split, 7
    return found


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", choices=["gpt2_124m", "llama3_8b"], default="llama3_8b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    dry, device = arguments.dry_run, "cpu" if arguments.dry_run else "cuda"
    matrices = list(shapes.hidden_matrices(getattr(shapes, arguments.model)()).values())
    sizes = matrices[: len(matrices) * arguments.layers // (32 if arguments.model == "llama3_8b" else 12)]
    if dry:
        sizes = [(48, 256), (30, 100)]
    numel = sum(map(prod, sizes))
    rounds = 1 if dry else arguments.rounds
    copied = copying(1 << (20 if dry else 30), device, rounds)
    bandwidth = 2 * (1 << (20 if dry else 30)) / copied / 1e6
    rows: list[list[object]] = [["copy of 1 GiB", f"{copied:.3f}", f"{bandwidth:.0f}", "1", None]]
    for name, (dtype, options, moved) in VARIANTS.items():
        make = distopt.Lion if name.startswith("Lion") else distopt.AdamW
        step = make(parameters(sizes, dtype, device), lr=1e-3, nonfinite=None, **options).step
        milliseconds = statistics.median(in_turn({name: step}, rounds)[name])
        rate = moved * numel / milliseconds / 1e6
        rows.append([name, f"{milliseconds:.3f}", f"{rate:.0f}", f"{rate / bandwidth:.2f}", "≥ 0.85"])
        del step
    for name, (kernel, text, moved) in (stretches(numel, device) | states(numel, device)).items():
        for kind, run in (("kernel", kernel), ("torch's operations", text)):
            milliseconds = statistics.median(in_turn({name: run}, rounds)[name])
            rate = moved * numel / milliseconds / 1e6
            reach = "≥ 0.85" if run is kernel else None
            rows.append([f"{name}, {kind}", f"{milliseconds:.3f}", f"{rate:.0f}", f"{rate / bandwidth:.2f}", reach])
    for name, (dtype, other) in others().items():
        step = other(parameters(sizes, dtype, device)).step
        milliseconds = statistics.median(in_turn({name: step}, rounds)[name])
        rows.append([name, f"{milliseconds:.3f}", None, None, None])
        del step
    for row in rows:
        print(*row, sep=" | ")
    if not dry:
        columns = ["step", "ms (median)", "GB/s", "of the copy's", "to reach"]
        note = f"{numel / 1e6:.0f}M parameters of {arguments.model}."
        write_result("gpu_kernels", {"columns": columns, "rows": rows, "note": note})


if __name__ == "__main__":
    main()
