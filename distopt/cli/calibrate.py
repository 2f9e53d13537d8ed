"""`distopt calibrate`: measure what this machine reaches, for the cost model.

    distopt calibrate --out rates.json                                              # one process
    torchrun --nproc-per-node 8 -m distopt calibrate --mesh dp=4,tp=2 --out rates.json   # and its links
    distopt plan … --rates rates.json

Every rank computes at the same time, as in training, and the slowest one counts. The groups of a mesh axis communicate at
the same time as well. The bandwidth of an axis is that of its all-to-all; all-reduces are printed beside it.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from distopt.plan.cost import PRESETS, Link, Rates, save_rates
from distopt.plan.flops import cholesky_flops, eigh_flops, qr_flops, solve_flops, svd_flops
from distopt.plan.paper import AXES, Mesh

ROUNDS = 5
"""Measurements of each thing after one that is not counted; their median is taken."""


def add_command(commands: Any) -> None:
    """Declare `distopt calibrate`."""
    parser = commands.add_parser(
        "calibrate",
        help="measure rates for the cost model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("rates.json"), help="the file to write (rates.json)")
    parser.add_argument("--mesh", help="under torchrun: sizes of replicate, dp and tp; dp over all ranks by default")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", type=int, help="rows of the matrices (4096 on cuda, 1024 on cpu)")
    parser.add_argument("--mib", type=int, help="MiB per rank in a collective (256 on cuda, 16 on cpu)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    """Measure, print, write."""
    if rest:
        raise ValueError(f"unknown arguments: {' '.join(rest)}")
    for name in ("size", "mib"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    started = "RANK" in os.environ and not dist.is_initialized()
    on_gpu = arguments.device == "cuda"
    device = torch.device("cpu")
    if on_gpu:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if started:
        dist.init_process_group("nccl" if on_gpu else "gloo")
    world = dist.get_world_size() if dist.is_initialized() else 1
    mesh = Mesh.parse(arguments.mesh) if arguments.mesh else Mesh(dp=world)
    if mesh.size != world:
        raise ValueError(
            f"--mesh {arguments.mesh} has {mesh.size} ranks, this run has {world} (start it with torchrun)"
        )
    rates = measure(
        mesh, device, arguments.size or (4096 if on_gpu else 1024), (arguments.mib or (256 if on_gpu else 16)) << 20
    )
    if world == 1 or dist.get_rank() == 0:
        save_rates(rates, arguments.out)
        print(f"written to {arguments.out}")
    if started:
        dist.destroy_process_group()


def measure(mesh: Mesh, device: torch.device, size: int, numbytes: int) -> Rates:
    """Rates of these ranks, all of which must call this.

    Args:
        mesh: axes of all ranks; links are measured on those with more than one rank. Without any, they are the
            preset's for this kind of device.
        size: rows of square matrices; factorizations take half of it.
        numbytes: per rank in a collective.
    """
    many = mesh.size > 1
    preset = PRESETS["h100" if device.type == "cuda" else "cpu"]
    flops = {kind: _slowest(rate, device, many) for kind, rate in _compute_rates(device, size).items()}
    memory = _slowest(_memory_rate(device, max(numbytes, 64 << 20)), device, many)
    host_link = _slowest(_host_link(device, max(numbytes, 64 << 20), memory), device, many)
    host_memory = _slowest(_host_memory(), device, many)
    links = _links(mesh, device, numbytes) if many else preset.links
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    rates = replace(
        preset, name=f"{name}, {mesh.size} ranks, measured", flops=flops, memory_bandwidth=memory, links=links,
        host_link=host_link, host_memory=host_memory,
    )  # fmt: skip
    if not many or dist.get_rank() == 0:
        for kind, rate in flops.items():
            print(f"{kind:10} {rate / 1e9:12,.1f} GFLOP/s")
        print(f"{'memory':10} {memory / 1e9:12,.1f} GB/s")
        print(
            f"{'host':10} {host_memory / 1e9:12,.1f} GB/s in a step, {host_link / 1e9:,.1f} GB/s each way to the device"
        )
        if not many:
            print("links are those of the preset; run under torchrun to measure them")
    return rates


def _compute_rates(device: torch.device, size: int) -> dict[str, float]:
    """FLOP/s of this rank by kind of work, with the formulas that plans count by."""
    found = {}
    dtypes = ["float32", "bfloat16"] + (["float16", "float64"] if device.type == "cuda" else [])
    for name in dtypes:
        a, b = torch.randn((2, size, size), device=device).to(getattr(torch, name))
        found[name] = 2 * size**3 / _seconds(partial(torch.mm, a, b), device)
    half = max(size // 2, 1)
    x = torch.randn((half, half), device=device)
    gram = x @ x.mT + half * torch.eye(half, device=device)
    works: dict[str, tuple[int, Callable[[], Any]]] = {
        "eigh": (eigh_flops(gram), lambda: torch.linalg.eigh(gram)),
        "qr": (qr_flops(x), lambda: torch.linalg.qr(x)),
        "svd": (svd_flops(x), lambda: torch.linalg.svd(x, full_matrices=False)),
        "cholesky": (cholesky_flops(gram), lambda: torch.linalg.cholesky(gram)),
        "solve": (solve_flops(gram, x), lambda: torch.linalg.solve(gram, x)),
    }
    return {**found, **{kind: flops / _seconds(work, device) for kind, (flops, work) in works.items()}}


def _memory_rate(device: torch.device, numbytes: int) -> float:
    source = torch.zeros(numbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * numbytes / _seconds(lambda: target.copy_(source), device)


def _host_link(device: torch.device, numbytes: int, memory: float) -> float:
    """Bytes/s each way while pages come and go; where the device is memory as well, half of what that reaches."""
    if device.type == "cpu":
        return memory / 2
    there, back = (torch.empty(numbytes, dtype=torch.uint8, device=device) for _ in range(2))
    source, target = (torch.empty(numbytes, dtype=torch.uint8, pin_memory=True) for _ in range(2))
    streams = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def both() -> None:
        with torch.cuda.stream(streams[0]):
            there.copy_(source, non_blocking=True)
        with torch.cuda.stream(streams[1]):
            target.copy_(back, non_blocking=True)

    return numbytes / _seconds(both, device)


def _host_memory() -> float:
    """Bytes/s of torch's fused AdamW on the host: 16 read per element, 12 written."""
    param = torch.nn.Parameter(torch.zeros(1 << 23))
    param.grad = torch.ones_like(param)
    step = torch.optim.AdamW([param], fused=True).step
    return 28 * param.numel() / _seconds(step, torch.device("cpu"))


def _links(mesh: Mesh, device: torch.device, numbytes: int) -> tuple[Link, ...]:
    """Bandwidth and latency on each axis with several ranks, from the innermost."""
    axes = init_device_mesh(device.type, mesh.shape, mesh_dim_names=AXES)
    found, span = [], 1
    for name, ranks in reversed(list(zip(AXES, mesh.shape))):
        span *= ranks
        if ranks > 1:
            found.append(_link(name, span, ranks, axes.get_group(name), device, numbytes))
    return tuple(found)


def _link(name: str, span: int, ranks: int, group: dist.ProcessGroup, device: torch.device, numbytes: int) -> Link:
    buffer, received = torch.ones((2, max(numbytes // (4 * ranks), 1) * ranks), device=device)
    small, little = torch.ones((2, ranks), device=device)

    def seconds(work: Callable[[], Any]) -> float:
        return 1 / _slowest(1 / _seconds(work, device, together=True), device, True)

    exchange = seconds(lambda: dist.all_to_all_single(received, buffer, group=group))
    reduce = seconds(lambda: dist.all_reduce(buffer, dist.ReduceOp.MAX, group=group))
    latency = max(
        seconds(lambda: dist.all_to_all_single(little, small, group=group)),
        seconds(lambda: dist.all_reduce(small, dist.ReduceOp.MAX, group=group)),
    )
    # Latency is counted by itself; it is a guess where it is most of the time.
    others = buffer.nbytes * (ranks - 1) / ranks
    bandwidth, reducing = (
        moved / max(taken - latency, taken / 2) for moved, taken in ((others, exchange), (2 * others, reduce))
    )
    if dist.get_rank() == 0:
        print(
            f"{name:10} {bandwidth / 1e9:12,.2f} GB/s all-to-all, {reducing / 1e9:,.2f} GB/s all-reduce, "
            f"{1e6 * latency:,.0f} µs"
        )
    return Link(name, span, bandwidth, latency)


def _seconds(work: Callable[[], Any], device: torch.device, *, together: bool = False) -> float:
    """Median time of `work`; with `together` all ranks begin each measurement at once."""
    times = []
    for _ in range(ROUNDS + 1):
        if together:
            dist.barrier()
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        times.append(time.perf_counter() - start)
    return median(times[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _slowest(rate: float, device: torch.device, many: bool) -> float:
    """The lowest of all ranks' rates."""
    if not many:
        return rate
    lowest = torch.tensor(rate, dtype=torch.float64, device=device)
    dist.all_reduce(lowest, op=dist.ReduceOp.MIN)
    return float(lowest)
