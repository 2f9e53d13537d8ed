"""Sophia-H against pytorch_optimizer's and the naive reference."""

from functools import partial

from tests.cases import ELEMENTWISE, Case, Oracle, Package
from tests.references import packages
from tests.references.sophia import sophia

AUTHORS = {"betas": (0.96, 0.99), "rho": 0.01, "bs": 1, "squared": False}

CASE = Case(
    optimizer="SophiaH",
    observes="hessian",
    variants={"mixed": {"lr": 0.01, "rho": 0.5, "betas": (0.9, 0.8)}, "default": {"lr": 1e-3}},
    oracles=(
        Oracle(name="reference", run=partial(sophia, **AUTHORS), rel=2e-6, why="float32 rounding of the weights"),
        Package(
            name="pytorch_optimizer",
            run=packages.sophia_h,
            rel=2e-6,
            why="order of operations",
        ),
    ),
    sharded=ELEMENTWISE,
)
