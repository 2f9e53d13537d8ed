"""States stored as codes on every layout: 20 steps against one process, identical full gradients, torch.equal."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed import coding
from tests.distributed.layouts import Full
from tests.distributed.pool import pool

CODECS = ["int8", "int4", "fp8", "bf16_sr"]
PLACES = [
    ("fsdp", 2),
    ("fsdp", 3),
    ("fsdp", 4),
    ("hsdp", 4),
    ("columns", 2),
    ("columns", 3),
    ("flat", 3),
    ("flat", 4),
    ("flat-concatenated", 4),
    ("partitioned", 3),
]


@cache
def alone(optimizer: str, codec: str) -> tuple[Full, dict[str, dict[str, Tensor]]]:
    return coding.one_process(optimizer, options_of(codec), coding.CODED)


def options_of(codec: str) -> dict[str, Any]:
    return {"lr": 1e-2, "state_codec": codec}


@pytest.mark.parametrize(("layout", "world_size"), PLACES)
@pytest.mark.parametrize("codec", CODECS)
def test_every_layout_stores_the_same_codes(codec: str, layout: str, world_size: int) -> None:
    weights, states = alone("AdamW", codec)
    answers = pool(world_size).run(
        f"{coding.__name__}:on_ranks", "AdamW", options_of(codec), layout, coding.CODED, weights, states
    )
    assert answers == [([], 0)] * world_size, "(parameters and states that differ, bytes beside the plan) by rank"


MATRIX_PLACES = [("fsdp", 2), ("fsdp", 3), ("fsdp", 4), ("columns", 3), ("flat", 4), ("partitioned", 3), ("hsdp", 4)]


@pytest.mark.parametrize(("layout", "world_size"), MATRIX_PLACES)
@pytest.mark.parametrize("rule", ["Muon", "SOAP", "Shampoo", "NorMuon"])
def test_matrix_rules_store_the_same_codes_on_every_layout(rule: str, layout: str, world_size: int) -> None:
    options = {"lr": 1e-2, "state_codec": "int8"}
    weights, states = matrices_alone(rule)
    answers = pool(world_size).run(
        f"{coding.__name__}:on_ranks", rule, options, layout, coding.MATRICES, weights, states
    )
    assert [wrong for wrong, _ in answers] == [[]] * world_size
    assert rule == "Shampoo" or [traffic for _, traffic in answers] == [0] * world_size


@cache
def matrices_alone(rule: str) -> tuple[Full, dict[str, dict[str, Tensor]]]:
    return coding.one_process(rule, {"lr": 1e-2, "state_codec": "int8"}, coding.MATRICES)


@pytest.mark.parametrize(("layout", "world_size"), [("fsdp", 3), ("columns", 2), ("flat", 4)])
@pytest.mark.parametrize("rule", ["Adafactor", "AdamMini", "CAME"])
def test_rules_that_ask_for_sums_agree_on_scales_as_planned(rule: str, layout: str, world_size: int) -> None:
    """Sums round differently on ranks, so codes may differ by one; the bytes may not."""
    options = {"lr": 1e-3, "state_codec": "int8"}
    weights, states = coding.one_process(rule, options, coding.CODED)
    answers = pool(world_size).run(f"{coding.__name__}:on_ranks", rule, options, layout, coding.CODED, weights, states)
    assert [traffic for _, traffic in answers] == [0] * world_size


MASTER_PLACES = [*PLACES, ("tp", 2), ("fsdp-tp", 4)]


@pytest.mark.parametrize(("layout", "world_size"), MASTER_PLACES)
@pytest.mark.parametrize("master_codec", ["bits8", "bits16"])
def test_every_layout_keeps_the_same_master_bits(master_codec: str, layout: str, world_size: int) -> None:
    shapes = coding.BLOCKS if "tp" in layout else coding.CODED
    options = {"lr": 1e-4, "state_codec": "int8", "master_codec": master_codec}
    weights, states = masters_alone(master_codec, "tp" in layout)
    assert all("master" in states[name] for name in shapes if 0 not in shapes[name])
    answers = pool(world_size).run(
        f"{coding.__name__}:on_ranks", "AdamW", options, layout, shapes, weights, states, torch.bfloat16
    )
    assert answers == [([], 0)] * world_size, (
        "(parameters, states and masters that differ, bytes beside the plan) by rank"
    )


@cache
def masters_alone(master_codec: str, blocks: bool) -> tuple[Full, dict[str, dict[str, Tensor]]]:
    options = {"lr": 1e-4, "state_codec": "int8", "master_codec": master_codec}
    return coding.one_process("AdamW", options, coding.BLOCKS if blocks else coding.CODED, torch.bfloat16)


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("master_codec", ["bits8", "fp32", "none"])
def test_master_weights_of_a_model_under_fsdp2_lie_as_its_parameters(master_codec: str, world_size: int) -> None:
    expected = coding.masters(master_codec, sharded=False)
    if master_codec != "none":
        low = {name: value.bfloat16().float() for name, value in expected.items()}
        assert any(not torch.equal(value.float(), low[name]) for name, value in expected.items())
    answers = pool(world_size).run(f"{coding.__name__}:masters_differ", master_codec, expected)
    assert answers == [[]] * world_size
