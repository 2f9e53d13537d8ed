"""Schedule-Free SGD against schedulefree's and the naive reference."""

from schedulefree import SGDScheduleFree

from tests.cases import ELEMENTWISE, Case, Oracle, Package, public
from tests.references.packages import in_training
from tests.references.schedule_free import schedule_free_sgd

CASE = Case(
    optimizer="ScheduleFreeSGD",
    variants={
        "default": {},
        "warmup": {
            "lr": 0.1,
            "momentum": 0.8,
            "weight_decay": 0.1,
            "warmup_steps": 5,
            "r": 1.0,
            "weight_lr_power": 1.0,
        },
    },
    oracles=(
        Oracle(name="reference", run=schedule_free_sgd, rel=1e-6, why="float32 rounding"),
        Package(name="package", run=public(in_training(SGDScheduleFree)), rel=1e-6, why="same formula"),
    ),
    sharded=ELEMENTWISE,
)
