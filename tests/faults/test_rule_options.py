"""Options out of range are refused when the optimizer is built, with the option, the value and the limit."""

from typing import Any

import pytest
import torch
from torch import nn

import distopt


@pytest.mark.parametrize(
    ("optimizer", "options", "message"),
    [
        ("GaLore", {"rank": 0}, "rank must be ≥ 1, got 0"),
        ("GaLore", {"update_proj_gap": 0}, "update_proj_gap must be ≥ 1, got 0"),
        ("GaLore", {"betas": (0.9, 1.0)}, "betas must lie in"),
        ("GaLore", {"scale": 0.0}, "scale must be above 0"),
        ("APOLLO", {"rank": -1}, "rank must be ≥ 1, got -1"),
        ("APOLLO", {"scale_type": "row"}, "scale_type: channel or tensor, got 'row'"),
        ("APOLLOMini", {"seed": -1}, "seed must lie in"),
        ("Scion", {"momentum": 1.0}, "momentum must lie in"),
        ("Scion", {"norm": "col"}, "norm: spectral or sign, got 'col'"),
        ("Scion", {"ns_steps": 0}, "ns_steps must lie in"),
        ("Dion", {"rank_fraction": 0.0}, "rank_fraction must lie in"),
        ("Dion", {"rank_fraction": 1.5}, "rank_fraction must lie in"),
        ("Dion", {"mu": 1.0}, "mu must lie in"),
        ("PSGDKron", {"update_probability": 0.0}, "update_probability must lie in"),
        ("PSGDKron", {"precondition_lr": 1.0}, "precondition_lr must lie in"),
        ("SophiaG", {"rho": 0.0}, "rho must be above 0"),
        ("SophiaH", {"bs": 0}, "bs, the labels in a batch, must be above 0"),
        ("MuonClip", {"tau": 0.0}, "tau must be above 0"),
        ("MuonClip", {"alpha": 1.5}, "alpha must lie in"),
        ("AdaLomo", {"clip_threshold": 0.0}, "clip_threshold must be > 0"),
        ("AdaLomo", {"decay_rate": 0.8}, "decay_rate must be ≤ 0"),
        ("LOMO", {"lr": -1.0}, "lr must be a finite number ≥ 0"),
    ],
)
def test_an_option_out_of_range_is_named(optimizer: str, options: dict[str, Any], message: str) -> None:
    weight = nn.Parameter(torch.ones(4, 3))
    with pytest.raises(ValueError, match=message):
        getattr(distopt, optimizer)([("w", weight)], **options)


@pytest.mark.parametrize("optimizer", ["Dion", "PSGDKron", "MuonClip"])
def test_a_vector_is_refused_by_a_rule_of_matrices(optimizer: str) -> None:
    with pytest.raises(ValueError, match=r"'b': .* needs a matrix, got shape \(4,\); route it to AdamW"):
        getattr(distopt, optimizer)([("b", nn.Parameter(torch.ones(4)))])
