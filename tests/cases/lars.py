"""LARS against the naive reference, and without weight decay against pytorch_optimizer's."""

from pytorch_optimizer import LARS

from tests.cases import SUMS, Case, Oracle, Package, public
from tests.references.lamb import lars

theirs = public(LARS, lambda options: {"lr": 1.0, "momentum": 0.0, **options})
CASE = Case(
    optimizer="LARS",
    variants={
        "momentum": {"lr": 0.1, "momentum": 0.9, "trust_coeff": 0.5},
        "default": {"lr": 20.0, "momentum": 0.5},
        "nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "trust_coeff": 0.01},
        "dampening": {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1, "trust_coeff": 0.01},
    },
    oracles=(
        Oracle(name="reference", run=lars, rel=2e-6, why="float32 rounding of the weights, 1.3e-6 measured"),
        Package(name="package", run=theirs, variants=["default"], rel=2e-6, why="order of sums"),
    ),
    sharded=SUMS,
)
