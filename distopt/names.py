"""Fully qualified names of parameters, whatever wraps the model."""

from __future__ import annotations

from typing import Any

PREFIXES = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "module"}


def parameter_names(groups: list[dict[str, Any]]) -> list[str]:
    """Fully qualified names, without the prefixes that wrappers add; positional ones for bare tensors.

    Raises:
        ValueError: two parameters have the same name.
    """
    names = []
    for g, group in enumerate(groups):
        given = group.get("param_names")
        names += [strip_prefixes(n) for n in given] if given else [f"{g}.{i}" for i in range(len(group["params"]))]
    if len(set(names)) != len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"several parameters are called {twice[0]!r}")
    return names


def strip_prefixes(name: str) -> str:
    """A fully qualified name without the components that torch.compile, DDP and wrappers insert.

    "module" is only dropped at the front, where DDP puts it: a model may have a submodule of that name.
    """
    parts = name.split(".")
    while parts and parts[0] in PREFIXES and len(parts) > 1:
        parts = parts[1:]
    return ".".join(part for part in parts if part not in PREFIXES - {"module"})


def strip_groups(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups with the names of their parameters, where they have names, without prefixes."""
    return [
        {**group, "param_names": [strip_prefixes(name) for name in group["param_names"]]}
        if group.get("param_names")
        else group
        for group in groups
    ]
