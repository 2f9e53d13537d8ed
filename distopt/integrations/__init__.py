"""Trainers that people already use: `transformers` (the Trainer), `accelerate` and `deepspeed`. Each module begins with the page
that says what to write and what is and is not supported there, imports its trainer, an optional dependency, and says what
to install where that is missing. They are made when they are first asked for.
"""

from __future__ import annotations

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    """Import `distopt.integrations.<name>` when it is first asked for: `import distopt` is all that a script needs."""
    if name.startswith("_"):
        raise AttributeError(name)
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        if error.name == f"{__name__}.{name}":
            raise AttributeError(f"distopt.integrations has no module {name!r}") from None
        raise
