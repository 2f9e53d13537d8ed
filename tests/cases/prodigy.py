"""Prodigy against prodigyopt's and the naive reference."""

from prodigyopt import Prodigy

from tests.cases import SUMS, Case, Oracle, against
from tests.references.prodigy import prodigy

VARIANTS = {
    "default": {"d0": 1e-3},
    "all": {"d0": 1e-3, "weight_decay": 0.1, "use_bias_correction": True, "safeguard_warmup": True, "d_coef": 0.8},
    "slow": {"d0": 1e-3, "growth_rate": 1.5, "betas": (0.8, 0.95), "beta3": 0.9},
}

CASE = Case(
    optimizer="Prodigy",
    variants=VARIANTS,
    oracles=(
        Oracle(name="reference", run=prodigy, rel=2e-6, why="float32 sums and rounding"),
        against(Prodigy, rel=2e-6, why="same formula"),
    ),
    alone=True,
    sharded=SUMS,
)
