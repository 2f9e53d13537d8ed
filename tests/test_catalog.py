"""What `list_optimizers` and `optimizer_info` say is what optimizers do."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import distopt
from distopt.quasi_newton import DRIVERS
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


@pytest.mark.parametrize("name", RULES)
def test_gradients_that_are_cleared_are_freed(name: str) -> None:
    """After a step, and after one that was skipped: a backward pass that follows needs the memory."""
    params = [nn.Parameter(torch.randn(40, 50)) for _ in range(2)]
    build: Callable[..., distopt.Optimizer] = getattr(distopt, distopt.optimizer_info(name).optimizer)
    built = build([("w", params[0]), ("v", params[1])], nonfinite="skip")
    for number in (1.0, torch.inf):
        for param in params:
            param.grad = torch.full((40, 50), number)
        storages = [StorageWeakRef(param.grad.untyped_storage()) for param in params]
        built.step()
        built.zero_grad()
        assert all(storage.expired() for storage in storages)


@pytest.mark.parametrize("name", DRIVERS)
def test_states_of_quasi_newton_methods_have_the_shapes_that_the_catalog_names(name: str) -> None:
    info = distopt.optimizer_info(name)
    param = nn.Parameter(torch.zeros(6, 10))
    optimizer = getattr(distopt, info.optimizer)([("w", param)])
    sizes = {"rows": 6, "cols": 10, "n": 60, "history_size": info.defaults.get("history_size")}
    shapes = {key: tuple(sizes[word] for word in shape.split(" × ")) for key, shape in info.matrix_states.items()}
    kept = {key: tuple(value.shape) for key, value in optimizer.state[param].items() if key != "progress"}
    assert kept == shapes


@pytest.mark.parametrize("name", distopt.list_optimizers())
def test_every_optimizer_names_its_source_the_units_of_lr_and_where_to_start(name: str) -> None:
    """In its docstrings: the module's begins with the source, the class's has a paragraph that begins with "lr" and one
    that begins with "Start: " and gives values and where they come from."""
    info = distopt.optimizer_info(name)
    assert "(" in info.source
    assert any(char.isdigit() for char in info.source)
    assert info.lr
    assert "lr" in info.start
    assert info.start.endswith(").")
    assert any(char.isdigit() for char in info.start) or "Muon's" in info.start
    assert "lr" in info.defaults


def test_all_names_are_listed_and_none_twice() -> None:
    assert distopt.list_optimizers() == [*RULES, *DRIVERS]
    assert len(set(distopt.list_optimizers())) == len(RULES) + len(DRIVERS)


@pytest.mark.parametrize("name", DRIVERS)
def test_quasi_newton_methods_are_created_by_name(name: str) -> None:
    model = nn.Linear(3, 2)
    optimizer = distopt.create_optimizer(name, model, lr=0.5)
    assert type(optimizer).__name__ == DRIVERS[name]
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    with pytest.raises(ValueError, match=r"weight_decay=0\.1: .* add it to the closure's loss"):
        distopt.create_optimizer(name, model, lr=0.5, weight_decay=0.1)


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'adamw'"):
        distopt.optimizer_info("adanw")
    with pytest.raises(ValueError, match="did you mean 'lbfgs'"):
        distopt.optimizer_info("lbgfs")
    with pytest.raises(ValueError, match="did you mean 'lbfgs'"):
        distopt.create_optimizer("LBGFS", nn.Linear(2, 2), lr=1.0)
    with pytest.raises(ValueError, match="did you mean 'adam'"):
        distopt.state_bytes("adamv", {"w": (4, 4)})
