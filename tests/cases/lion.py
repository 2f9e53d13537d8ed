"""Lion against lion_pytorch and the naive reference; cautious against pytorch_optimizer's."""

import pytorch_optimizer
from lion_pytorch import Lion  # type: ignore[import-untyped]

from tests.cases import Case, Oracle, Package, public
from tests.references import lion

CASE = Case(
    optimizer="Lion",
    ndims=frozenset({0, 1, 2, 3}),
    variants={
        "default": {},
        "betas": {"lr": 0.01, "betas": (0.95, 0.98), "weight_decay": 0.1},
        "cautious": {"lr": 0.01, "weight_decay": 0.1, "cautious": True},
    },
    oracles=(
        Oracle(name="reference", run=lion, rel=1e-5, why="float32 rounding of the weights at lr 1e-4, 5e-6 measured"),
        Package(
            name="lion_pytorch",
            run=public(Lion),
            variants=("default", "betas"),
            rel=1e-6,
            why="elementwise, same formula",
        ),
        Package(
            name="pytorch_optimizer",
            run=public(pytorch_optimizer.Lion),
            variants=("cautious",),
            rel=1e-6,
            why="same formula",
        ),
    ),
    sharded=0,
    sharded_why="elementwise: no result depends on a cut; cautious: counts are exact",
)
