"""Schedule-Free AdamW against schedulefree's and the naive reference."""

from schedulefree import AdamWScheduleFree

from tests.cases import ELEMENTWISE, Case, Oracle, Package, public
from tests.references.packages import in_training
from tests.references.schedule_free import schedule_free_adamw

CASE = Case(
    optimizer="ScheduleFreeAdamW",
    variants={
        "default": {},
        "warmup": {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1, "warmup_steps": 5, "r": 1.0},
    },
    oracles=(
        Oracle(name="reference", run=schedule_free_adamw, rel=2e-6, why="float32 rounding of the weights"),
        Package(name="package", run=public(in_training(AdamWScheduleFree)), rel=2e-6, why="same formula"),
    ),
    sharded=ELEMENTWISE,
)
