"""Quasi-Newton methods: optimizers that see all parameters as one vector. The table: one line each.

They are no rules: a rule is handed a gradient, these evaluate the loss where they like. They run on any layout all the same,
on local vectors and reduced dot products.
"""

from __future__ import annotations

import importlib
from typing import Any

DRIVERS = {
    "lbfgs": "LBFGS",
    "stochastic_lbfgs": "StochasticLBFGS",
    "ml_bfgs": "MLBFGS",
    "bfgs": "BFGS",
    "sr1": "SR1",
}
"""Name → class."""
_MODULES = {"LBFGS": "lbfgs", "BFGS": "lbfgs", "StochasticLBFGS": "stochastic", "MLBFGS": "stochastic", "SR1": "sr1"}


def driver_class(cls: str) -> Any:
    """The class of this name, which is imported when it is first asked for."""
    return getattr(importlib.import_module(f"distopt.quasi_newton.{_MODULES[cls]}"), cls)
