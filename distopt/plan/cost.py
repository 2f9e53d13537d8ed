"""The cost model: from bytes, collectives and FLOPs to seconds.

    rates = H100                                   # or CPU, or load_rates("rates.json") from `distopt calibrate`
    link = rates.link(ranks)                       # what a collective over these global ranks runs on
    link.seconds(numbytes, messages=2)             # 2 collectives that carry so many bytes per rank
    rates.all_reduce_seconds(ranks, numbytes)      # a ring
    rates.compute_seconds({"bfloat16": flops, "eigh": more})
    rates.memory_seconds(numbytes)                 # what streams through memory once

A rate is what large operations reach, so small ones take longer than the model says: it is there to choose between ways
of doing a thing, and to tell what dominates, not to replace a measurement. Nothing here is summed over ranks: callers ask
for the rank that takes longest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from math import isfinite
from pathlib import Path
from typing import Any

WORK = ("float32", "bfloat16", "float16", "float64", "eigh", "qr", "svd", "cholesky", "solve")
"""Kinds of work that have a FLOP rate of their own: matrix products by dtype, and factorizations, which reach a few
percent of it on a GPU."""


@dataclass(frozen=True)
class Link:
    """One level of the network, as one rank sees it.

    Attributes:
        name: of the mesh axis that it was measured on, or of the hardware.
        span: ranks [i·span, (i+1)·span) reach each other over it. For the axes of a row-major mesh this is the product
            of the sizes from that axis to the last one.
        bandwidth: bytes/s that one rank sends, and as many that it receives at the same time.
        latency: seconds that a collective takes which carries nothing.
    """

    name: str
    span: int
    bandwidth: float
    latency: float

    def seconds(self, numbytes: float, messages: float = 1) -> float:
        """Time of `messages` collectives in which the busiest rank sends or receives `numbytes` in all (the larger of
        the two, without what it sends to itself)."""
        return messages * self.latency + numbytes / self.bandwidth


@dataclass(frozen=True)
class Rates:
    """What a rank and its links reach.

    Attributes:
        name: what was measured, for people.
        flops: FLOP/s by kind of work, see `WORK`; multiply and add are 2.
        memory_bandwidth: bytes/s, reads and writes together.
        links: by ascending span; the last one reaches everybody, whatever its span says.
        host_link: bytes/s each way, both at once, between the device and pinned host memory.
        host_memory: bytes/s of a compiled step on the host, reads and writes together.
    """

    name: str
    flops: Mapping[str, float] = field(hash=False)
    memory_bandwidth: float
    links: tuple[Link, ...]
    host_link: float = 20e9
    host_memory: float = 20e9

    def __post_init__(self) -> None:
        wrong = [kind for kind in self.flops if kind not in WORK]
        if wrong or not {"float32", "bfloat16"} <= self.flops.keys():
            raise ValueError(f"rates {self.name!r}: flops are given for {sorted(self.flops)}; known: {', '.join(WORK)}")
        if not self.links or [link.span for link in self.links] != sorted({link.span for link in self.links}):
            raise ValueError(f"rates {self.name!r}: links need ascending spans, got {[x.span for x in self.links]}")
        numbers = {**self.flops, "memory_bandwidth": self.memory_bandwidth}
        numbers |= {"host_link": self.host_link, "host_memory": self.host_memory}
        numbers |= {f"bandwidth of link {link.name!r}": link.bandwidth for link in self.links}
        for what, value in numbers.items():
            if not (isfinite(value) and value > 0):
                raise ValueError(f"rates {self.name!r}: {what} must be a finite number above 0, got {value!r}")

    def link(self, ranks: Sequence[int]) -> Link:
        """The narrowest link over which all these global ranks reach each other."""
        for link in self.links:
            if min(ranks) // link.span == max(ranks) // link.span:
                return link
        return self.links[-1]

    def all_reduce_seconds(self, ranks: Sequence[int], numbytes: float, messages: float = 1) -> float:
        """Time of all-reduces of buffers of `numbytes` in all: a ring sends 2(n − 1)/n of them from every rank."""
        if len(ranks) == 1:
            return 0.0
        return self.link(ranks).seconds(2 * numbytes * (len(ranks) - 1) / len(ranks), messages)

    def compute_seconds(self, work: Mapping[str, float]) -> float:
        """Time of FLOPs by kind. A kind without a rate runs at that of float32 products."""
        return sum(flops / self.flops.get(kind, self.flops["float32"]) for kind, flops in work.items())

    def memory_seconds(self, numbytes: float) -> float:
        """Time to read or write so many bytes."""
        return numbytes / self.memory_bandwidth


H100 = Rates(
    "H100 SXM, 8 per node by NVLink, one 400 Gb/s adapter each between nodes",
    flops={
        # 0.7 of the datasheet's dense peaks (989, 67 and 67 TFLOP/s; TF32 is off for fp32 by default in torch).
        "bfloat16": 692e12, "float16": 692e12, "float32": 47e12, "float64": 47e12,
        # Assumed, not measured: cuSOLVER in fp32 at sizes of some thousands. `distopt calibrate` measures them.
        "eigh": 1e12, "qr": 4e12, "svd": 0.5e12, "cholesky": 10e12, "solve": 10e12,
    },
    memory_bandwidth=0.85 * 3.35e12,  # datasheet: 3.35 TB/s
    links=(
        # 450 GB/s each way on the wire, 370 after protocol: github.com/NVIDIA/nccl-tests/issues/212. Latencies are the
        # order of what nccl-tests shows for messages of some KiB.
        Link("NVLink", 8, 370e9, 20e-6),
        # 48 to 49 GB/s per adapter, all-to-all: github.com/NVIDIA/nccl-tests/issues/267.
        Link("InfiniBand", 1 << 20, 48e9, 60e-6),
    ),
    # Assumed, not measured: PCIe 5 x16 after protocol, and a rank's share of the memory of a host of two sockets.
    # `distopt calibrate` measures them.
    host_link=45e9,
    host_memory=60e9,
)  # fmt: skip

CPU = Rates(
    "one core per rank, gloo over loopback",
    flops={
        "float32": 90e9, "bfloat16": 180e9,  # benchmarks/newton_schulz.py, one thread
        "eigh": 40e9, "qr": 28e9, "svd": 46e9, "cholesky": 23e9, "solve": 22e9,  # `distopt calibrate`, 512 rows
    },
    memory_bandwidth=10e9,
    links=(Link("loopback", 1 << 20, 0.4e9, 300e-6),),  # 28M fp32 parameters to owners and back on 4 ranks: 105 ms
    host_link=5e9,  # the device is memory as well: half of memory_bandwidth
    host_memory=10e9,
)  # fmt: skip

PRESETS = {"h100": H100, "cpu": CPU}


def load_rates(name: str) -> Rates:
    """A preset ("h100", "cpu"), or the JSON file that `save_rates` or `distopt calibrate` wrote.

    Raises:
        ValueError: neither a preset nor a readable file; a field that is missing, unknown or out of range.
    """
    if name in PRESETS:
        return PRESETS[name]
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"rates {name!r}: no such file, and no preset (known: {', '.join(PRESETS)})")
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        keys = {f.name for f in fields(Rates)}
        needed = {f.name for f in fields(Rates) if f.default is MISSING}
        if not needed <= found.keys() <= keys:
            raise ValueError(
                f"has the fields {sorted(found)}, needs {sorted(needed)}, may have {sorted(keys - needed)}"
            )
        return Rates(**{**found, "links": tuple(Link(**link) for link in found["links"])})
    except (TypeError, ValueError) as error:
        raise ValueError(f"rates file {name!r}: {error}") from error


def save_rates(rates: Rates, path: str | Path) -> None:
    """Write rates as JSON, for `load_rates`."""
    Path(path).write_text(json.dumps(asdict(rates), indent=1) + "\n")
