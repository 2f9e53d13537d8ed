"""Refreshes in turns: the same schedule on every layout and number of ranks, and no step that costs much more than others."""

import inspect

import pytest
import torch

from distopt.layouts import Plain
from distopt.plan.build import GroupPlan, Spec, deal_turns
from distopt.rule import TwoSided
from distopt.rules import RULES, rule_class
from tests.distributed import training
from tests.distributed.layouts import LAYOUTS
from tests.distributed.pool import pool
from tests.distributed.training import one_process

TWO_SIDED = [name for name in RULES if issubclass(rule_class(name), TwoSided)]
GPT2 = [shape for _ in range(12) for shape in ((2304, 768), (768, 768), (3072, 768), (768, 3072))]


@pytest.mark.parametrize(("layout", "world_size"), [("fsdp", 2), ("fsdp-tp", 4), ("flat", 4)])
@pytest.mark.parametrize("name", TWO_SIDED)
def test_turns_are_the_same_on_every_layout(name: str, layout: str, world_size: int) -> None:
    options = {"precondition_frequency": 4, "eps": 1e-2}
    shapes = {key: shape for key, shape in LAYOUTS[layout].shapes.items() if len(shape) == 2 and 0 not in shape}
    expected = one_process(RULES[name], options, shapes)[0]
    answers = pool(world_size).run(f"{training.__name__}:on_ranks", RULES[name], options, layout, shapes, expected)
    assert all(equal for report, _ in answers for equal, *_ in report.values())
    at_once = one_process(RULES[name], {**options, "synchronous": True}, shapes)[0]
    assert any(not torch.equal(at_once[key], weight) for key, weight in expected.items()), "nothing took turns"


@pytest.mark.parametrize("name", TWO_SIDED)
def test_every_step_does_its_share_of_the_cubic_work(name: str) -> None:
    rule = rule_class(name)(precondition_frequency=10)
    assert "synchronous" in inspect.signature(rule_class(name)).parameters
    specs = [Spec(str(i), Plain(shape, (0,)), 0) for i, shape in enumerate(GPT2)]
    costs = [0.0] * 10
    for (number, _), turns in deal_turns(GroupPlan(rule, tuple(specs), gpu=False)).items():
        for size, turn in zip(GPT2[number], turns, strict=True):
            costs[turn] += float(size) ** 3
    assert max(costs) <= 1.02 * sum(costs) / 10
