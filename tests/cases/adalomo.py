"""AdaLomo against pytorch_optimizer's and the naive reference."""

from typing import Any

import pytorch_optimizer
from torch import Tensor

from tests.cases import Case, Oracle
from tests.cases.lomo import backward
from tests.references.adalomo import adalomo


def package(weight: Tensor, grads: list[Tensor], **options: Any) -> Tensor:
    """Without its loss scale; it has two numbers for eps."""
    eps1, eps2 = options.pop("eps", (1e-30, 1e-3))
    options = {"lr": 1e-3, "loss_scale": 0.0, "eps1": eps1, "eps2": eps2, **options}
    return backward(pytorch_optimizer.AdaLOMO, weight, grads, **options)


CASE = Case(
    optimizer="AdaLomo",
    ndims=frozenset({0, 1, 2, 3}),
    variants={
        "default": {"lr": 0.02},
        "decay": {"lr": 0.05, "weight_decay": 0.1, "decay_rate": -0.5, "clip_threshold": 0.7},
        "eps": {"lr": 0.01, "eps": (1e-6, 0.1)},
    },
    oracles=(
        Oracle(name="reference", run=adalomo, rel=2e-6, why="float32 rounding of the weights"),
        Oracle(
            name="pytorch_optimizer",
            run=package,
            where=lambda shape, _: 0 not in shape and len(shape) in (1, 2),
            rel=2e-6,
            why="order of sums; its arithmetic is float32 whatever it is given",
        ),
    ),
    sharded=1e-6,
    sharded_stacks=1e-6,
    sharded_why="sums over ranks come in another order",
)
