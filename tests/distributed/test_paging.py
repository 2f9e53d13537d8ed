"""States in pages on ranks, each with a file of its own: 20 steps against one process that pages nothing, torch.equal."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tests.distributed import coding
from tests.distributed.layouts import Full
from tests.distributed.pool import RankError, pool


@cache
def alone(rule: str, codec: str) -> tuple[Full, dict[str, dict[str, Tensor]]]:
    return coding.one_process(rule, {"lr": 1e-2, "state_codec": codec}, shapes_of(rule))


def shapes_of(rule: str) -> dict[str, Any]:
    return coding.CODED if rule == "AdamW" else coding.MATRICES


@pytest.mark.parametrize(("layout", "world_size"), [("fsdp", 4), ("columns", 2)])
@pytest.mark.parametrize(("rule", "codec"), [("AdamW", "fp32"), ("AdamW", "int8"), ("Muon", "int8"), ("SOAP", "int8")])
def test_paged_ranks_equal_one_resident_process(
    rule: str, codec: str, layout: str, world_size: int, tmp_path: Path
) -> None:
    weights, states = alone(rule, codec)
    options = {"lr": 1e-2, "state_codec": codec, "offload": {"cpu": 0.3, f"disk:{tmp_path}": 0.5}}
    answers = pool(world_size).run(
        f"{coding.__name__}:on_ranks", rule, options, layout, shapes_of(rule), weights, states
    )
    assert answers == [([], 0)] * world_size, "(parameters and states that differ, bytes beside the plan) by rank"


@pytest.mark.parametrize(("layout", "world_size"), [("fsdp", 4), ("columns", 2)])
@pytest.mark.parametrize("codec", ["fp32", "int8"])
def test_ranks_that_step_on_the_host_equal_one_process(codec: str, layout: str, world_size: int) -> None:
    weights, states = alone("AdamW", codec)
    options = {"lr": 1e-2, "state_codec": codec, "offload": "cpu_step"}
    answers = pool(world_size).run(
        f"{coding.__name__}:on_ranks", "AdamW", options, layout, coding.CODED, weights, states
    )
    assert answers == [([], 0)] * world_size


def test_a_rank_that_cannot_page_is_an_error_on_all(tmp_path: Path) -> None:
    (tmp_path / "rank00001-0.pages").mkdir()  # where rank 1 wants to have a file
    weights, states = alone("AdamW", "int8")
    options = {"lr": 1e-2, "state_codec": "int8", "offload": f"disk:{tmp_path}"}
    with pytest.raises(RankError) as error:
        pool(4).run(f"{coding.__name__}:on_ranks", "AdamW", options, "fsdp", coding.CODED, weights, states)
    assert set(error.value.errors) == {0, 1, 2, 3}
    assert "cannot be written" in error.value.errors[1]
    assert all("cannot be paged on ranks [1]" in error.value.errors[rank] for rank in (0, 2, 3))
