"""Amos against pytorch_optimizer's and the naive reference."""

import pytorch_optimizer

from tests.cases import SUMS, Case, Oracle, against
from tests.references.amos import amos
from tests.references.where import up_to_matrix

CASE = Case(
    optimizer="Amos",
    variants={
        "default": {},
        "momentum": {"lr": 0.1, "beta": 0.95, "momentum": 0.9, "extra_l2": 0.01},
    },
    oracles=(
        Oracle(name="reference", run=amos, rel=1e-5, why="at lr 1e-3: 4.3e-6, the reference in float32 4.3e-6"),
        against(pytorch_optimizer.Amos, where=up_to_matrix, rel=2e-6, why="order of sums"),
    ),
    sharded=SUMS,
)
