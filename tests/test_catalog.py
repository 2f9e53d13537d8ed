"""What `list_optimizers` and `optimizer_info` say is what optimizers do."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

import distopt
from distopt.rules import RULES


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("kind", ["matrix", "vector"])
def test_states_have_the_shapes_that_the_catalog_names(name: str, kind: str) -> None:
    info = distopt.optimizer_info(name)
    expected = info.matrix_states if kind == "matrix" else info.vector_states
    param = nn.Parameter(torch.zeros((6, 10) if kind == "matrix" else (10,)))
    build: Callable[..., torch.optim.Optimizer] = getattr(distopt, info.optimizer)
    if expected is None:
        with pytest.raises(ValueError, match="needs a matrix"):
            build([("w", param)])
        return
    kept = {key: value for key, value in build([("w", param)]).state[param].items() if key != "step"}
    sizes = {"rows": 6, "cols": 10, "n": 10, "1": 1, "1 per group": 1, "rank": min(info.defaults.get("rank", 1), 6)}
    named = {key: torch.Size(sizes[word] for word in shape.split(" × ")).numel() for key, shape in expected.items()}
    assert {key: value.numel() for key, value in kept.items()} == named


def test_every_rule_names_its_source_and_the_units_of_lr() -> None:
    assert distopt.list_optimizers() == list(RULES)
    for name in distopt.list_optimizers():
        info = distopt.optimizer_info(name)
        assert "(" in info.source
        assert any(char.isdigit() for char in info.source)
        assert "lr" in info.description or "every coordinate" in info.description.lower(), name


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'adamw'"):
        distopt.optimizer_info("adanw")
