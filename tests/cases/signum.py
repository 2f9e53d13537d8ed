"""Signum and signSGD against pytorch_optimizer's SignSGD and the naive reference."""

import pytorch_optimizer

from tests.cases import ELEMENTWISE, Case, Oracle, against
from tests.references.signum import signum

CASE = Case(
    optimizer="Signum",
    variants={
        "default": {},
        "decay": {"lr": 0.01, "momentum": 0.5, "weight_decay": 0.1},
        "signsgd": {"lr": 0.01, "momentum": 0.0},
    },
    oracles=(
        Oracle(name="reference", run=signum, rel=1e-6, why="float32 rounding of the weights, 7e-7 measured"),
        against(pytorch_optimizer.SignSGD, rel=1e-6, why="same formula"),
    ),
    sharded=ELEMENTWISE,
)
