"""The Transformers Trainer and Accelerate on DDP, FSDP2 and DeepSpeed: the training of one process on any number of ranks,
gradient accumulation, mixed precision, resume. What is particular to each is in `test_transformers.py` and
`test_accelerate.py`.

A cover runs by default; every trainer, sharding and number of ranks with `-m slow`.
"""

import os
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version

transformers = pytest.importorskip("transformers", minversion="5.2")
pytest.importorskip("accelerate", minversion="1.13")

from tests.integrations.training import (  # noqa: E402
    LR,
    Full,
    equal,
    full_weights,
    furthest,
    is_zero,
    model,
    moved,
    ranks_of,
    run,
)

RUN = "tests.integrations.training:run"
ROUTES = ["trainer", "accelerate"]
SHARDED = ["ddp", "fsdp2"]
ZERO = ["zero0", "zero1", "zero2", "zero3"]
# Of DeepSpeed's cells, those that are run by default: every stage, number of ranks and route.
COVER = {
    ("trainer", "zero0", 3),
    ("trainer", "zero2", 2),
    ("trainer", "zero3", 2),
    ("accelerate", "zero1", 2),
    ("accelerate", "zero2", 3),
    ("accelerate", "zero3", 2),
}
ROUNDING = 2.0**-24  # of a weight near 1
NEEDS_DEEPSPEED = pytest.mark.skipif(find_spec("deepspeed") is None, reason="pip install distopt[deepspeed]")
OLD = Version(transformers.__version__) < Version("5.10")


@pytest.fixture(autouse=True)
def _no_environment_stays() -> Iterator[None]:
    before = dict(os.environ)
    yield
    for key in os.environ.keys() - before.keys():
        del os.environ[key]


def cell(route: str, kind: str, ranks: int) -> Any:
    """A parameter of a test, slow where it is not of the cover."""
    marks = [pytest.mark.slow] if is_zero(kind) and (route, kind, ranks) not in COVER else []
    if is_zero(kind):
        marks.append(NEEDS_DEEPSPEED)
    return pytest.param(route, kind, ranks, marks=marks)


CELLS = [cell(route, kind, ranks) for route in ROUTES for kind in SHARDED + ZERO for ranks in (2, 3)]
PAIRS = [cell(route, kind, 2) for route in ROUTES for kind in SHARDED + ZERO]


def skip_where_accumulation_is_wrong(route: str, kind: str) -> None:
    """transformers 5.2 with accelerate 1.13 divides accumulated gradients by their number twice: norms of 0.0527 in the
    place of 0.633, and torch.optim.AdamW ends 1.4e-2 from where it should."""
    if route == "trainer" and not is_zero(kind) and OLD:
        pytest.skip("this Trainer divides accumulated gradients by their number twice")


@cache
def one_process(route: str, name: str, same: bool = False) -> Full:
    return run(route, "one", name, same=same)


@cache
def on_ranks(route: str, kind: str, ranks: int, name: str) -> Full:
    return ranks_of(kind, ranks).run(RUN, route, kind, name)[0]


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
@pytest.mark.parametrize(("route", "kind", "ranks"), CELLS)
def test_ranks_train_as_one_process(route: str, kind: str, ranks: int, name: str) -> None:
    """Ten steps on the same global batches, with clipping. What remains is the rounding of gradients that are summed in
    another order: AdamW and Adafactor carry it no further than torch.optim.AdamW (fused, as the Trainer has it) does under
    the same trainer. ZeRO gives that one a whole partition at a time, whose elements the kernel groups otherwise: there,
    one rounding of a weight."""
    alone = one_process(route, name)
    assert moved(alone)
    distance = furthest(alone, on_ranks(route, kind, ranks, name))
    torchs = furthest(one_process(route, "torch"), on_ranks(route, kind, ranks, "torch"))
    print(f"{route} {kind} {ranks} ranks, {name}: {distance:.3e}; torch.optim.AdamW: {torchs:.3e}")
    assert distance <= (1e-4 if name == "muon" else min(torchs + ROUNDING * is_zero(kind), 1e-5))


@pytest.mark.parametrize(("route", "kind", "ranks"), PAIRS)
def test_soap_makes_the_same_update_where_gradients_are_the_same(route: str, kind: str, ranks: int) -> None:
    """It amplifies rounding, so both ranks get one batch: two equal gradients sum exactly. Stage 3 puts a linear layer of
    its own into the model, whose gradients have other bits, with torch's AdamW too: the one process has it as well."""
    alone = one_process(route, "soap", same=True)
    if kind == "zero3":
        alone = ranks_of(kind, 1).run(RUN, route, kind, "soap", same=True)[0]
    assert moved(alone)
    for rank in ranks_of(kind, ranks).run(RUN, route, kind, "soap", same=True):
        assert equal(alone, rank)


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("route", ROUTES)
def test_one_sequence_at_a_time_makes_the_step_of_all_at_once(route: str, name: str) -> None:
    skip_where_accumulation_is_wrong(route, "one")
    assert furthest(one_process(route, name), run(route, "one", name, accumulate=12)) < 1e-5


@pytest.mark.parametrize(("route", "kind", "ranks"), PAIRS)
def test_accumulated_gradients_on_ranks_make_the_same_step(route: str, kind: str, ranks: int) -> None:
    skip_where_accumulation_is_wrong(route, kind)
    parts = ranks_of(kind, ranks).run(RUN, route, kind, "muon", accumulate=6)[0]
    assert furthest(one_process(route, "muon"), parts) < 1e-5


@pytest.mark.parametrize(("route", "kind", "ranks"), PAIRS)
def test_bf16_is_as_with_torchs_optimizer(route: str, kind: str, ranks: int) -> None:
    ours = ranks_of(kind, ranks).run(RUN, route, kind, "adamw", precision="bf16")[0]
    # At stage 0 DeepSpeed takes a step before the first, which torch's AdamW counts and ours does not: ours at stage 1 then.
    other = ("zero1", "adamw") if kind == "zero0" else (kind, "torch")
    theirs = ranks_of(kind, ranks).run(RUN, route, *other, precision="bf16")[0]
    # DeepSpeed's own copies are the fp32 ones; the model's weights are bf16 there.
    assert all(weight.dtype == (torch.bfloat16 if is_zero(kind) else torch.float32) for weight in ours.values())
    assert furthest(ours, theirs) < 2e-2 < furthest(ours, full_weights(model()))
    assert furthest(ours, one_process(route, "adamw")) > 1e-5, "it was bf16"


def resumed(name: str, route: str, kind: str, ranks: int) -> Any:
    """A parameter of the next test; DeepSpeed's checkpoints of every kind are written by `test_deepspeed.py`."""
    known = cell(route, kind, ranks)
    slow = [pytest.mark.slow] if is_zero(kind) and name in ("adamw", "adafactor") else []
    return pytest.param(name, route, kind, ranks, marks=[*known.marks, *slow])


@pytest.mark.parametrize(
    ("name", "route", "kind", "ranks"),
    [
        resumed(name, route, kind, 1 if kind == "one" else 2)
        for route in ROUTES
        for kind in ["one", *SHARDED, *ZERO]
        for name in ("adamw", "adafactor", "muon", "soap")
    ],
)
def test_resume_continues_bit_for_bit(name: str, route: str, kind: str, ranks: int, tmp_path: Path) -> None:
    """From the trainer's own checkpoint, on the same number of ranks."""
    if route == "trainer" and kind in SHARDED and OLD:
        pytest.skip("on a CPU this Trainer reads its own checkpoint back to a device 'cpu:0', which torch refuses")
    options: dict[str, Any] = {"steps": 6, "save_at": 3}
    if kind == "one":
        through = run(route, kind, name, str(tmp_path), **options)
        assert equal(through, run(route, kind, name, str(tmp_path), resume=True, **options))
        return
    through = ranks_of(kind, ranks).run(RUN, route, kind, name, str(tmp_path), **options)[0]
    assert equal(through, ranks_of(kind, ranks).run(RUN, route, kind, name, str(tmp_path), resume=True, **options)[0])


@pytest.mark.parametrize(("kind", "ranks"), [("fsdp2", 2), pytest.param("zero3", 2, marks=NEEDS_DEEPSPEED)])
def test_target_modules_are_the_same_on_ranks(kind: str, ranks: int) -> None:
    alone = run("trainer", "one", "muon", optim_target_modules=["mlp"])
    found = ranks_of(kind, ranks).run(RUN, "trainer", kind, "muon", optim_target_modules=["mlp"])[0]
    assert furthest(alone, found) <= 1e-4 < furthest(alone, one_process("trainer", "muon"))


@NEEDS_DEEPSPEED
def test_name_and_argument_build_the_same_under_deepspeed() -> None:
    options = {"lr": LR, "weight_decay": 0.1}
    train = "tests.integrations.training:train"
    given = ranks_of("zero2", 2).run(train, "zero2", "unused", optimizer=("muon", options))[0]
    assert equal(given, on_ranks("trainer", "zero2", 2, "muon"))
