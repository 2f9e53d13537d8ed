"""SGD against torch.optim.SGD and the naive reference."""

import torch

from tests.cases import Case, Oracle, Package, public
from tests.references import sgd

CASE = Case(
    optimizer="SGD",
    torch_class=torch.optim.SGD,
    ndims=frozenset({0, 1, 2, 3}),
    variants={
        "plain": {"lr": 0.1},
        "momentum": {"lr": 0.1, "momentum": 0.9},
        "dampening": {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1},
        "nesterov": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "maximize": True},
    },
    oracles=(
        Oracle(name="reference", run=sgd, rel=1e-6, why="float32 rounding of eight steps, 1e-7 measured"),
        Package(name="torch", run=public(torch.optim.SGD), rel=1e-6, why="elementwise, same formula"),
    ),
    sharded=0,
    sharded_why="elementwise: no result depends on a cut",
)
