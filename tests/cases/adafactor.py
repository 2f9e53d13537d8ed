"""Adafactor against torch.optim.Adafactor, transformers' and the naive reference."""

import torch
from transformers.optimization import Adafactor

from tests.cases import SUMS, Case, Oracle, against
from tests.references import adafactor
from tests.references.where import filled

CASE = Case(
    optimizer="Adafactor",
    torch_class=torch.optim.Adafactor,
    variants={
        "default": {},
        "large_steps": {"lr": 0.5, "beta2_decay": -0.6, "eps": (1e-6, 1e-2), "d": 1.5, "weight_decay": 0.1},
        "maximize": {"lr": 0.1, "maximize": True},
        "unscaled": {"lr": 0.01, "scale_parameter": False},
    },
    oracles=(
        # Weights move by 1e-2 of themselves.
        Oracle(name="reference", run=adafactor, rel=5e-6, why="float32 rounding; torch's float32 is 3.5e-6 off"),
        against(torch.optim.Adafactor, but=["unscaled"], where=filled, rel=2e-6, why="order of sums"),
        against(
            Adafactor,
            lambda options: options | {"relative_step": False},  # no schedule of its own: a constant lr
            **{"variants": ["unscaled"], "where": filled, "rel": 2e-6, "why": "order of sums"},
        ),
    ),
    sharded=SUMS,
)
