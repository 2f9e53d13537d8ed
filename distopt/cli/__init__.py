"""The command line: `distopt plan` and `distopt calibrate` (or `python -m distopt …`)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """Refuses abbreviations, and says in one line what is wrong, which option was meant and where help is."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)
        self.words: list[str] = []

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, remembering the words for `error`."""
        self.words = list(args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Raise ValueError."""
        known = [option for option in self._option_string_actions if option.startswith("--")]
        given = [word.partition("=")[0] for word in self.words if word.startswith("--") and "." not in word]
        for word in given:
            near = get_close_matches(word, known, n=1)
            if word not in known and near:
                message = f"{message} ({word}: did you mean {near[0]}?)"
        raise ValueError(f"{message}; `{self.prog} --help` explains")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command. What a user got wrong ends it with a message and status 1."""
    from distopt.cli import calibrate, plan

    parser = Parser(prog="distopt", description="Sharding-aware optimizers: plans and measurements.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    plan.add_command(commands)
    calibrate.add_command(commands)
    words = sys.argv[1:] if arguments is None else arguments
    try:
        known, rest = parser.parse_known_args(words)
        known.run(known, rest)
    except (ValueError, TypeError, OSError, ImportError) as error:
        sys.exit(f"{' '.join(['distopt', *words[:1]])}: {error}")
