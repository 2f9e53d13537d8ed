"""How many bytes per parameter does bf16 training hold, under each codec?

    OMP_NUM_THREADS=1 python -m benchmarks.state_bytes

A GPT-2 layer of width 256 and 4,096 rows of its embedding in bfloat16, one step. Counted are the storages that are
allocated afterwards: parameters, gradients, master weights, states. Hidden matrices take the rule, everything else AdamW
with the same codecs. Writes a table and a chart.
"""

from __future__ import annotations

import argparse
import warnings

import torch
from torch import Tensor

import distopt
from benchmarks.report import RESULTS, write_result
from benchmarks.shapes import gpt2_124m, hidden_matrices

RULES = {"AdamW": "adamw", "Lion": "lion", "Muon": "muon", "SOAP": "soap"}
CODECS = {"fp32": "fp32", "bf16_sr": "bits16", "int8": "bits8", "fp8": "bits8", "int4": "bits8"}
PARTS = ("parameters", "gradients", "master", "states")


def bytes_of(tensors: list[Tensor]) -> int:
    """Bytes of the storages of these tensors, each once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}
    return sum(storages.values())


def measure(rule: str, codec: str, master: str) -> tuple[dict[str, float], float]:
    """Bytes per parameter of each part, and those of states and master weights by the plan."""
    layer = {name: shape for name, shape in gpt2_124m().items() if name.startswith("transformer.h.0.")}
    shapes = {name: tuple(size // 3 for size in shape) for name, shape in layer.items()}
    shapes["transformer.wte.weight"] = (4096, 256)
    hidden = hidden_matrices(shapes)
    params = {name: torch.nn.Parameter(torch.randn(shape).bfloat16() * 0.02) for name, shape in shapes.items()}
    groups = [
        {"params": [(name, params[name]) for name in shapes if (name in hidden) == taken], "rule": name_of}
        for taken, name_of in ((True, rule), (False, rule if rule == "lion" else "adamw"))
    ]
    optimizer = distopt.AdamW(groups, lr=1e-3, state_codec=codec, master_codec=master)
    for param in params.values():
        param.grad = torch.randn_like(param)
    optimizer.step()
    states: list[Tensor] = []
    rests: list[Tensor] = []
    for group in optimizer._bind().groups:
        states += [value for window in group.windows for value in window.state.values()]
        for bucket in getattr(group, "buckets", []):
            states += [value for slabs in (*bucket.slabs, *bucket.owned_slabs) for value in slabs.tensors.values()]
        stores = [store for unit in group.units.units for store in unit.stores.values()]
        for store in (*stores, *group.units.owned.values()):
            states += [store.stored, store.scales]
        rests += [unit.rest for unit in group.units.units if unit.rest is not None]
    numel = sum(param.numel() for param in params.values())
    parts = {
        "parameters": bytes_of(list(params.values())),
        "gradients": bytes_of([param.grad for param in params.values() if param.grad is not None]),
        "master": bytes_of(rests),
        "states": bytes_of(states),
    }
    return {name: value / numel for name, value in parts.items()}, optimizer.plan.summary()["state_bytes"] / numel


def chart(found: dict[tuple[str, str], dict[str, float]]) -> None:
    """A bar per rule and codec, stacked by what the bytes are for."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 4.2))
    colors = dict(zip(PARTS, ("#4c72b0", "#dd8452", "#8172b3", "#55a868")))
    positions = [i + i // len(CODECS) * 0.7 for i in range(len(found))]
    bottom = [0.0] * len(found)
    for part in PARTS:
        heights = [value[part] for value in found.values()]
        axes.bar(positions, heights, bottom=bottom, color=colors[part], label=part, width=0.85)
        bottom = [low + height for low, height in zip(bottom, heights)]
    for position, total in zip(positions, bottom):
        axes.text(position, total + 0.3, f"{total:.1f}", ha="center", fontsize=8)
    labels = [f"{codec}\n{CODECS[codec]}" for _, codec in found]
    axes.set_xticks(positions, labels, fontsize=6.5)
    for number, rule in enumerate(RULES):
        axes.text(positions[number * len(CODECS) + 2], max(bottom) * 1.12, rule, ha="center", fontsize=11)
    axes.set_ylim(0, max(bottom) * 1.22)
    axes.set_ylabel("bytes per parameter")
    axes.set_xlabel("state codec, master codec")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, frameon=False)
    figure.tight_layout()
    figure.savefig(RESULTS / "state_bytes.png", dpi=150)


def main() -> None:
    """Measure, write the table and draw the chart."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    warnings.simplefilter("ignore")
    found: dict[tuple[str, str], dict[str, float]] = {}
    rows: list[list[object]] = []
    for title, rule in RULES.items():
        for codec, master in CODECS.items():
            parts, planned = measure(rule, codec, "fp32" if codec == "fp32" else master)
            found[title, codec] = parts
            held = parts["master"] + parts["states"]
            rows.append(
                [title, codec, "fp32" if codec == "fp32" else master]
                + [f"{parts[name]:.3f}" for name in PARTS]
                + [f"{sum(parts.values()):.3f}", "≤ 7.1" if (title, codec) == ("AdamW", "int8") else None]
            )
            assert abs(held - planned) < 1e-3, (title, codec, held, planned)
            print(*rows[-1], sep=" | ")
    columns = ["rule", "state codec", "master codec", *PARTS, "all, bytes per parameter", "to reach"]
    note = "Storages allocated after one step in bfloat16; equal to the plan's bytes within 0.001."
    write_result("state_bytes", {"columns": columns, "rows": rows, "note": note})
    chart(found)


if __name__ == "__main__":
    main()
