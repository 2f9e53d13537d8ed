"""NorMuon against the naive reference, and in bf16 against pytorch_optimizer's."""

from collections.abc import Iterable
from typing import Any

import pytorch_optimizer
import torch
from torch import nn

from tests.cases import Case, Options, Oracle, Package, public
from tests.references import normuon


def public_class(params: Iterable[nn.Parameter], **options: Any) -> torch.optim.Optimizer:
    """Its groups say which rule they want."""
    return pytorch_optimizer.NorMuon([{"params": list(params), "use_muon": True}], **options)


def renamed(options: Options) -> Options:
    """It always iterates in bf16; its two scales are ours with a name."""
    own = {"ns_dtype", "adjust_lr_fn"}
    scale = "match_rms" if options.get("adjust_lr_fn", "rms") == "rms" else "preserve_norm"
    defaults = {"lr": 1e-3, "weight_decay": 0.1, "nesterov": False, "eps": 1e-8, "update_scale": scale}
    return defaults | {name: value for name, value in options.items() if name not in own}


CASE = Case(
    optimizer="NorMuon",
    ndims=frozenset({2, 3}),
    variants={
        "default": {},
        "authors": {"lr": 0.01, "adjust_lr_fn": "original", "nesterov": True, "beta2": 0.9, "weight_decay": 0.0},
        "dion": {"lr": 0.01, "adjust_lr_fn": "spectral", "ns": "polar_express"},
        "bf16": {"lr": 0.01, "ns_dtype": torch.bfloat16},
        "bf16_authors": {"lr": 0.01, "ns_dtype": torch.bfloat16, "adjust_lr_fn": "original"},
    },
    oracles=(
        Oracle(name="reference", run=normuon, variants=("default", "authors", "dion"), rel=1e-5, why="as for Muon"),
        Package(
            name="pytorch_optimizer",
            run=public(public_class, renamed),
            variants=("bf16", "bf16_authors"),
            where=lambda shape, options: len(shape) == 2 and 0 not in shape,
            rel=3e-3,
            why="one rounds its result to bf16, the other its momentum: 1e-3 measured",
        ),
    ),
    sharded=0,
    sharded_stacks=1e-5,
    sharded_why="whole matrices at one owner give the same bits; a batch of another size may use another kernel",
)
