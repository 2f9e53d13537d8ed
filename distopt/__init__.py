"""distopt: sharding-aware optimizers for PyTorch.

`distopt.AdamW`, `distopt.Muon`, … are torch.optim.Optimizer classes; `distopt.create_optimizer` routes a model's
parameters to them. Importing has no side effects.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distopt.quasi_newton import DRIVERS
from distopt.rules import RULES

if TYPE_CHECKING:
    from distopt.optimizer import Optimizer

__version__ = "0.1.0.dev0"
__all__ = ["Optimizer", "averaging", "checkpoint", "create_optimizer", "layouts", "list_optimizers", "optimizer_info"]
__all__ += ["schedules", "state_bytes", "step_in_backward"]
__all__ += RULES.values()
__all__ += DRIVERS.values()


def __getattr__(name: str) -> Any:
    """Make public names when they are first asked for: `import distopt` stays cheap."""
    import importlib

    for rule, cls in RULES.items():
        if name == cls:
            from distopt.classes import optimizer_class

            globals()[name] = optimizer_class(rule)
            return globals()[name]
    if name in DRIVERS.values():
        from distopt.quasi_newton import driver_class

        return driver_class(name)
    if name in ("averaging", "checkpoint", "integrations", "layouts", "schedules"):
        return importlib.import_module(f"distopt.{name}")
    sources = {
        "Optimizer": "distopt.optimizer",
        "create_optimizer": "distopt.build",
        "step_in_backward": "distopt.backward",
        "list_optimizers": "distopt.catalog",
        "optimizer_info": "distopt.catalog",
        "state_bytes": "distopt.memory",
    }
    if name in sources:
        return getattr(importlib.import_module(sources[name]), name)
    raise AttributeError(f"module 'distopt' has no attribute {name!r}")
