"""LAMB against the naive reference; no public implementation in reach computes this variant."""

from tests.cases import SUMS, Case, Oracle
from tests.references.lamb import lamb

CASE = Case(
    optimizer="LAMB",
    variants={
        "default": {"lr": 0.01},
        "betas": {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.1},
        "no_decay": {"lr": 0.01, "weight_decay": 0.0},
    },
    oracles=(Oracle(name="reference", run=lamb, rel=5e-6, why="float32 rounding of the weights, 1.6e-6 measured"),),
    sharded=SUMS,
)
