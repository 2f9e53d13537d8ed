"""What does each rule keep, in bytes per parameter of a Llama 3 8B, and what was published?

    python -m benchmarks.state_table

By formula (`distopt.state_bytes`), on shapes alone, with every rule's default options, as `create_optimizer` routes: a
matrix rule takes the hidden matrices, AdamW embedding, head and norms. `hidden` is the same for the hidden matrices
alone, which is what papers usually count. int8 is `state_codec="int8"`, where it makes a difference.
"""

from __future__ import annotations

import argparse
from math import prod

import distopt
from benchmarks.report import write_result
from benchmarks.shapes import hidden_matrices, llama3_8b
from distopt.quasi_newton import DRIVERS
from distopt.rules import RULES

PUBLISHED = {
    "adamw": (
        "12 (ZeRO, arXiv 1910.02054); int8: 2.03 (bitsandbytes)",
        "the 12 have 4 for fp32 master weights; bitsandbytes has blocks of 256, here they are 128",
    ),
    "lion": ("half of AdamW's (arXiv 2302.06675)", "as published"),
    "adafactor": ("rows + columns (arXiv 1804.04235)", "as published, without the optional first moment"),
    "sm3": ("rows + columns (arXiv 1901.11150)", "as published with momentum 0; the paper's runs have 0.9, which is 4 more"),
    "came": ("Adafactor's (arXiv 2307.02047)", "of an Adafactor with a first moment: that alone is 4"),
    "adam_mini": ("45–50 % less than AdamW (arXiv 2406.16793)", "as published"),
    "galore": ("up to 65.5 % less than AdamW (arXiv 2403.03507)", "depends on rank over width; embedding and head stay AdamW's"),
    "apollo_mini": ("SGD's (arXiv 2412.05270)", "of the hidden matrices; embedding and head keep AdamW's 8, which is all of it"),
    "muon": ("half of AdamW's (arXiv 2502.16982)", "of the hidden matrices; the rest is AdamW"),
    "soap": (
        "2m² + 2n² + 3mn numbers (arXiv 2409.11321)",
        "one mn of it is the gradient; a side longer than 10,000 keeps no basis here, as in the authors' code",
    ),
    "lomo": ("0 (arXiv 2306.09782)", "as published; it is the gradients that step-in-backward saves"),
    "adalomo": ("rows + columns (arXiv 2310.10195)", "as published"),
}  # fmt: skip
"""Rule → (what was published, where that errs or what it leaves out)."""


def main() -> None:
    """Compute and write the result."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    shapes = llama3_8b()
    hidden = hidden_matrices(shapes)
    numel, hidden_numel = sum(map(prod, shapes.values())), sum(map(prod, hidden.values()))
    rows = []
    for name in RULES:
        plain = distopt.state_bytes(name, shapes)
        coded = distopt.state_bytes(name, shapes, state_codec="int8")
        alone = distopt.state_bytes(name, hidden) / hidden_numel
        published, remark = PUBLISHED.get(name, (None, None))
        int8 = f"{coded / numel:.4g}" if coded != plain else None
        rows.append([name, f"{plain / numel:.4g}", f"{alone:.4g}", int8, published, remark])
        print(*rows[-1], sep=" | ", flush=True)
    for name in DRIVERS:
        history = distopt.optimizer_info(name).defaults.get("history_size")
        try:
            found, remark = f"{distopt.state_bytes(name, shapes) / numel:.4g}", f"history_size {history}"
        except ValueError:
            found, remark = None, "refused: it keeps a matrix of all parameters, at most 2,048"
        rows.append([name, found, None, None, None, remark])
        print(*rows[-1], sep=" | ", flush=True)
    columns = ["rule", "fp32", "hidden", "int8", "published", "where that errs"]
    note = "Bytes of state per parameter of Llama 3 8B, by formula; weights, gradients and master weights not counted."
    write_result("state_table", {"columns": columns, "rows": rows, "note": note, "parameters": numel})


if __name__ == "__main__":
    main()
