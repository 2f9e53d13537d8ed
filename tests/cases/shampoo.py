"""Shampoo against the naive reference, which is Meta's to 4e-4 by default and to 1e-5 where eps is 1e-4."""

from tests.cases import Case, Options, Oracle, Shape
from tests.references import shampoo


def stable(shape: Shape, options: Options) -> bool:
    """An iterated basis of a rank-deficient factor depends on its rounding: QR is compared where factors have rank."""
    return options.get("root") != "qr" or len(shape) < 2 or 0 in shape or shape[-1] == shape[-2]


FREQUENT = {"precondition_frequency": 2, "synchronous": True}

CASE = Case(
    optimizer="Shampoo",
    ndims=frozenset({0, 1, 2, 3}),
    variants={
        "adam": {
            "betas": (0.9, 0.99),
            "grafting": "adam",
            "precondition_frequency": 3,
            "eps": 1e-2,
            "synchronous": True,
        },
        "default": {},
        "one_side": {"betas": (0.9, 0.95), "max_precond_dim": 32, "weight_decay": 0.1, **FREQUENT},
        "newton": {"root": "newton", "grafting": "sgd", "eps": 1e-2},
        "qr": {"root": "qr", "grafting": "adagrad", "eps": 1e-2, **FREQUENT},
    },
    oracles=(
        Oracle(
            name="reference",
            run=shampoo,
            where=stable,
            rel=1e-3,
            why="roots of singular factors amplify float32 rounding by eps^(-1/4); 3e-4 measured, Meta's float32 has 4e-4",
        ),
    ),
    sharded=0,
    sharded_why="amplifies rounding, so nothing weaker is honest; matrices are computed one by one",
)
