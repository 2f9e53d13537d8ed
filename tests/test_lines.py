"""What a rule costs in lines: at most 120 of rule, one in the table, at most 30 of case.

The list: `python -m tests.test_lines`.
"""

from pathlib import Path

import pytest

from distopt.rules import RULES

ROOT = Path(__file__).parents[1]
MOST_OF_RULE, MOST_OF_CASE = 120, 30


def lines(name: str) -> dict[str, int]:
    """Lines of a rule's file, of the table that names it, and of its case."""
    table = (ROOT / "distopt/rules/__init__.py").read_text().splitlines()
    return {
        "rule": _count(ROOT / f"distopt/rules/{name}.py"),
        "table": sum(f'"{name}"' in line for line in table),
        "case": _count(ROOT / f"tests/cases/{name}.py"),
    }


def _count(path: Path) -> int:
    return len(path.read_text().splitlines())


@pytest.mark.parametrize("name", RULES)
def test_a_rule_is_one_short_file_one_line_in_the_table_and_one_short_case(name: str) -> None:
    found = lines(name)
    assert found["rule"] <= MOST_OF_RULE
    assert found["table"] == 1
    assert found["case"] <= MOST_OF_CASE


def test_no_rule_is_named_outside_its_file_and_the_table() -> None:
    """What it takes to have a rule: nothing in the parts that serve all of them knows its name or class."""
    serving = [
        path
        for folder in ("plan", "comm", "layouts", "state", "matrix")
        for path in (ROOT / "distopt" / folder).rglob("*.py")
    ] + [ROOT / f"distopt/{name}.py" for name in ("engine", "elementwise", "bound", "verdict")]
    for path in serving:
        text = path.read_text()
        named = [name for name, cls in RULES.items() if f'"{name}"' in text or f"import {cls}\n" in text]
        assert not named, f"{path} names {named}"


if __name__ == "__main__":
    print(f"{'':24}{'rule':>6}{'table':>7}{'case':>6}")
    for rule in RULES:
        print(f"{rule:24}{lines(rule)['rule']:6}{lines(rule)['table']:7}{lines(rule)['case']:6}")
