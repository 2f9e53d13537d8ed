"""Scion against pytorch_optimizer's, where its lmo is not rounded to bf16, and the naive reference."""

import pytorch_optimizer

from tests.cases import Case, Oracle, Package, public
from tests.references.packages import scion_options
from tests.references.scion import scion

CASE = Case(
    optimizer="Scion",
    ndims=frozenset({0, 1, 2, 3}),
    variants={
        "default": {},
        "sign": {"lr": 2**-12, "norm": "sign", "scale": 3000.0},
        "unconstrained": {"lr": 0.01, "unconstrained": True, "scale": 1.0, "momentum": 0.5},
    },
    oracles=(
        Oracle(name="reference", run=scion, rel=1e-5, why="as for Muon"),
        Package(
            name="pytorch_optimizer",
            run=public(pytorch_optimizer.SCION, scion_options),
            # It iterates in bf16; its signs take matrices, its root mean squares vectors.
            where=lambda shape, options: 0 not in shape and len(shape) == (2 if options.get("norm") else 1),
            rel=2e-6,
            why="float32 rounding of the weights",
        ),
    ),
    sharded=1e-6,
    sharded_stacks=1e-5,
    sharded_why="sums of vectors over ranks come in another order; batches as in Muon",
)
