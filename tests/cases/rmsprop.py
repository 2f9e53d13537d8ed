"""RMSprop against torch.optim.RMSprop and the naive reference."""

import torch

from tests.cases import ELEMENTWISE, Case, Oracle, against
from tests.references.adagrad import rmsprop

CASE = Case(
    optimizer="RMSprop",
    variants={
        "default": {},
        "momentum": {"lr": 0.01, "alpha": 0.9, "eps": 1e-6, "weight_decay": 0.1, "momentum": 0.9},
        "centered": {"lr": 0.01, "alpha": 0.9, "momentum": 0.5, "centered": True},
    },
    oracles=(
        Oracle(name="reference", run=rmsprop, rel=1e-6, why="float32 rounding of the weights, 2e-7 measured"),
        against(torch.optim.RMSprop, rel=1e-6, why="same formula"),
    ),
    sharded=ELEMENTWISE,
)
