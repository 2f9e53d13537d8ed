"""The command line: `distopt plan` and `distopt calibrate` (or `python -m distopt …`)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command. What a user got wrong ends it with a message and status 2."""
    from distopt.cli import calibrate, plan

    parser = argparse.ArgumentParser(prog="distopt", description="Sharding-aware optimizers: plans and measurements.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    plan.add_command(commands)
    calibrate.add_command(commands)
    known, rest = parser.parse_known_args(arguments)
    try:
        known.run(known, rest)
    except (ValueError, TypeError, OSError, ImportError) as error:
        sys.exit(f"distopt {known.command}: {error}")
