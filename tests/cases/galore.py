"""GaLore against galore_torch, where no sign of a singular vector matters, and the naive reference."""

from tests.cases import AMPLIFYING, Case, Oracle
from tests.references.galore import galore
from tests.references.packages import galore_torch
from tests.references.where import one_matrix

CASE = Case(
    optimizer="GaLore",
    variants={
        "low_rank": {"lr": 0.01, "rank": 3, "betas": (0.8, 0.95), "weight_decay": 0.1, "synchronous": True},
        "default": {"synchronous": True},
        "refreshed": {"lr": 0.01, "rank": 4, "update_proj_gap": 3, "scale": 1.0, "synchronous": True},
    },
    oracles=(
        Oracle(name="reference", run=galore, rel=1e-3, why="singular vectors amplify float32 rounding by their gaps"),
        Oracle(
            name="galore_torch",
            run=galore_torch,
            variants=("low_rank", "default"),
            where=one_matrix,
            rel=1e-3,
            why="its singular vectors are float32 whatever it is given; after a refresh their signs matter",
        ),
    ),
    sharded=AMPLIFYING,
)
