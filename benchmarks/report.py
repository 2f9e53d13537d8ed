"""Results of benchmarks: written as JSON by the benchmarks, read into the README by this.

    python -m benchmarks.report            # fills in every marked table of README.md
    python -m benchmarks.report --check    # exits with 1 if a table there is not what results/ says

A table stands between `<!-- benchmark:NAME -->` and `<!-- /benchmark:NAME -->`, where benchmarks/results/NAME.json has
the result. A marker without a result is an error; a result without a marker is not.
"""

import argparse
import json
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"


def write_result(name: str, result: dict[str, Any]) -> Path:
    """Writes benchmarks/results/<name>.json, with what it was measured on beside it.

    Args:
        name: the benchmark's, and the marker's in the README.
        result: JSON values. "columns" (names) and "rows" (lists of cells, as many as columns) become the table;
            "note" (optional) one sentence under it; anything else is for readers of the JSON.

    Raises:
        ValueError: when a row has more or fewer cells than there are columns.
    """
    for row in result["rows"]:
        if len(row) != len(result["columns"]):
            raise ValueError(f"{name}: row {row} has {len(row)} cells for {len(result['columns'])} columns")
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"environment": environment(), **result}, indent=1, ensure_ascii=False) + "\n")
    return path


def environment() -> dict[str, Any]:
    """Versions, devices and threads of this process."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def table(result: dict[str, Any]) -> str:
    """The Markdown of one result: the table, its note, and what it was measured on."""
    lines = ["| " + " | ".join(result["columns"]) + " |", "|" + " --- |" * len(result["columns"])]
    lines += ["| " + " | ".join(_cell(value) for value in row) + " |" for row in result["rows"]]
    made = result["environment"]
    device = made["gpu"] or f"{made['cpu']}, {made['threads']} of {made['cores']} cores"
    note = result.get("note", "")
    return "\n".join(lines) + f"\n\n{note}{' ' if note else ''}Measured with torch {made['torch']} on {device}.\n"


def fill(text: str, results: Path = RESULTS) -> str:
    """`text` with every marked table made anew from `results`.

    Raises:
        FileNotFoundError: for a marker without a result.
    """

    def insert(match: re.Match[str]) -> str:
        result = json.loads((results / f"{match['name']}.json").read_text())
        return f"{match['open']}\n{table(result)}{match['close']}"

    marked = r"(?P<open><!-- benchmark:(?P<name>[\w-]+) -->)\n.*?(?P<close><!-- /benchmark:(?P=name) -->)"
    return re.sub(marked, insert, text, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description="Fills the README's benchmark tables from benchmarks/results.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a table is out of date")
    arguments = parser.parse_args()
    text = README.read_text()
    filled = fill(text)
    if arguments.check:
        sys.exit(int(filled != text))
    README.write_text(filled)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _cpu_name() -> str:
    try:
        names: list[str] = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:  # not Linux
        names = []
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()
