"""How many bytes do four ranks exchange and keep, on GPT-2 124M shapes?

    OMP_NUM_THREADS=1 python -m benchmarks.wire_and_state

Four gloo ranks; parameters sharded as FSDP2 does (Shard(0)), or replicated with states partitioned over the ranks
(`process_group=`). Hidden matrices take the rule, everything else AdamW. State bytes are those of allocated tensors, on 2
ranks too for rules with factors; exchanged bytes are counted by the collectives in one Muon step and compared with the plan.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import distopt
from benchmarks.report import write_result
from benchmarks.shapes import gpt2_124m, hidden_matrices

RANKS = 4
RULES = {4: ("adamw", "muon", "soap", "shampoo", "kl_shampoo"), 2: ("soap", "shampoo", "kl_shampoo")}


def held_bytes(optimizer: distopt.Optimizer) -> int:
    """Bytes of every state tensor allocated on this rank, storages counted once."""
    storages = {}
    for group in optimizer._bind().groups:
        tensors = [t for window in group.windows for t in window.state.values()]
        for bucket in getattr(group, "buckets", []):
            tensors += [t for slabs in (*bucket.slabs, *bucket.owned_slabs) for t in slabs.tensors.values()]
        for tensor in tensors:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


def run(rank: int, folder: str, ranks: int) -> None:
    """One rank: all rows, results to a JSON file."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{ranks}", rank=rank, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,))
    shapes = gpt2_124m()
    hidden = hidden_matrices(shapes)
    found: dict[str, Any] = {}
    for layout in ("FSDP2", "partitioned DDP"):
        for rule in RULES[ranks]:
            params = {}
            for name, shape in shapes.items():
                full = torch.zeros(shape)
                params[name] = nn.Parameter(distribute_tensor(full, mesh, [Shard(0)]) if layout == "FSDP2" else full)
            groups = [
                {"params": [(name, params[name]) for name in shapes if name in hidden], "rule": rule},
                {"params": [(name, params[name]) for name in shapes if name not in hidden], "rule": "adamw"},
            ]
            options = {} if layout == "FSDP2" else {"process_group": dist.group.WORLD}
            optimizer = distopt.AdamW(groups, lr=1e-3, nonfinite=None, **options)
            summary = optimizer.plan.summary()
            row = {"state": held_bytes(optimizer), **{k: v for k, v in summary.items() if k != "groups"}}
            if rule == "muon" and layout == "FSDP2":
                for param in params.values():
                    param.grad = torch.full_like(param, 1e-3)
                optimizer.reset_traffic()
                optimizer.step()
                traffic = optimizer.traffic()
                row |= {"sent": traffic["bytes_sent"], "received": traffic["bytes_received"]}
                row["hidden"] = sum(params[name].numel() for name in hidden)
                row["votes"] = 8 * len(params) + 4
            found[f"{layout} {rule}"] = row
            del optimizer, params, groups
    Path(folder, f"{ranks}-{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Measure and write the result."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        for count in RULES:
            mp.spawn(run, (folder, count), nprocs=count)
            found[count] = [json.loads(Path(folder, f"{count}-{rank}.json").read_text()) for rank in range(count)]
    rows: list[list[str]] = []
    for count, by_rank in found.items():
        for key in by_rank[0]:
            most = max(rank[key]["state"] for rank in by_rank)
            share = by_rank[0][key]["state_bytes_total"] / count
            reach = "≤ 1.02" if key.endswith(("adamw", "muon")) else "≤ 1.05"
            what = f"{key}, {count} ranks: state on the fullest rank × N / total"
            rows.append([what, f"{most / share:.4f}", reach])
    ranks = found[RANKS]
    muon = [rank["FSDP2 muon"] for rank in ranks]
    sent, received = [m["sent"] - m["votes"] for m in muon], [m["received"] - m["votes"] for m in muon]
    ideal = 2 * 4 * muon[0]["hidden"] * (RANKS - 1) / RANKS
    planned = all(m["sent"] == m["bytes_sent_per_step"] and m["received"] == m["bytes_received_per_step"] for m in muon)
    rows += [
        ["FSDP2 Muon: bytes sent by all ranks / 2P(N−1)/N", f"{sum(sent) / ideal:.6f}", "1 (no padding)"],
        ["FSDP2 Muon: busiest rank / mean", f"{max(sent + received) / (sum(sent) / RANKS):.4f}", "≤ 1.10"],
        ["FSDP2 Muon: counted bytes = planned bytes on every rank", str(planned), "True"],
    ]
    for row in rows:
        print(*row, sep=" | ")
    columns = [f"GPT-2 124M, {RANKS} ranks", "measured", "to reach"]
    write_result("wire_and_state", {"columns": columns, "rows": rows, "ranks": ranks})


if __name__ == "__main__":
    main()
