"""Adagrad against torch.optim.Adagrad and the naive reference."""

import torch

from tests.cases import ELEMENTWISE, Case, Oracle, against
from tests.references.adagrad import adagrad

CASE = Case(
    optimizer="Adagrad",
    torch_class=torch.optim.Adagrad,
    variants={
        "default": {},
        "decay": {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.5, "eps": 1e-6},
    },
    oracles=(
        Oracle(name="reference", run=adagrad, rel=1e-6, why="float32 rounding of the weights, 2e-7 measured"),
        against(torch.optim.Adagrad, rel=1e-6, why="same formula"),
    ),
    sharded=ELEMENTWISE,
)
