"""CAME against came_pytorch and the naive reference."""

from came_pytorch import CAME  # type: ignore[import-untyped]

from tests.cases import SUMS, Case, Oracle, against
from tests.references.came import came
from tests.references.where import filled

CASE = Case(
    optimizer="CAME",
    variants={
        "default": {"lr": 2e-4},
        "decay": {"lr": 0.01, "betas": (0.8, 0.95, 0.99), "weight_decay": 0.1, "clip_threshold": 0.7},
        "eps": {"lr": 0.01, "eps": (1e-6, 1e-4)},
    },
    oracles=(
        Oracle(name="reference", run=came, rel=1e-5, why="vectors at lr 2e-4: 7.1e-6, the reference in float32 7.6e-6"),
        against(CAME, where=filled, rel=2e-6, why="order of sums"),
    ),
    sharded=SUMS,
)
