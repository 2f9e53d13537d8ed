"""SOAP against the naive reference and pytorch_optimizer's, where the mathematics is stable."""

import pytorch_optimizer

from tests.cases import Case, Options, Oracle, Package, Shape, public
from tests.references import soap

AT_ONCE: Options = {"synchronous": True}
"""Oracles see one weight: they know no turns."""


def for_pytorch_optimizer(options: Options) -> Options:
    """Its name for the longest preconditioned dim; it refreshes all at once."""
    renamed = {{"max_precond_dim": "max_precondition_dim"}.get(name, name): value for name, value in options.items()}
    return {name: value for name, value in renamed.items() if name != "synchronous"}


def is_vector(shape: Shape, options: Options) -> bool:
    """Vectors are not rotated: SOAP is Adam on them, without amplification."""
    return len(shape) < 2


def full_rank(shape: Shape, options: Options) -> bool:
    """Both factors of a random gradient have full rank, so that their eigenbases are defined: no side that is
    preconditioned is longer than the other one."""
    rows, cols = shape[-2:] if len(shape) > 1 else (0, 1)
    limit = options.get("max_precond_dim", 10000)
    return rows > 0 and (rows > limit or rows <= cols) and (cols > limit or cols <= rows)


CASE = Case(
    optimizer="SOAP",
    first_update=2,
    ndims=frozenset({0, 1, 2, 3}),
    variants={
        "default": AT_ONCE,
        "frequent": {"lr": 0.01, "precondition_frequency": 1, "weight_decay": 0.1},
        "short_sides": AT_ONCE | {"lr": 0.01, "precondition_frequency": 3, "max_precond_dim": 16, "betas": (0.9, 0.95)},
        "one_side": AT_ONCE | {"precondition_frequency": 2, "max_precond_dim": 64, "shampoo_beta": 0.9, "eps": 1e-6},
    },
    oracles=(
        Oracle(name="vectors", run=soap, where=is_vector, rel=2e-6, why="Adam, float32 rounding of the weights"),
        Oracle(
            name="reference",
            run=soap,
            where=full_rank,
            rel=1e-3,
            why="eigenbases amplify float32 rounding by the condition number, 7e-5 measured between public ones",
        ),
        Package(
            name="pytorch_optimizer",
            run=public(pytorch_optimizer.SOAP, for_pytorch_optimizer),
            where=lambda shape, options: len(shape) == 2 and full_rank(shape, options),
            rel=1e-3,
            why="as the reference; a 3-D tensor has three factors there",
        ),
    ),
    sharded=0,
    sharded_why="amplifies rounding, so nothing weaker is honest; matrices are computed one by one",
)
