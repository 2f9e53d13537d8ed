"""SM3 against pytorch_optimizer's and the naive reference."""

from pytorch_optimizer import SM3

from tests.cases import Case, Oracle, Package, public
from tests.references.sm3 import sm3

CASE = Case(
    optimizer="SM3",
    ndims=frozenset({0, 1, 2, 3}),
    variants={
        "default": {},
        "momentum": {"lr": 0.02, "momentum": 0.9},
        "decay": {"lr": 0.02, "weight_decay": 0.1, "eps": 1e-6},
    },
    oracles=(
        Oracle(name="reference", run=sm3, rel=1e-6, why="float32 rounding of the weights, 3e-7 measured"),
        # It covers a 3-D tensor by slices of each dim, not by its matrices' rows; it has no weight decay.
        Package(
            name="package",
            run=public(SM3),
            variants=["default", "momentum"],
            where=lambda shape, _: 0 not in shape and len(shape) < 3,
            rel=0,
            why="same formula",
        ),
    ),
    sharded=0,
    sharded_why="maxima do not depend on their order",
)
