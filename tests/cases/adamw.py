"""AdamW against torch.optim.AdamW and the naive reference; cautious against pytorch_optimizer's AdEMAMix."""

import pytorch_optimizer
import torch

from tests.cases import Case, Options, Oracle, Package, public
from tests.references import adamw


def without_slow_mean(options: Options) -> Options:
    """Its AdamW has no cautious option, its AdEMAMix has."""
    return {"alpha": 0.0, "weight_decouple": True, **options}


CASE = Case(
    optimizer="AdamW",
    torch_class=torch.optim.AdamW,
    ndims=frozenset({0, 1, 2, 3}),
    variants={
        "default": {},
        "betas": {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1},
        "no_decay": {"lr": 0.01, "weight_decay": 0.0, "maximize": True},
        "amsgrad": {"lr": 0.01, "amsgrad": True},
        "cautious": {"lr": 0.01, "weight_decay": 0.1, "cautious": True},
    },
    oracles=(
        Oracle(name="reference", run=adamw, rel=2e-6, why="float32 rounding of the weights at lr 1e-3, 1e-6 measured"),
        Package(
            name="torch",
            run=public(torch.optim.AdamW),
            variants=("default", "betas", "no_decay", "amsgrad"),
            rel=1e-6,
            why="elementwise, same formula",
        ),
        Package(
            name="pytorch_optimizer",
            run=public(pytorch_optimizer.AdEMAMix, without_slow_mean),
            variants=("cautious",),
            rel=1e-6,
            why="same formula",
        ),
    ),
    sharded=0,
    sharded_why="elementwise: no result depends on a cut; cautious: counts are exact",
)
