"""Native checkpoints of sharded optimizers on every layout: compared, tensor by tensor, with that of one process that took
the same steps, and with themselves after they went through other layouts and numbers of ranks."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import distopt
from distopt import checkpoint
from distopt.state.reader import Reader
from tests.distributed.layouts import LAYOUTS, Full, Laid, lay_out, local_tensor
from tests.distributed.pool import pool

HERE = __name__
STEPS = 3
Shapes = dict[str, tuple[int, ...]]

# Uneven and empty shards over 2 and 4 ranks, the names that the TP layouts cut, experts, a convolution.
SHAPES: Shapes = {
    "q": (18, 24),
    "out": (24, 18),
    "up": (50, 24),
    "down": (24, 50),
    "experts": (5, 12, 8),
    "conv": (6, 4, 3, 3),
    "few_rows": (3, 20),
    "row": (1, 40),
    "column": (50, 1),
    "empty": (0, 8),
    "norm": (33,),
    "short": (2,),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "AdamW": {"lr": 0.01, "amsgrad": True},
    "SGD": {"lr": 0.01, "momentum": 0.9},
    "Lion": {"lr": 0.01},
    "Adafactor": {"lr": 0.01},
    "Muon": {"lr": 0.01},
    "SOAP": {"lr": 0.01, "precondition_frequency": 2, "max_precond_dim": 48},
    "Prodigy": {"lr": 1.0, "d0": 1e-3},
    "ScheduleFreeAdamW": {"lr": 0.01},
}
# Against one process: bits where the order of operations is the same, else the tolerance of the rule's own tests.
REL = {
    "AdamW": 0,
    "SGD": 0,
    "Lion": 0,
    "Adafactor": 1e-6,
    "Muon": 1e-5,
    "SOAP": 0,
    "Prodigy": 1e-6,
    "ScheduleFreeAdamW": 0,
}
FROM_ZERO = ["AdamW", "Adafactor", "Muon", "SOAP"]
KINDS = [*FROM_ZERO, "Prodigy", "ScheduleFreeAdamW"]


def shapes_of(optimizer: str) -> Shapes:
    return {name: shape for name, shape in SHAPES.items() if optimizer != "Muon" or len(shape) > 1}


def weights(optimizer: str, seed: int = 1) -> Full:
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes_of(optimizer).items()}


def gradients(optimizer: str, step: int) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(100 + step)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes_of(optimizer).items()}


class Holder(nn.Module):
    """A model of nothing but these parameters, under their own names."""

    def __init__(self, params: Full) -> None:
        super().__init__()
        for name, param in params.items():
            self.register_parameter(name, param)  # type: ignore[arg-type]


def build(optimizer: str, layout: str, seed: int = 1) -> tuple[Laid, nn.Module, distopt.Optimizer]:
    """Parameters laid out, a model that holds them, an optimizer."""
    laid = lay_out(LAYOUTS[layout], weights(optimizer, seed))
    built = getattr(distopt, optimizer)(laid.named(), **OPTIONS[optimizer], **LAYOUTS[layout].options())
    return laid, Holder(laid.params), built


def train(optimizer: str, laid: Laid, built: distopt.Optimizer, steps: range) -> None:
    for step in steps:
        laid.set_grads(gradients(optimizer, step))
        built.step()


# ---- what ranks run


def train_and_save(optimizer: str, layout: str, path: Path) -> None:
    laid, model, built = build(optimizer, layout)
    train(optimizer, laid, built, range(STEPS))
    checkpoint.save(path, model=model, optimizer=built, extra={"steps": STEPS})


def load_and_save(optimizer: str, layout: str, source: Path, target: Path) -> dict[str, Any]:
    """Into an optimizer that has already taken steps of its own, from other weights."""
    laid, model, built = build(optimizer, layout, seed=2)
    train(optimizer, laid, built, range(7, 8))
    extra = checkpoint.load(source, model=model, optimizer=built)
    checkpoint.save(target, model=model, optimizer=built, extra=extra)
    return extra


def interrupted_and_not(optimizer: str, layout: str, path: Path) -> list[str]:
    """Parameters whose bits differ between a run that went on and one that was loaded into new objects."""
    laid, model, built = build(optimizer, layout)
    train(optimizer, laid, built, range(STEPS))
    checkpoint.save(path / "first", model=model, optimizer=built)
    again, model_again, resumed = build(optimizer, layout, seed=2)
    checkpoint.load(path / "first", model=model_again, optimizer=resumed)
    train(optimizer, laid, built, range(STEPS, 2 * STEPS))
    train(optimizer, again, resumed, range(STEPS, 2 * STEPS))
    checkpoint.save(path / "went_on", model=model, optimizer=built)
    checkpoint.save(path / "resumed", model=model_again, optimizer=resumed)
    params = laid.params.items()
    return [name for name, p in params if not torch.equal(local_tensor(p), local_tensor(again.params[name]))]


# ---- in the test's own process


@cache
def one_process(optimizer: str, steps: int = STEPS) -> dict[str, Tensor]:
    """Parameters and states by their names in a checkpoint, from one process without a process group."""
    params = {name: nn.Parameter(weight) for name, weight in weights(optimizer).items()}
    built = getattr(distopt, optimizer)(params.items(), **OPTIONS[optimizer])
    for step in range(steps):
        for name, grad in gradients(optimizer, step).items():
            params[name].grad = grad
        built.step()
    found = {f"model/{name}": param.detach() for name, param in params.items()}
    for name, param in params.items():
        for key, value in built.state[param].items():
            found[f"state/{name}/{key}"] = value.clone()
    return {name: value for name, value in found.items() if not name.endswith("/step")}


def read_all(path: Path) -> dict[str, Tensor]:
    """Every logical tensor of a checkpoint, flat."""
    with Reader(path) as reader:
        reader.verify()
        return {name: reader.read(name).flatten() for name in reader.names()}


def steps_in(path: Path) -> list[int]:
    with Reader(path) as reader:
        return sorted({step for group in reader.document["groups"] for step in group["steps"]})


def assert_same(left: Path, right: Path) -> None:
    """The same logical tensors, bit for bit, and the same counters."""
    mine, other = read_all(left), read_all(right)
    assert set(mine) == set(other)
    assert [name for name in mine if not torch.equal(mine[name], other[name])] == []
    assert steps_in(left) == steps_in(right)


def anywhere(world_size: int, function: Callable[..., Any], *args: Any) -> Any:
    """Run on warm ranks, or here without a process group; the first rank's answer."""
    if world_size == 1:
        return function(*args)
    return pool(world_size).run(f"{function.__module__}:{function.__name__}", *args)[0]


SAME_LAYOUT = [
    ("fsdp", 2),
    ("fsdp", 4),
    ("fsdp-tp", 4),
    ("hsdp", 4),
    ("tp", 2),
    ("replicated", 2),
    ("partitioned", 2),
    ("partitioned", 4),
    ("flat", 4),
    ("flat-concatenated", 2),
]


@pytest.mark.parametrize(("layout", "world_size"), SAME_LAYOUT)
@pytest.mark.parametrize("optimizer", KINDS)
def test_checkpoint_holds_the_logical_tensors_of_one_process(
    optimizer: str, layout: str, world_size: int, tmp_path: Path
) -> None:
    pool(world_size).run(f"{HERE}:train_and_save", optimizer, layout, tmp_path / "saved")
    found, expected = read_all(tmp_path / "saved"), one_process(optimizer)
    assert set(found) == set(expected)
    for name, value in expected.items():
        if REL[optimizer] == 0:
            assert torch.equal(found[name], value.flatten()), name
        else:
            torch.testing.assert_close(found[name], value.flatten(), rtol=0, atol=REL[optimizer] * float(value.norm()))


@pytest.mark.parametrize(("layout", "world_size"), SAME_LAYOUT)
@pytest.mark.parametrize("optimizer", KINDS)
def test_training_resumes_bit_for_bit_on_the_same_layout(
    optimizer: str, layout: str, world_size: int, tmp_path: Path
) -> None:
    differing = pool(world_size).run(f"{HERE}:interrupted_and_not", optimizer, layout, tmp_path)
    assert differing == [[]] * world_size
    assert_same(tmp_path / "went_on", tmp_path / "resumed")
    assert steps_in(tmp_path / "resumed") == [2 * STEPS]


CHAINS = [
    [("fsdp", 4), ("fsdp", 2), ("replicated", 1), ("fsdp", 4)],
    [("fsdp-tp", 4), ("flat", 2), ("partitioned", 4), ("hsdp", 4), ("flat-concatenated", 4), ("replicated", 1)],
    [("partitioned", 2), ("fsdp-tp", 4), ("tp", 2), ("fsdp", 2)],
]


@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: "-".join(f"{name}{size}" for name, size in chain))
@pytest.mark.parametrize("optimizer", OPTIONS)
def test_states_are_unchanged_by_other_layouts_and_numbers_of_ranks(
    optimizer: str, chain: list[tuple[str, int]], tmp_path: Path
) -> None:
    layout, world_size = chain[0]
    anywhere(world_size, train_and_save, optimizer, layout, tmp_path / "0")
    assert any(value.any() for name, value in read_all(tmp_path / "0").items() if name.startswith("state/"))
    for number, (layout, world_size) in enumerate(chain[1:], 1):
        source, target = tmp_path / str(number - 1), tmp_path / str(number)
        extra = anywhere(world_size, load_and_save, optimizer, layout, source, target)
        assert extra == {"steps": STEPS}
        assert_same(tmp_path / "0", target)


@pytest.mark.parametrize("optimizer", KINDS)
def test_loading_twice_gives_the_same_as_loading_once(optimizer: str, tmp_path: Path) -> None:
    pool(2).run(f"{HERE}:train_and_save", optimizer, "fsdp", tmp_path / "saved")
    pool(2).run(f"{HERE}:load_and_save", optimizer, "fsdp", tmp_path / "saved", tmp_path / "once")
    pool(2).run(f"{HERE}:load_and_save", optimizer, "fsdp", tmp_path / "once", tmp_path / "twice")
    assert_same(tmp_path / "saved", tmp_path / "twice")


def frozen_after_training(path: Path) -> list[bool]:
    """Train, freeze two parameters, go on, save, load into a model whose parameters are frozen from the start."""
    laid, model, built = build("AdamW", "fsdp")
    train("AdamW", laid, built, range(STEPS))
    frozen = ("up", "norm")
    kept = {name: {k: v.to_local().clone() for k, v in moments(built, laid, name).items()} for name in frozen}
    for name in frozen:
        laid.params[name].requires_grad_(False)
        laid.params[name].grad = None
    checkpoint.save(path, model=model, optimizer=built)
    again, model_again, resumed = build("AdamW", "fsdp", seed=2)
    for name in frozen:
        again.params[name].requires_grad_(False)
    checkpoint.load(path, model=model_again, optimizer=resumed)
    return [
        torch.equal(value, moments(resumed, again, name)[key].to_local())
        for name in frozen
        for key, value in kept[name].items()
    ]


def moments(built: distopt.Optimizer, laid: Laid, name: str) -> dict[str, DTensor]:
    return {key: value for key, value in built.state[laid.params[name]].items() if key != "step"}


def test_states_of_parameters_frozen_after_training_are_saved_and_loaded(tmp_path: Path) -> None:
    for equal in pool(2).run(f"{HERE}:frozen_after_training", tmp_path / "saved"):
        assert equal == [True] * 6


def fresh_saved(optimizer: str, path: Path) -> list[bool]:
    """Saving an optimizer that never stepped; whether each parameter is still what it was."""
    laid, model, built = build(optimizer, "fsdp")
    before = {name: local_tensor(param).clone() for name, param in laid.params.items()}
    laid.set_grads(gradients(optimizer, 0))
    built.state_dict()
    built.zero_grad()
    checkpoint.save(path, model=model, optimizer=built)
    return [torch.equal(before[name], local_tensor(param)) for name, param in laid.params.items()]


@pytest.mark.parametrize("optimizer", FROM_ZERO)
def test_saving_a_fresh_optimizer_never_steps(optimizer: str, tmp_path: Path) -> None:
    for unchanged in pool(2).run(f"{HERE}:fresh_saved", optimizer, tmp_path / "saved"):
        assert all(unchanged)
    assert steps_in(tmp_path / "saved") == [0]
    states = {name: value for name, value in read_all(tmp_path / "saved").items() if name.startswith("state/")}
    assert states
    assert not any(value.any() for value in states.values())


def partitioned_state_dict() -> str:
    laid, _, built = build("AdamW", "partitioned")
    train("AdamW", laid, built, range(1))
    try:
        built.state_dict()
    except ValueError as error:
        return str(error)
    return ""


def test_state_dict_of_partitioned_states_names_the_native_checkpoint() -> None:
    for message in pool(2).run(f"{HERE}:partitioned_state_dict"):
        assert "distopt.checkpoint.save" in message
        assert "process_group" in message
