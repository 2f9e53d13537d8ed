"""APOLLO-Mini: APOLLO with the authors' setting."""

from tests.cases import BATCHED, Case, Oracle, Package
from tests.references.apollo import apollo
from tests.references.packages import apollo_torch
from tests.references.where import one_matrix

MINI = {"rank": 1, "scale": 128.0, "scale_type": "tensor"}

CASE = Case(
    optimizer="APOLLOMini",
    variants={"default": {}, "often": {"lr": 0.01, "update_proj_gap": 2, "weight_decay": 0.1, "scale": 16.0}},
    oracles=(
        Oracle(name="reference", run=lambda w, g, **o: apollo(w, g, **{**MINI, **o}), rel=1e-5, why="as for APOLLO"),
        Package(
            name="apollo_torch",
            run=lambda w, g, **o: apollo_torch(w, g, **{**MINI, **o}),
            where=one_matrix,
            rel=2e-6,
            why="order of sums",
        ),
    ),
    sharded=BATCHED,
)
