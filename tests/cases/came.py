"""CAME against came_pytorch and the naive reference."""

from came_pytorch import CAME  # type: ignore[import-untyped]

from tests.cases import Case, Options, Oracle, Package, Shape, public
from tests.references.came import came


def filled(shape: Shape, options: Options) -> bool:
    """There is a mean."""
    return 0 not in shape


CASE = Case(
    optimizer="CAME",
    ndims=frozenset({0, 1, 2, 3}),
    variants={
        "default": {"lr": 2e-4},
        "decay": {"lr": 0.01, "betas": (0.8, 0.95, 0.99), "weight_decay": 0.1, "clip_threshold": 0.7},
        "eps": {"lr": 0.01, "eps": (1e-6, 1e-4)},
    },
    oracles=(
        Oracle(name="reference", run=came, rel=1e-5, why="float32 rounding of the weights, 7e-6 measured"),
        Package(name="came_pytorch", run=public(CAME), where=filled, rel=2e-6, why="order of sums"),
    ),
    sharded=1e-6,
    sharded_why="sums over ranks come in another order",
)
