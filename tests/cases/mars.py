"""MARS against the naive reference. pytorch_optimizer's is no oracle: it adds 1e-15 under the root and eps before the
bias correction, which is 4e-4 away."""

from tests.cases import SUMS, Case, Oracle
from tests.references.mars import mars

CASE = Case(
    optimizer="MARS",
    variants={
        "default": {},
        "vectors": {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1, "gamma": 0.1, "optimize_1d": True},
        "amsgrad": {"lr": 0.01, "amsgrad": True, "betas_1d": (0.8, 0.9)},
    },
    oracles=(Oracle(name="reference", run=mars, rel=2e-6, why="float32 rounding of the weights, 3e-7 measured"),),
    sharded=SUMS,
)
