"""Adagrad against torch.optim.Adagrad and the naive reference."""

import torch

from tests.cases import Case, Oracle, Package, public
from tests.references.adagrad import adagrad

CASE = Case(
    optimizer="Adagrad",
    torch_class=torch.optim.Adagrad,
    ndims=frozenset({0, 1, 2, 3}),
    variants={
        "default": {},
        "decay": {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.5, "eps": 1e-6},
    },
    oracles=(
        Oracle(name="reference", run=adagrad, rel=1e-6, why="float32 rounding of the weights, 2e-7 measured"),
        Package(name="torch", run=public(torch.optim.Adagrad), rel=1e-6, why="same formula"),
    ),
    sharded=0,
    sharded_why="elementwise: no result depends on a cut",
)
