"""The house: which part of the package may import which, and what `import distopt` may do.

The arrows are read from the source, imports inside functions and for type checking included. A module that is not in
`LEVELS` fails: give it a place.
"""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cases import collect

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "distopt"

# A part imports only from the lines below its own.
LEVELS: list[set[str]] = [
    {"integrations", "launch", "__init__", "__main__"},
    {"cli", "memory"},
    {"backward", "build", "catalog", "checkpoint"},
    {"averaging", "classes", "quasi_newton"},
    {"optimizer", "fused"},
    {"modes", "observation", "options", "vanishing"},
    {"bound"},
    {"settings"},
    {"agreement", "engine", "elementwise"},
    {"bucket", "coded_step", "deferred"},
    {"verdict"},
    {"state"},
    {"comm", "kernels"},
    {"plan"},  # data, which the two lines above read and never make
    {"layouts", "rules"},
    {"matrix", "names", "rule", "schedules"},
]
LEVEL = {part: level for level, parts in enumerate(LEVELS) for part in parts}
# What the package may import from outside, and the parts that may import more.
THIRD_PARTY = {"torch", "numpy", "safetensors"}
EXTRA = {
    "kernels": {"triton"},
    "matrix": {"triton"},
    "integrations": {"transformers", "accelerate", "deepspeed"},
    "cli": {"transformers", "matplotlib"},
}
# Words of layouts and meshes, which rules do not know.
LAYOUT_WORDS = [
    "dtensor",
    "fsdp",
    "ddp",
    "hsdp",
    "shard",
    "replicat",
    "mesh",
    "world_size",
    "process_group",
    "all_reduce",
]


def sources(*parts: str) -> list[Path]:
    """The Python files of some parts of the package; of all of it by default."""
    files = sorted(PACKAGE.rglob("*.py"))
    return [file for file in files if not parts or part_of(file) in parts]


def part_of(file: Path) -> str:
    """The first name below the package, or `launch`."""
    if file.is_relative_to(ROOT / "launch"):
        return "launch"
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of everything that a file imports; `from a import b` is a.b."""
    package = file.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, [base, node.module or ""]))
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def words(file: Path) -> Iterator[tuple[int, str]]:
    """Line and text of every name and every string of a file that can be code: comments, docstrings and messages, which
    are strings with a space, are free."""
    tree = ast.parse(file.read_text())
    documentation = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        for field in ("id", "attr", "name", "arg", "module", "asname"):
            text = getattr(node, field, None)
            if isinstance(text, str):
                yield getattr(node, "lineno", 0), text
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            if " " in node.value.strip():
                continue
            yield node.lineno, node.value


def mentions(files: list[Path], names: list[str]) -> list[str]:
    """Where a name begins a word, in any capitals."""
    pattern = re.compile(rf"(?<![a-z])({'|'.join(names)})", re.IGNORECASE)
    return [
        f"{file.relative_to(ROOT)}:{line}: {text}"
        for file in files
        for line, text in words(file)
        if pattern.search(text)
    ]


def test_arrows_point_one_way() -> None:
    wrong = []
    for file in [*sources(), *(ROOT / "launch").glob("*.py")]:
        part = part_of(file)
        assert part in LEVEL, f"{file.relative_to(ROOT)}: give {part!r} a place in LEVELS"
        for line, name in imports(file):
            top, _, rest = name.partition(".")
            if top == "distopt" and part != "launch":
                target = rest.partition(".")[0]
                if target != part and LEVEL.get(target, -1) <= LEVEL[part]:
                    wrong.append(f"{file.relative_to(ROOT)}:{line}: {part} imports {name}")
            elif top in ("launch", "tests", "benchmarks") and part != "launch":
                wrong.append(f"{file.relative_to(ROOT)}:{line}: the package imports {name}")
    assert not wrong, "\n".join(wrong)


def test_package_depends_on_torch_numpy_and_safetensors_only() -> None:
    wrong = [
        f"{file.relative_to(ROOT)}:{line}: {name}"
        for file in sources()
        for line, name in imports(file)
        if name.partition(".")[0] not in sys.stdlib_module_names | THIRD_PARTY | {"distopt"}
        and name.partition(".")[0] not in EXTRA.get(part_of(file), set())
    ]
    assert not wrong, "\n".join(wrong)


def test_mathematics_knows_no_ranks() -> None:
    files = sources("rules", "matrix", "rule")
    assert files
    wrong = []
    for file in files:
        wrong += [f"{file.name}:{line}: {name}" for line, name in imports(file) if "torch.distributed" in name]
        tree = ast.parse(file.read_text())
        wrong += [
            f"{file.name}:{node.lineno}: torch.distributed"
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute)
            and node.attr == "distributed"
            and isinstance(node.value, ast.Name)
            and node.value.id == "torch"
        ]
    assert not wrong, "\n".join(wrong)


def test_engine_parts_name_no_rule() -> None:
    names = {case.optimizer.lower() for case in collect().values()}
    names |= {file.stem for file in sources("rules") if file.stem != "__init__"}
    files = sources("comm", "plan", "layouts")
    assert files
    assert not (found := mentions(files, sorted(names))), "\n".join(found)


def test_rules_name_no_layout() -> None:
    assert not (found := mentions(sources("rules", "rule"), LAYOUT_WORDS)), "\n".join(found)


@pytest.mark.parametrize(
    ("code", "name", "found"),
    [
        ("if rule == 'muon': pass", "muon", True),
        ("use_muon = 1", "muon", True),
        ("class MuonPlan: ...", "muon", True),
        ("from distopt.rules import Muon as M", "muon", True),
        ("def f():\n    'Muon'\n    # muon", "muon", False),
        ("raise ValueError('a matrix for Muon')", "muon", False),
        ("million = 10**6", "lion", False),
    ],
)
def test_mentions_are_found_in_code_and_not_in_prose(code: str, name: str, found: bool, tmp_path: Path) -> None:
    file = tmp_path / "code.py"
    file.write_text(code)
    pattern = re.compile(rf"(?<![a-z]){name}", re.IGNORECASE)
    assert any(pattern.search(text) for _, text in words(file)) == found


PROBE = """
import json, os, random, sys, threading, warnings
import numpy, torch
before = (dict(os.environ), torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(),
          torch.random.get_rng_state().tolist(), random.getstate(), list(warnings.filters), threading.active_count())
had = set(sys.modules)
import distopt
after = (dict(os.environ), torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(),
         torch.random.get_rng_state().tolist(), random.getstate(), list(warnings.filters), threading.active_count())
print(json.dumps({
    "new": sorted({name.partition(".")[0] for name in set(sys.modules) - had}),
    "changed": [i for i, (a, b) in enumerate(zip(before, after)) if a != b],
    "cuda": torch.cuda.is_initialized(),
    "group": torch.distributed.is_available() and torch.distributed.is_initialized(),
    "file": distopt.__file__,
}))
"""


def test_import_has_no_side_effects() -> None:
    done = subprocess.run([sys.executable, "-c", PROBE], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    [line] = done.stdout.splitlines()
    report = json.loads(line)
    assert report["file"] == str(PACKAGE / "__init__.py")
    assert report["changed"] == []
    assert not report["cuda"]
    assert not report["group"]
    heavy = {
        "transformers",
        "deepspeed",
        "accelerate",
        "triton",
        "bitsandbytes",
        "jsonargparse",
        "matplotlib",
        "datasets",
    }
    assert not heavy & set(report["new"])
