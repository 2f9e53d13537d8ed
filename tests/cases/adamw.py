"""AdamW against torch.optim.AdamW and the naive reference."""

import torch

from tests.cases import Case, Oracle, public
from tests.references import adamw

CASE = Case(
    optimizer="AdamW",
    torch_class=torch.optim.AdamW,
    ndims=frozenset({0, 1, 2, 3}),
    variants={
        "default": {},
        "betas": {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1},
        "no_decay": {"lr": 0.01, "weight_decay": 0.0, "maximize": True},
        "amsgrad": {"lr": 0.01, "amsgrad": True},
    },
    oracles=(
        Oracle(name="reference", run=adamw, rel=2e-6, why="float32 rounding of the weights at lr 1e-3, 1e-6 measured"),
        Oracle(
            name="torch", run=public(torch.optim.AdamW), dtype=torch.float32, rel=1e-6, why="elementwise, same formula"
        ),
    ),
    sharded=0,
    sharded_stacks=0,
    sharded_why="elementwise: no result depends on a cut",
)
