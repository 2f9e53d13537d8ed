"""FSDP1 with use_orig_params=True: parameters are flat ranges, cut anywhere, and a rule sees whole matrices."""

import pytest

from tests.distributed.pool import pool
from tests.integrations.fsdp1_ranks import one_process

RANKS = "tests.integrations.fsdp1_ranks"
OPTIONS = {"lr": 1e-2, "weight_decay": 0.1}
LIMITS = {"adamw": 0.0, "adafactor": 1e-6, "muon": 0.0, "soap": 0.0}  # Adafactor's means are added in another order


@pytest.mark.parametrize("resumed", [False, True], ids=["run", "resumed"])
@pytest.mark.parametrize("name", list(LIMITS))
def test_fsdp1_equals_one_process(name: str, resumed: bool) -> None:
    expected = one_process(name, OPTIONS)
    for error in pool(2).run(f"{RANKS}:error", name, OPTIONS, expected, resumed):
        assert error <= LIMITS[name]


@pytest.mark.parametrize("strategy", ["SHARD_GRAD_OP", "NO_SHARD"])
def test_other_strategies_of_fsdp1_change_nothing(strategy: str) -> None:
    expected = one_process("muon", OPTIONS)
    assert pool(2).run(f"{RANKS}:error", "muon", OPTIONS, expected, False, strategy) == [0.0, 0.0]


@pytest.mark.parametrize(
    ("how", "remedy"),
    [
        ("without use_orig_params", "pass use_orig_params=True"),
        ("of parameters", "build the optimizer with distopt.create_optimizer"),
        ("before wrapping", "build the optimizer afterwards"),
    ],
)
def test_flattened_parameters_are_never_taken_for_vectors(how: str, remedy: str) -> None:
    for said in pool(2).run(f"{RANKS}:complaint", how):
        assert remedy in said
