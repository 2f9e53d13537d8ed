"""Prodigy against prodigyopt's and the naive reference."""

from prodigyopt import Prodigy

from tests.cases import Case, Oracle, Package, public
from tests.references.prodigy import prodigy

VARIANTS = {
    "default": {"d0": 1e-3},
    "all": {"d0": 1e-3, "weight_decay": 0.1, "use_bias_correction": True, "safeguard_warmup": True, "d_coef": 0.8},
    "slow": {"d0": 1e-3, "growth_rate": 1.5, "betas": (0.8, 0.95), "beta3": 0.9},
}

CASE = Case(
    optimizer="Prodigy",
    ndims=frozenset({0, 1, 2, 3}),
    variants=VARIANTS,
    oracles=(
        Oracle(name="reference", run=prodigy, rel=2e-6, why="float32 sums and rounding"),
        Package(name="package", run=public(Prodigy), rel=2e-6, why="same formula"),
    ),
    alone=True,
    sharded=1e-6,
    sharded_why="sums in another order",
)
