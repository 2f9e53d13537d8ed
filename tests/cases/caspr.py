"""CASPR against the formula of its paper."""

from tests.cases import AMPLIFYING, Case, Oracle
from tests.references import caspr

CASE = Case(
    optimizer="CASPR",
    variants={
        "adam": {
            "betas": (0.9, 0.99),
            "grafting": "adam",
            "precondition_frequency": 3,
            "eps": 1e-2,
            "synchronous": True,
        },
        "default": {"eps": 1e-6},
        "one_side": {"betas": (0.9, 0.95), "max_precond_dim": 32, "weight_decay": 0.1, "root": "newton", "eps": 1e-4},
    },
    oracles=(
        Oracle(name="reference", run=caspr, rel=1e-3, why="inverse roots amplify float32 rounding, as in Shampoo"),
    ),
    sharded=AMPLIFYING,
)
