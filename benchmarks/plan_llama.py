"""How even are the loads of 64, 128 and 256 ranks on Llama-3-8B shapes?

    python -m benchmarks.plan_llama

Planned on paper, FSDP2 over all ranks, hidden matrices to the rule, everything else to AdamW. Imbalance is FLOPs of the
busiest rank over the mean; bytes are the larger of what the busiest rank sends and receives for the hidden matrices, without
self-traffic, over what moving every matrix to one owner and back takes on average, 2P(N − 1)/N² elements; state bytes are
those of the fullest rank over total/N. A cycle is the rule's refresh period, everything staggered or (synchronous) all in one
step: the worst expected step over the median one, by the cost model's H100 rates.

Hidden matrices alone, no owners of whole matrices give SOAP less than 1.0508 at 64 ranks, which is what it has. A rank's share
is 371.2M numbers; an MLP matrix has 151.0M (moments of 14336 × 4096, a Gram matrix and a basis of 4096²), k and v have 44.0M, q
and o 100.7M. There are 96 MLP matrices and three exceed 1.05 shares, so at least 32 ranks have two; with one k or v these hold
346.0M, with two 390.1M, which is 1.0508 shares. Below that, 32 ranks would lack 25.1M each and the others would have to take it,
with room for 18.6M each. Sides on ranks of their own would go below, and cost what this does not: the gradient goes to a second
rank in every step (half of the exchange again for each side that moves), and a basis comes back at each refresh.
"""

from __future__ import annotations

from math import prod

import numpy as np

from benchmarks.report import RESULTS, write_result
from benchmarks.shapes import hidden_matrices, llama3_8b
from distopt.cli.plan import model_of_shapes, plan_model
from distopt.cli.tables import OnPaper, draw
from distopt.plan.cost import H100
from distopt.plan.paper import Loads, Mesh

REACH = {64: ("≤ 1.06", "≤ 1.10"), 128: ("≤ 1.06", "≤ 1.10"), 256: ("≤ 1.25", "≤ 1.35")}
OWNED = ("soap", "shampoo", "kl_shampoo")


def hidden(plan: OnPaper) -> Loads:
    """The loads of the groups that the rule itself takes."""
    return sum((loads for group, _, loads in plan.rows if f"({plan.optimizer})" in group), Loads())


def fullest(loads: Loads) -> float:
    """State bytes of the fullest rank over the mean."""
    return float(loads.state.max() / loads.state.mean())


def worst(plan: OnPaper) -> float:
    """The worst step over the median one."""
    return float(plan.steps.max() / np.median(plan.steps))


def gib(plan: OnPaper) -> str:
    """States of the fullest rank."""
    return f"{plan.total.state.max() / 2**30:.2f}"


def longest(plan: OnPaper) -> str:
    """Milliseconds of the worst step."""
    return f"{1e3 * plan.steps.max():.0f}"


def mean_of(plan: OnPaper) -> str:
    """Milliseconds of the average step."""
    return f"{1e3 * plan.seconds:.0f}"


def main() -> None:
    """Plan, print, write."""
    shapes = llama3_8b()
    model = model_of_shapes(shapes)
    total = sum(map(prod, hidden_matrices(shapes).values()))
    rows: list[list[str]] = []
    plans = []
    for ranks in REACH:
        mesh = Mesh(dp=ranks)
        muon = plan_model(model, "muon", mesh, H100, gpu=True)
        plans.append(muon)
        loads, (imbalance, numbytes) = hidden(muon), REACH[ranks]
        busiest = float(np.maximum(loads.sent, loads.received).max())
        mean = 2 * 2 * total * (ranks - 1) / ranks**2  # bf16
        assert muon.imbalance is not None
        rows.append([f"Muon, {ranks} ranks: FLOPs, busiest / mean", f"{muon.imbalance:.3f}", imbalance])
        rows.append([f"Muon, {ranks} ranks: bytes, busiest / 2P(N−1)/N²", f"{busiest / mean:.3f}", numbytes])
        step = f"{1e3 * muon.seconds:.1f} (compute {1e3 * loads.compute.max():.1f}, wire {1e3 * loads.wire.max():.1f})"
        rows.append([f"Muon, {ranks} ranks: expected step, ms", step, ""])
    for name in OWNED:
        staggered, at_once, packed = (
            plan_model(model, name, Mesh(dp=64), H100, gpu=True, precondition_frequency=10, **options)
            for options in ({}, {"synchronous": True}, {"packed": True})
        )
        plans.append(staggered)
        rows += [
            [f"{name}, 64 ranks: state, fullest × N / total", f"{fullest(staggered.total):.3f}", "≤ 1.05"],
            [f"{name}, 64 ranks: the same of hidden matrices alone", f"{fullest(hidden(staggered)):.3f}", ""],
            [f"{name}, 64 ranks: GiB on the fullest, whole; packed", f"{gib(staggered)}; {gib(packed)}", ""],
            [f"{name}, 64 ranks: FLOPs, busiest / mean", f"{staggered.imbalance:.3f}", ""],
            [f"{name}, 64 ranks: worst / median step", f"{worst(staggered):.3f}", "≤ 1.2"],
            [f"{name}, 64 ranks: the same, synchronous", f"{worst(at_once):.3f}", ""],
            [f"{name}, 64 ranks: worst step, ms; synchronous", f"{longest(staggered)}; {longest(at_once)}", ""],
            [f"{name}, 64 ranks: mean step, ms; synchronous", f"{mean_of(staggered)}; {mean_of(at_once)}", ""],
        ]
    for row in rows:
        print(*row, sep=" | ")
    columns = ["Llama-3-8B, FSDP2, on paper", "planned", "to reach"]
    records = [{key: value for key, value in plan.record().items() if key != "per_rank"} for plan in plans]
    write_result("plan_llama", {"columns": columns, "rows": rows, "plans": records})
    for ranks in REACH:
        alike = [plan for plan in plans if plan.ranks == ranks]
        draw(alike, RESULTS / f"plan_llama_{ranks}.png", f"Llama-3-8B, FSDP2 over {ranks} ranks")


if __name__ == "__main__":
    main()
