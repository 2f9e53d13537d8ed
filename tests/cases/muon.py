"""Muon against the naive reference, and in bf16 against torch.optim.Muon."""

import torch

from tests.cases import Case, Options, Oracle, Package, Shape, public
from tests.references import muon


def for_torch(options: Options) -> Options:
    """torch always iterates in bf16."""
    return {name: value for name, value in options.items() if name != "ns_dtype"}


def full_matrix(shape: Shape, options: Options) -> bool:
    """What torch.optim.Muon takes."""
    return len(shape) == 2 and 0 not in shape


CASE = Case(
    optimizer="Muon",
    torch_class=torch.optim.Muon,
    ndims=frozenset({2, 3}),
    variants={
        "default": {},
        "match_rms": {"lr": 0.01, "adjust_lr_fn": "match_rms_adamw", "nesterov": False, "momentum": 0.9},
        "spectral": {"lr": 0.01, "adjust_lr_fn": "spectral", "weight_decay": 0.0},
        "quartic": {"lr": 0.01, "adjust_lr_fn": "original", "ns_coefficients": (2.0, -1.5, 0.5), "ns_steps": 8},
        "polar_express": {"lr": 0.01, "ns": "polar_express", "ns_steps": 9},
        "gram": {"lr": 0.01, "ns": "gram"},
        "bf16": {"lr": 0.01, "ns_dtype": torch.bfloat16},
    },
    oracles=(
        Oracle(
            name="reference",
            run=muon,
            variants=("default", "match_rms", "spectral", "quartic", "polar_express", "gram"),
            rel=1e-5,
            why="five float32 iterations amplify rounding of small singular values, 3e-6 measured",
        ),
        Package(
            name="torch",
            run=public(torch.optim.Muon, for_torch),
            variants=("bf16",),
            where=full_matrix,
            rel=2e-2,
            why="bf16 has 8 bits; torch itself is .8 % (1.5 % on one row) from float64",
        ),
    ),
    sharded=0,
    sharded_stacks=1e-5,
    sharded_why="whole matrices at one owner give the same bits; a batch of another size may use another kernel",
)
