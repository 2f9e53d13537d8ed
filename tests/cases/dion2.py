"""Dion2 against the naive reference."""

from tests.cases import MATRICES, Case, Oracle, Sharded
from tests.references import dion2

CASE = Case(
    optimizer="Dion2",
    ndims=MATRICES,
    variants={
        "default": {},
        "half": {"fraction": 0.5, "ef_decay": 0.8, "adjust_lr_fn": "match_rms_adamw", "weight_decay": 0.1},
        "muon": {"fraction": 1.0, "ns": "quintic", "adjust_lr_fn": None},
    },
    oracles=(Oracle(name="reference", run=dion2, rel=1e-5, why="as for Muon: 3e-6 measured"),),
    sharded=Sharded(rel=0, why="rounding can change which rows are selected; matrices are computed one by one"),
)
