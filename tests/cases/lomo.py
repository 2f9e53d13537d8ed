"""LOMO: SGD without momentum, exactly, and pytorch_optimizer's."""

import torch

from tests.cases import Case, Oracle, Package, public
from tests.references import sgd
from tests.references.packages import fused_lomo

CASE = Case(
    optimizer="LOMO",
    ndims=frozenset({0, 1, 2, 3}),
    variants={"default": {}, "large": {"lr": 0.1}},
    oracles=(
        Oracle(name="reference", run=sgd, rel=1e-6, why="float32 rounding of the weights"),
        Package(name="torch", run=public(torch.optim.SGD), rel=0, why="the same operation"),
        Package(name="pytorch_optimizer", run=fused_lomo, rel=0, why="the same operation"),
    ),
    sharded=0,
    sharded_why="elementwise",
)
