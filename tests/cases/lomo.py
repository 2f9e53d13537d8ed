"""LOMO: SGD without momentum, exactly, and pytorch_optimizer's."""

import torch

from tests.cases import ELEMENTWISE, Case, Oracle, Package, against
from tests.references import sgd
from tests.references.packages import fused_lomo

CASE = Case(
    optimizer="LOMO",
    variants={"default": {}, "large": {"lr": 0.1}},
    oracles=(
        Oracle(name="reference", run=sgd, rel=1e-6, why="float32 rounding of the weights"),
        against(torch.optim.SGD, rel=0, why="the same operation"),
        Package(name="pytorch_optimizer", run=fused_lomo, rel=0, why="the same operation"),
    ),
    sharded=ELEMENTWISE,
)
