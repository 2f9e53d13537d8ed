"""Scion against pytorch_optimizer's, where its lmo is not rounded to bf16, and the naive reference."""

from pytorch_optimizer import SCION

from tests.cases import Case, Oracle, Sharded, against
from tests.references.packages import scion_options
from tests.references.scion import scion
from tests.references.where import scion_in_fp32

CASE = Case(
    optimizer="Scion",
    variants={
        "default": {},
        "sign": {"lr": 2**-12, "norm": "sign", "scale": 3000.0},
        "unconstrained": {"lr": 0.01, "unconstrained": True, "scale": 1.0, "momentum": 0.5},
    },
    oracles=(
        Oracle(name="reference", run=scion, rel=1e-5, why="as for Muon"),
        against(SCION, scion_options, where=scion_in_fp32, rel=2e-6, why="float32 rounding of the weights"),
    ),
    sharded=Sharded(rel=1e-6, stacks=1e-5, why="sums of vectors over ranks come in another order; batches as in Muon"),
)
