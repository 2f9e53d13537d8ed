"""How long does a plan take for 10,000 parameters on a mesh of 1,024 ranks, and how even is it?

    python -m benchmarks.plan_scale

One process, a pretended mesh dp=128 × tp=8 (FSDP2×TP layouts: strided shards, column- and row-wise), Muon on the hidden
matrices of a Llama-like model and AdamW on the rest, planned from scratch for rank 0.
"""

from __future__ import annotations

import time

from benchmarks.report import write_result
from distopt.layouts.dtensor import Axis, Sharded
from distopt.plan.buckets import Group, Spec
from distopt.plan.build import plan_group
from distopt.plan.report import PlanReport
from distopt.rules.adamw import AdamW
from distopt.rules.muon import Muon

DP, TP = 128, 8


def model(parameters: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of about this many parameters, nine to a layer."""
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (128256, 4096), "lm_head.weight": (128256, 4096)}
    layer = 0
    while len(shapes) < parameters:
        for name, shape in {
            "q_proj": (4096, 4096), "k_proj": (1024, 4096), "v_proj": (1024, 4096), "o_proj": (4096, 4096),
            "gate_proj": (14336, 4096), "up_proj": (14336, 4096), "down_proj": (4096, 14336), "norm1": (4096,), "norm2": (4096,),
        }.items():  # fmt: skip
            shapes[f"layers.{layer}.{name}.weight"] = shape
        layer += 1
    return shapes


def layout(name: str, shape: tuple[int, ...]) -> Sharded:
    """FSDP2×TP as torch makes it: column-wise strided shards, row-wise Shard(0) × Shard(1), norms over dp alone."""
    ranks = tuple(range(DP * TP))
    if len(shape) == 1:
        return Sharded(shape, tuple(range(0, DP * TP, TP)), (Axis(DP, 0),))
    if "o_proj" in name or "down_proj" in name:
        return Sharded(shape, ranks, (Axis(DP, 0), Axis(TP, 1)))
    return Sharded(shape, ranks, (Axis(DP, 0, strided=True), Axis(TP, 0)))


def main() -> None:
    """Measure and write the result."""
    start = time.perf_counter()
    shapes = model(10_000)
    specs = [Spec(name, layout(name, shape), 0) for name, shape in shapes.items()]
    hidden = [s for s in specs if len(s.layout.shape) == 2 and not s.name.startswith(("embed", "lm_head"))]
    chosen = {spec.name for spec in hidden}
    rest = [spec for spec in specs if spec.name not in chosen]
    described = time.perf_counter() - start
    start = time.perf_counter()
    plans = [
        plan_group(Group(Muon(), tuple(hidden), gpu=True), 0),
        plan_group(Group(AdamW(), tuple(rest), gpu=True), 0),
    ]
    planned = time.perf_counter() - start
    summary = PlanReport(plans, ["muon", "adamw"], 0).summary()
    reported = time.perf_counter() - start - planned
    rows = [
        ["parameters × ranks", f"{len(specs):,} × {DP * TP:,}", ""],
        ["describing the layouts, s", f"{described:.2f}", ""],
        ["plan, s", f"{planned:.2f}", "≤ 5"],
        ["summary of it, s", f"{reported:.2f}", ""],
        ["FLOPs, busiest rank / mean", f"{summary['flops_imbalance']:.3f}", ""],
        ["bytes, busiest rank / mean", f"{summary['busiest_bytes'] / summary['mean_bytes']:.3f}", ""],
    ]
    for row in rows:
        print(*row, sep=" | ")
    write_result("plan_scale", {"columns": ["plan on paper", "measured", "to reach"], "rows": rows})


if __name__ == "__main__":
    main()
