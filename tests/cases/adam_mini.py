"""Adam-mini against adam_mini, which takes matrices and vectors, and the naive reference."""

from tests.cases import SUMS, Case, Oracle, Package, public
from tests.references.adam_mini import adam_mini
from tests.references.packages import named_adam_mini
from tests.references.where import up_to_matrix

CASE = Case(
    optimizer="AdamMini",
    variants={"default": {}, "decay": {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}},
    oracles=(
        Oracle(name="reference", run=adam_mini, rel=2e-6, why="float32 rounding of the weights, 7e-7 measured"),
        Package(name="package", run=public(named_adam_mini), where=up_to_matrix, rel=2e-6, why="order of sums"),
    ),
    sharded=SUMS,
)
