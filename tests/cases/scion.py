"""Scion against pytorch_optimizer's, where its lmo is not rounded to bf16, and the naive reference."""

import pytorch_optimizer
import torch
from pytorch_optimizer.optimizer.scion import LMONorm

from tests.cases import Case, Options, Oracle, Shape, public
from tests.references.scion import scion


def for_pytorch_optimizer(options: Options) -> Options:
    """The authors' names: momentum is the weight of the new gradient."""
    return {
        "lr": options.get("lr", 1e-3),
        "momentum": 1 - options.get("momentum", 0.9),
        "constraint": not options.get("unconstrained", False),
        "norm_type": LMONorm.SIGN if options.get("norm") == "sign" else LMONorm.AUTO,
        "scale": options.get("scale", 50.0),
    }


def exact(shape: Shape, options: Options) -> bool:
    """It iterates in bf16; its signs take matrices, its root mean squares vectors."""
    return 0 not in shape and len(shape) == (2 if options.get("norm") == "sign" else 1)


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
        Oracle(
            name="pytorch_optimizer",
            run=public(pytorch_optimizer.SCION, for_pytorch_optimizer),
            dtype=torch.float32,
            where=exact,
            rel=2e-6,
            why="float32 rounding of the weights",
        ),
    ),
    sharded=1e-6,
    sharded_stacks=1e-5,
    sharded_why="sums of vectors over ranks come in another order; batches as in Muon",
)
