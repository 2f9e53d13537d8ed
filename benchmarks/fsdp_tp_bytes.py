"""How many bytes does Muon move under FSDP2 with tensor parallelism, where others gather every matrix on every rank?

    OMP_NUM_THREADS=1 python -m benchmarks.fsdp_tp_bytes

An owner is one of all N = d·t ranks: a rank moves 2P(1 − 1/N)/N elements in a step, where gathering everything moves
P(1 − 1/N) to it: more by a factor of N/2 (`distopt.plan.strategies`). Planned: Llama-3-8B on 8 × 8 ranks, bfloat16, H100 rates.
Measured: GPT-2 124M's hidden matrices on 2 × 2 gloo ranks, fp32, what collectives carried in one step. Bytes are the larger of
what the busiest rank sends and receives for the hidden matrices, without self-traffic; gathering is `strategy="gather"`.
"""

from __future__ import annotations

import json
import tempfile
from math import prod
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Shard
from torch.distributed.tensor.placement_types import _StridedShard

import distopt
from benchmarks.plan_llama import hidden
from benchmarks.report import write_result
from benchmarks.shapes import gpt2_124m, hidden_matrices, llama3_8b
from distopt.cli.plan import model_of_shapes, plan_model
from distopt.plan.cost import H100
from distopt.plan.paper import Mesh

DP, TP = 2, 2
STRATEGIES = ("auto", "gather")


def placements(name: str) -> list[Placement]:
    """Row-wise where a projection ends a block, column-wise elsewhere; dim 0 of that over dp, as fully_shard does."""
    return [Shard(0), Shard(1)] if "c_proj" in name else [_StridedShard(0, split_factor=TP), Shard(0)]


def run(rank: int, folder: str) -> None:
    """One rank: bytes of one step by strategy, to a JSON file."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=DP * TP)
    mesh = init_device_mesh("cpu", (DP, TP))
    shapes = hidden_matrices(gpt2_124m())
    found = {}
    for strategy in STRATEGIES:
        params = {}
        for name, (rows, cols) in shapes.items():
            local = (rows // DP, cols // TP) if "c_proj" in name else (rows // (DP * TP), cols)
            made = (torch.randn(local), mesh, placements(name))
            param = nn.Parameter(DTensor.from_local(*made, run_check=False))
            assert param.shape == (rows, cols)
            param.grad = DTensor.from_local(torch.randn(local), *made[1:], run_check=False)
            params[name] = param
        optimizer = distopt.Muon(params.items(), lr=1e-3, ns_steps=1, strategy=strategy, nonfinite=None)
        plan = optimizer.plan.summary()
        optimizer.step()
        traffic, votes = optimizer.traffic(), 8 * len(params) + 4
        assert traffic["bytes_sent"] == plan["bytes_sent_per_step"], "counted bytes are not the planned ones"
        found[strategy] = max(traffic["bytes_sent"], traffic["bytes_received"]) - votes
    (Path(folder) / f"rank{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def measured() -> dict[str, int]:
    """Bytes of the busiest of the gloo ranks, by strategy."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run, (folder,), nprocs=DP * TP)  # type: ignore[no-untyped-call]
        found = [json.loads((Path(folder) / f"rank{rank}.json").read_text()) for rank in range(DP * TP)]
    return {strategy: max(rank[strategy] for rank in found) for strategy in STRATEGIES}


def planned(dp: int, tp: int) -> dict[str, float]:
    """Bytes of the busiest rank on paper, by strategy."""
    model = model_of_shapes(llama3_8b())
    found = {}
    for strategy in STRATEGIES:
        loads = hidden(plan_model(model, "muon", Mesh(dp=dp, tp=tp), H100, gpu=True, strategy=strategy))
        found[strategy] = float(np.maximum(loads.sent, loads.received).max())
    return found


def main() -> None:
    """Plan, measure, write."""
    small = sum(map(prod, hidden_matrices(gpt2_124m()).values()))
    large = sum(map(prod, hidden_matrices(llama3_8b()).values()))
    rows = []
    for what, elements, ranks, itemsize, found in (
        ("Llama-3-8B, 8 × 8, planned", large, 64, 2, planned(8, 8)),
        ("GPT-2 124M, 2 × 2, measured", small, DP * TP, 4, measured()),
    ):
        mean = 2 * itemsize * elements * (ranks - 1) / ranks**2
        rows += [
            [f"{what}: MB, busiest rank", f"{found['auto'] / 1e6:,.1f}", ""],
            [f"{what}: MB, gathering everything", f"{found['gather'] / 1e6:,.1f}", ""],
            [f"{what}: less by a factor of", f"{found['gather'] / found['auto']:.2f}", f"{ranks / 2:g} (N/2)"],
            [f"{what}: busiest rank / 2P(N−1)/N²", f"{found['auto'] / mean:.3f}", ""],
        ]
    for row in rows:
        print(*row, sep=" | ")
    write_result("fsdp_tp_bytes", {"columns": ["Muon, FSDP2 × TP", "found", "derived"], "rows": rows})


if __name__ == "__main__":
    main()
