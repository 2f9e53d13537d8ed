"""Lion against lion_pytorch and the naive reference; cautious against pytorch_optimizer's."""

import pytorch_optimizer
from lion_pytorch import Lion  # type: ignore[import-untyped]

from tests.cases import ELEMENTWISE, Case, Oracle, against
from tests.references import lion

CASE = Case(
    optimizer="Lion",
    variants={
        "default": {},
        "betas": {"lr": 0.01, "betas": (0.95, 0.98), "weight_decay": 0.1},
        "cautious": {"lr": 0.01, "weight_decay": 0.1, "cautious": True},
    },
    oracles=(
        Oracle(name="reference", run=lion, rel=1e-5, why="float32 rounding of the weights at lr 1e-4, 5e-6 measured"),
        against(Lion, but=["cautious"], rel=1e-6, why="elementwise, same formula"),
        against(pytorch_optimizer.Lion, variants=["cautious"], rel=1e-6, why="same formula"),
    ),
    sharded=ELEMENTWISE,
)
