"""How many bytes per parameter does bf16 training hold, under each codec?

    OMP_NUM_THREADS=1 python -m benchmarks.state_bytes

A GPT-2 layer of width 256 and 4,096 rows of its embedding in bfloat16, one step. Counted are the storages that are
allocated afterwards: parameters, gradients, master weights, states. Hidden matrices take the rule, everything else AdamW
with the same codecs.

With gradient release (`distopt.step_in_backward`) AdamW steps 24 such layers in a backward pass, and gradients are the
most bytes of them that are there at once, looked at whenever one arrives: with no clipping, and with clipping to a global
norm, which takes two passes. Once without and once with an embedding of 4,096 rows, since the largest parameter decides.
Writes a table and a chart.
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
PARTS = ("parameters", "gradients", "master", "states", "pages")
"""What bytes are for; pages are those of offloaded states that are on the device."""
LAYERS, WIDTH, ROWS = 24, 256, 4096
RELEASED = {
    "AdamW, gradients released": (False, False),
    "AdamW, released, clipped": (False, True),
    "AdamW, released, with embedding": (True, False),
    "AdamW, released, clipped, with embedding": (True, True),
}
"""Title → (embedding, clipping)."""


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
    live = sum(bytes_of([param.grad]) for param in params.values() if param.grad is not None)
    return per_parameter(optimizer, list(params.values()), live)


def per_parameter(
    optimizer: distopt.Optimizer, params: list[torch.nn.Parameter], gradients: int
) -> tuple[dict[str, float], float]:
    """Bytes per parameter of each part, and those of states and master weights by the plan."""
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
    parts = {
        "parameters": bytes_of(list(params)),
        "gradients": gradients,
        "master": bytes_of(rests),
        "states": bytes_of(states),
        "pages": 0,
    }
    numel = sum(param.numel() for param in params)
    return {name: value / numel for name, value in parts.items()}, optimizer.plan.summary()["state_bytes"] / numel


class Layers(torch.nn.Module):
    """The matrices of a GPT-2 and an embedding, without its attention."""

    def __init__(self, embedding: bool) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(ROWS, WIDTH) if embedding else None
        shapes = ((WIDTH, 3 * WIDTH), (WIDTH, WIDTH), (WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH))
        self.layers = torch.nn.ModuleList(
            torch.nn.ModuleList(torch.nn.Linear(*shape, bias=False) for shape in shapes) for _ in range(LAYERS)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """A number."""
        x = self.embedding(tokens) if self.embedding is not None else torch.ones(len(tokens), WIDTH).bfloat16()
        for qkv, out, up, down in self.layers:
            x = x + out(qkv(x)[..., :WIDTH])
            x = x + down(torch.relu(up(x)))
        return x.float().square().mean()


def measure_released(codec: str, master: str, embedding: bool, clipped: bool) -> tuple[dict[str, float], float]:
    """As `measure`, where gradients are the most that there was of them at once in two steps."""
    torch.manual_seed(0)
    model = Layers(embedding).bfloat16()
    params = list(model.parameters())
    optimizer = distopt.create_optimizer(
        "adamw",
        model,
        lr=1e-4,
        state_codec=codec,
        master_codec=master,
        max_grad_norm=1.0 if clipped else None,
        nonfinite="raise" if clipped else None,
    )
    most = 0

    def look(_: Tensor) -> None:
        nonlocal most
        most = max(most, bytes_of([param.grad for param in params if param.grad is not None]))

    for param in params:  # before those that step: they see what has arrived
        param.register_post_accumulate_grad_hook(look)
    stepper = distopt.step_in_backward(model, optimizer, two_pass=clipped)
    before = [param.detach().clone() for param in params]
    for _ in range(2):
        for _ in stepper.passes() if clipped else (0,):
            model(torch.arange(64)).backward()
        optimizer.step()
    assert not any(map(torch.equal, before, params)), "every parameter was stepped"
    return per_parameter(optimizer, params, most)


def chart(found: dict[tuple[str, str], dict[str, float]]) -> None:
    """A bar per rule and codec, stacked by what the bytes are for."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(11, 4.4))
    colors = dict(zip(PARTS, ("#4c72b0", "#dd8452", "#8172b3", "#55a868", "#937860")))
    titles = list(dict.fromkeys(title for title, _ in found))
    positions = [i + titles.index(title) * 0.7 for i, (title, _) in enumerate(found)]
    bottom = [0.0] * len(found)
    for part in PARTS:
        heights = [value[part] for value in found.values()]
        axes.bar(positions, heights, bottom=bottom, color=colors[part], label=part, width=0.85)
        bottom = [low + height for low, height in zip(bottom, heights)]
    for position, total in zip(positions, bottom):
        axes.text(position, total + 0.3, f"{total:.1f}", ha="center", fontsize=7)
    labels = [f"{codec}\n{CODECS[codec]}" for _, codec in found]
    axes.set_xticks(positions, labels, fontsize=5.5)
    for number, title in enumerate(titles):
        middle = positions[number * len(CODECS) + 2]
        axes.text(middle, max(bottom) * 1.12, title.replace(", ", ",\n", 1), ha="center", va="center", fontsize=9)
    axes.set_ylim(0, max(bottom) * 1.22)
    axes.set_ylabel("bytes per parameter")
    axes.set_xlabel("state codec, master codec")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=5, frameon=False)
    figure.tight_layout()
    figure.savefig(RESULTS / "state_bytes.png", dpi=150)


def main() -> None:
    """Measure, write the table and draw the chart."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    warnings.simplefilter("ignore")
    found: dict[tuple[str, str], dict[str, float]] = {}
    rows: list[list[object]] = []

    def add(title: str, codec: str, reach: str | None, measured: tuple[dict[str, float], float]) -> None:
        parts, planned = measured
        found[title, codec] = parts
        held = parts["master"] + parts["states"]
        assert abs(held - planned) < 1e-3, (title, codec, held, planned)
        rows.append([title, codec, CODECS[codec], *(f"{parts[name]:.3f}" for name in PARTS)])
        rows[-1] += [f"{sum(parts.values()):.3f}", reach]
        print(*rows[-1], sep=" | ", flush=True)

    for title, rule in RULES.items():
        for codec, master in CODECS.items():
            add(title, codec, "≤ 7.1" if (title, codec) == ("AdamW", "int8") else None, measure(rule, codec, master))
    for title, (embedding, clipped) in RELEASED.items():
        for codec, master in CODECS.items():
            reach = "≤ 5.1" if codec == "int8" and not clipped else None
            add(title, codec, reach, measure_released(codec, master, embedding, clipped))
    columns = ["rule", "state codec", "master codec", *PARTS, "all, bytes per parameter", "to reach"]
    note = (
        "Storages allocated after one step in bfloat16; equal to the plan's bytes within 0.001. Released gradients: the most "
        f"at once in a backward pass, which is the largest parameter's ({LAYERS} layers of width {WIDTH}; the embedding has "
        f"{ROWS:,} rows). Clipping costs a second backward pass and no bytes. Pages: none of this is offloaded."
    )
    write_result("state_bytes", {"columns": columns, "rows": rows, "note": note})
    chart({key: parts for key, parts in found.items() if "clipped" not in key[0]})


if __name__ == "__main__":
    main()
