"""AdamW against torch.optim.AdamW and the naive reference; cautious against pytorch_optimizer's AdEMAMix."""

import torch
from pytorch_optimizer import AdEMAMix

from tests.cases import ELEMENTWISE, Case, Oracle, against
from tests.references import adamw

CAUTIOUS = {"alpha": 0.0, "weight_decouple": True}  # their AdamW has no such option, their AdEMAMix has

CASE = Case(
    optimizer="AdamW",
    torch_class=torch.optim.AdamW,
    variants={
        "default": {},
        "betas": {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1},
        "no_decay": {"lr": 0.01, "weight_decay": 0.0, "maximize": True},
        "amsgrad": {"lr": 0.01, "amsgrad": True},
        "cautious": {"lr": 0.01, "weight_decay": 0.1, "cautious": True},
    },
    oracles=(
        Oracle(name="reference", run=adamw, rel=2e-6, why="float32 rounding of the weights at lr 1e-3, 1e-6 measured"),
        against(torch.optim.AdamW, but=["cautious"], rel=1e-6, why="elementwise, same formula"),
        against(AdEMAMix, lambda options: CAUTIOUS | options, variants=["cautious"], rel=1e-6, why="same formula"),
    ),
    sharded=ELEMENTWISE,
)
