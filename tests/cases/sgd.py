"""SGD against torch.optim.SGD and the naive reference."""

import torch

from tests.cases import ELEMENTWISE, Case, Oracle, against
from tests.references import sgd

CASE = Case(
    optimizer="SGD",
    torch_class=torch.optim.SGD,
    variants={
        "plain": {"lr": 0.1},
        "momentum": {"lr": 0.1, "momentum": 0.9},
        "dampening": {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1},
        "nesterov": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "maximize": True},
    },
    oracles=(
        Oracle(name="reference", run=sgd, rel=1e-6, why="float32 rounding of eight steps, 1e-7 measured"),
        against(torch.optim.SGD, rel=1e-6, why="elementwise, same formula"),
    ),
    sharded=ELEMENTWISE,
)
