"""Adadelta against torch.optim.Adadelta and the naive reference."""

import torch

from tests.cases import Case, Oracle, Package, public
from tests.references.adagrad import adadelta

CASE = Case(
    optimizer="Adadelta",
    torch_class=torch.optim.Adadelta,
    ndims=frozenset({0, 1, 2, 3}),
    variants={
        "default": {},
        "decay": {"lr": 0.5, "rho": 0.95, "eps": 1e-4, "weight_decay": 0.1},
    },
    oracles=(
        Oracle(name="reference", run=adadelta, rel=1e-6, why="float32 rounding of the weights, 2e-7 measured"),
        Package(name="torch", run=public(torch.optim.Adadelta), rel=1e-6, why="same formula"),
    ),
    sharded=0,
    sharded_why="elementwise: no result depends on a cut",
)
