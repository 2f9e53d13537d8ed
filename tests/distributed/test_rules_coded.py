"""Every rule with coded states on sharded layouts: 20 steps against one process with the same codec. By default each rule
meets one layout and one codec, and every layout meets every codec; `-m slow` has the whole product."""

from itertools import product
from typing import Any

import pytest

from tests.cases import collect
from tests.distributed import coding, training
from tests.distributed.pool import pool
from tests.distributed.test_layouts import distances
from tests.distributed.training import one_process

LAYOUTS = ["fsdp", "flat", "fsdp-tp"]
CODECS = ["int8", "bf16", "int4", "bf16_sr", "fp8"]
CASES = collect()
FLIPS = 2e-2
"""Where sums round otherwise on ranks, a value may fall to the next code: of int4, one of 15."""


def rows() -> list[Any]:
    found = []
    for number, rule in enumerate(CASES):
        for layout, codec in product(LAYOUTS, CODECS):
            default = layout == LAYOUTS[number % 3] and codec == CODECS[number % 5]
            found.append(pytest.param(rule, layout, codec, marks=() if default else pytest.mark.slow))
    return found


@pytest.mark.parametrize(("rule", "layout", "codec"), rows())
def test_coded_states_of_every_rule_are_those_of_one_process(rule: str, layout: str, codec: str) -> None:
    case = CASES[rule]
    everything = coding.BLOCKS if layout == "fsdp-tp" else coding.MATRICES if case.ndims == {2} else coding.CODED
    shapes = case.accepted(everything)
    options = {**next(iter(case.variants.values())), "state_codec": codec}
    expected, _ = one_process(case.optimizer, options, shapes, case.observes)
    answers = pool(4).run(
        f"{training.__name__}:on_ranks", case.optimizer, options, layout, shapes, expected, case.observes
    )
    found = distances([report for report, _ in answers])
    assert set(found) == set(shapes)
    limit = FLIPS if case.limit(repeated=False) else 0.0
    assert all(distance <= limit for distance in found.values()), found
