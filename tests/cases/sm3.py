"""SM3 against pytorch_optimizer's and the naive reference."""

from pytorch_optimizer import SM3

from tests.cases import Case, Oracle, Sharded, against
from tests.references.sm3 import sm3
from tests.references.where import up_to_matrix

CASE = Case(
    optimizer="SM3",
    variants={
        "default": {},
        "momentum": {"lr": 0.02, "momentum": 0.9},
        "decay": {"lr": 0.02, "weight_decay": 0.1, "eps": 1e-6},
    },
    oracles=(
        Oracle(name="reference", run=sm3, rel=1e-6, why="float32 rounding of the weights, 3e-7 measured"),
        # It covers a 3-D tensor by slices of each dim, not by its matrices' rows; it has no weight decay.
        against(SM3, but=["decay"], where=up_to_matrix, rel=0, why="same formula"),
    ),
    sharded=Sharded(rel=0, why="maxima do not depend on their order"),
)
