"""Adadelta against torch.optim.Adadelta and the naive reference."""

import torch

from tests.cases import ELEMENTWISE, Case, Oracle, against
from tests.references.adagrad import adadelta

CASE = Case(
    optimizer="Adadelta",
    torch_class=torch.optim.Adadelta,
    variants={
        "default": {},
        "decay": {"lr": 0.5, "rho": 0.95, "eps": 1e-4, "weight_decay": 0.1},
    },
    oracles=(
        Oracle(name="reference", run=adadelta, rel=1e-6, why="float32 rounding of the weights, 2e-7 measured"),
        against(torch.optim.Adadelta, rel=1e-6, why="same formula"),
    ),
    sharded=ELEMENTWISE,
)
