"""AdaLomo against pytorch_optimizer's and the naive reference."""

from tests.cases import SUMS, Case, Oracle
from tests.references.adalomo import adalomo
from tests.references.packages import fused_adalomo
from tests.references.where import one_matrix

CASE = Case(
    optimizer="AdaLomo",
    variants={
        "default": {"lr": 0.02},
        "decay": {"lr": 0.05, "weight_decay": 0.1, "decay_rate": -0.5, "clip_threshold": 0.7},
        "eps": {"lr": 0.01, "eps": (1e-6, 0.1)},
    },
    oracles=(
        Oracle(name="reference", run=adalomo, rel=2e-6, why="float32 rounding of the weights"),
        Oracle(
            name="pytorch_optimizer",
            run=fused_adalomo,
            where=one_matrix,
            rel=2e-6,
            why="order of sums; its arithmetic is float32 whatever it is given",
        ),
    ),
    sharded=SUMS,
)
