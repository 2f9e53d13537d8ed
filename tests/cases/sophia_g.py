"""Sophia-G against the naive reference."""

from tests.cases import ELEMENTWISE, Case, Oracle
from tests.references.sophia import sophia

CASE = Case(
    optimizer="SophiaG",
    observes="hessian",
    variants={
        "mixed": {"lr": 0.01, "rho": 0.1, "bs": 40.0, "betas": (0.9, 0.8), "weight_decay": 0.1},
        "default": {"lr": 0.1},
        "unclipped": {"lr": 0.01, "rho": 1.0, "bs": 50.0},
    },
    oracles=(Oracle(name="reference", run=sophia, rel=2e-6, why="float32 rounding of the weights"),),
    sharded=ELEMENTWISE,
)
