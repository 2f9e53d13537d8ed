"""Signum and signSGD against pytorch_optimizer's SignSGD and the naive reference."""

import pytorch_optimizer
import torch

from tests.cases import Case, Oracle, public
from tests.references.signum import signum

CASE = Case(
    optimizer="Signum",
    ndims=frozenset({0, 1, 2, 3}),
    variants={
        "default": {},
        "decay": {"lr": 0.01, "momentum": 0.5, "weight_decay": 0.1},
        "signsgd": {"lr": 0.01, "momentum": 0.0},
    },
    oracles=(
        Oracle(name="reference", run=signum, rel=1e-6, why="float32 rounding of the weights, 7e-7 measured"),
        Oracle(
            name="pytorch_optimizer",
            run=public(pytorch_optimizer.SignSGD),
            dtype=torch.float32,
            rel=1e-6,
            why="same formula",
        ),
    ),
    sharded=0,
    sharded_stacks=0,
    sharded_why="elementwise: no result depends on a cut",
)
