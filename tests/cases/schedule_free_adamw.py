"""Schedule-Free AdamW against schedulefree's and the naive reference."""

from typing import Any

import schedulefree
import torch

from tests.cases import Case, Oracle, Package, public
from tests.references.schedule_free import schedule_free_adamw


def theirs(*args: Any, **options: Any) -> torch.optim.Optimizer:
    """Theirs begins in evaluation mode."""
    optimizer = schedulefree.AdamWScheduleFree(*args, **options)
    optimizer.train()
    return optimizer


CASE = Case(
    optimizer="ScheduleFreeAdamW",
    ndims=frozenset({0, 1, 2, 3}),
    variants={
        "default": {},
        "warmup": {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1, "warmup_steps": 5, "r": 1.0},
    },
    oracles=(
        Oracle(name="reference", run=schedule_free_adamw, rel=2e-6, why="float32 rounding of the weights"),
        Package(name="package", run=public(theirs), rel=2e-6, why="same formula"),
    ),
    sharded=0,
    sharded_why="elementwise: no result depends on a cut",
)
