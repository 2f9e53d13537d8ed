"""Muon against the naive reference, and in bf16, where torch's always iterates, against torch.optim.Muon."""

import torch

from tests.cases import BATCHED, MATRICES, Case, Oracle, against, without
from tests.references import muon
from tests.references.where import full_matrix

BF16 = {"variants": ["bf16"], "where": full_matrix, "rel": 2e-2, "why": "8 bits; torch is .8 to 1.5 % off itself"}
CASE = Case(
    optimizer="Muon",
    torch_class=torch.optim.Muon,
    ndims=MATRICES,
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
        # Small singular values amplify rounding: 3e-6 measured after five iterations.
        Oracle(name="reference", run=muon, but=["bf16"], rel=1e-5, why="iterations amplify float32 rounding"),
        against(torch.optim.Muon, without("ns_dtype"), **BF16),
    ),
    sharded=BATCHED,
)
