"""NorMuon against the naive reference, and in bf16 against pytorch_optimizer's, which always iterates in it."""

import torch

from tests.cases import BATCHED, MATRICES, Case, Oracle, Package
from tests.references import normuon
from tests.references.packages import normuon_of_pytorch_optimizer
from tests.references.where import full_matrix

# One rounds its result to bf16, the other its momentum.
BF16 = {"variants": ["bf16", "bf16_authors"], "where": full_matrix, "rel": 3e-3, "why": "8 bits: 1e-3 measured"}
CASE = Case(
    optimizer="NorMuon",
    ndims=MATRICES,
    variants={
        "default": {},
        "authors": {"lr": 0.01, "adjust_lr_fn": "original", "nesterov": True, "beta2": 0.9, "weight_decay": 0.0},
        "dion": {"lr": 0.01, "adjust_lr_fn": "spectral", "ns": "polar_express"},
        "bf16": {"lr": 0.01, "ns_dtype": torch.bfloat16},
        "bf16_authors": {"lr": 0.01, "ns_dtype": torch.bfloat16, "adjust_lr_fn": "original"},
    },
    oracles=(
        Oracle(name="reference", run=normuon, but=["bf16", "bf16_authors"], rel=1e-5, why="as for Muon"),
        Package(name="pytorch_optimizer", run=normuon_of_pytorch_optimizer, **BF16),
    ),
    sharded=BATCHED,
)
