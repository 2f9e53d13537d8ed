"""SOAP against the naive reference and pytorch_optimizer's, where the mathematics is stable."""

from tests.cases import AMPLIFYING, Case, Options, Oracle, Package
from tests.references import soap
from tests.references.packages import soap_of_pytorch_optimizer
from tests.references.where import full_rank, full_rank_matrix, not_rotated

AT_ONCE: Options = {"synchronous": True}
"""Oracles see one weight: they know no turns."""
# 7e-5 measured between public ones.
UNSTABLE = {"rel": 1e-3, "why": "eigenbases amplify float32 rounding by the condition number"}

CASE = Case(
    optimizer="SOAP",
    first_update=2,
    variants={
        "default": AT_ONCE,
        "frequent": {"lr": 0.01, "precondition_frequency": 1, "weight_decay": 0.1},
        "short_sides": AT_ONCE | {"lr": 0.01, "precondition_frequency": 3, "max_precond_dim": 16, "betas": (0.9, 0.95)},
        "one_side": AT_ONCE | {"precondition_frequency": 2, "max_precond_dim": 64, "shampoo_beta": 0.9, "eps": 1e-6},
    },
    oracles=(
        Oracle(name="vectors", run=soap, where=not_rotated, rel=2e-6, why="Adam, float32 rounding of the weights"),
        Oracle(name="reference", run=soap, where=full_rank, **UNSTABLE),
        Package(name="pytorch_optimizer", run=soap_of_pytorch_optimizer, where=full_rank_matrix, **UNSTABLE),
    ),
    sharded=AMPLIFYING,
)
