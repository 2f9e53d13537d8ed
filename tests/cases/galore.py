"""GaLore against galore_torch, where no sign of a singular vector matters, and the naive reference."""

import torch
from galore_torch import GaLoreAdamW  # type: ignore[import-untyped]

from tests.cases import Case, Options, Oracle, Shape, public
from tests.references.galore import galore


def for_galore_torch(options: Options) -> Options:
    """Its defaults for what it wants in the group; its AdamW takes vectors without."""
    return {"no_deprecation_warning": True} | options


def grouped(params: list[torch.nn.Parameter], **options: object) -> torch.optim.Optimizer:
    """Rank, gap and scale belong to the group of projected parameters."""
    own = {"rank": 128, "update_proj_gap": 200, "scale": 0.25}
    group = {name: options.pop(name, default) for name, default in own.items()} | {"proj_type": "std"}
    return GaLoreAdamW([{"params": params} | (group if params[0].ndim == 2 else {})], **options)


def flat_or_matrix(shape: Shape, options: Options) -> bool:
    """It takes one matrix at a time."""
    return 0 not in shape and len(shape) < 3


CASE = Case(
    optimizer="GaLore",
    ndims=frozenset({0, 1, 2, 3}),
    variants={
        "low_rank": {"lr": 0.01, "rank": 3, "betas": (0.8, 0.95), "weight_decay": 0.1},
        "default": {},
        "refreshed": {"lr": 0.01, "rank": 4, "update_proj_gap": 3, "scale": 1.0},
    },
    oracles=(
        Oracle(name="reference", run=galore, rel=1e-3, why="singular vectors amplify float32 rounding by their gaps"),
        Oracle(
            name="galore_torch",
            run=public(grouped, for_galore_torch),
            variants=("low_rank", "default"),
            where=flat_or_matrix,
            rel=1e-3,
            why="its singular vectors are float32 whatever it is given; after a refresh their signs matter",
        ),
    ),
    sharded=0,
    sharded_stacks=0,
    sharded_why="amplifies rounding, so nothing weaker is honest; matrices are computed one by one",
)
