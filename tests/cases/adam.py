"""Adam against torch.optim.Adam and the naive reference."""

import torch

from tests.cases import ELEMENTWISE, Case, Oracle, against
from tests.references.adam import adam

CASE = Case(
    optimizer="Adam",
    torch_class=torch.optim.Adam,
    variants={
        "default": {},
        "decay": {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1, "maximize": True},
        "amsgrad": {"lr": 0.01, "amsgrad": True},
        "decoupled": {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True},
    },
    oracles=(
        Oracle(name="reference", run=adam, rel=2e-6, why="float32 rounding of the weights, 7e-7 measured"),
        against(torch.optim.Adam, rel=1e-6, why="elementwise, same formula"),
    ),
    sharded=ELEMENTWISE,
)
