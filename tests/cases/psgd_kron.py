"""PSGD-Kron against pytorch_optimizer's, with the same probes, and the naive reference."""

from tests.cases import AMPLIFYING, MATRICES, Case, Oracle, Package
from tests.references.packages import kron
from tests.references.psgd_kron import psgd_kron
from tests.references.where import one_matrix

CASE = Case(
    optimizer="PSGDKron",
    ndims=MATRICES,
    variants={
        "default": {},
        "diagonal": {"lr": 0.01, "max_size_triangular": 30, "weight_decay": 0.1, "momentum": 0.5, "seed": 3},
        "halves": {"lr": 0.01, "update_probability": 0.5, "precondition_lr": 0.3},
    },
    oracles=(
        Oracle(name="reference", run=psgd_kron, rel=1e-5, why="triangular solves amplify rounding, 5e-7 measured"),
        Package(
            name="pytorch_optimizer",
            run=kron,
            variants=("default", "diagonal"),  # it would fit in other steps than ours
            where=one_matrix,
            rel=1e-5,
            why="as the reference; a 3-D tensor has three factors there",
        ),
    ),
    sharded=AMPLIFYING,
)
