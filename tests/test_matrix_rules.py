"""The matrix family on bad input: gradients of any scale, zero, of rank 1; factors that are singular or not numbers."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import distopt
from distopt.matrix.eigenbasis import counted
from distopt.plan.trace import step_values
from distopt.rule import MAX_FAILURES, Rule, Shape, StateView
from distopt.rules import rule_class

SHAPES = {"tall": (12, 5), "wide": (4, 9), "square": (6, 6), "row": (1, 7), "column": (7, 1), "experts": (2, 3, 4)}
RULES: dict[str, dict[str, Any]] = {
    "Muon": {},
    "SOAP": {},
    "SOAP-short": {"precondition_frequency": 2, "max_precond_dim": 6},
    "NorMuon": {},
    "NorMuon-norm": {"adjust_lr_fn": "original"},
    "Dion2": {},
    "Shampoo": {},
    "Shampoo-newton": {"root": "newton", "precondition_frequency": 2},
    "Shampoo-qr": {"root": "qr", "precondition_frequency": 2, "betas": (0.9, 0.95)},
    "Shampoo-sgd": {"grafting": "sgd", "precondition_frequency": 2},
    "Shampoo-adagrad": {"grafting": "adagrad"},
    "Shampoo-adam": {"grafting": "adam", "max_precond_dim": 6},
    "CASPR": {"precondition_frequency": 2},
    "KLShampoo": {"precondition_frequency": 2},
    "KLShampoo-short": {"precondition_frequency": 1, "max_precond_dim": 6},
}
GRADIENTS = ("full", "zero", "rank_one", "zero_at_first", "zero_at_last")


def gradient(kind: str, shape: tuple[int, ...], step: int, steps: int) -> Tensor:
    if kind == "zero" or (kind == "zero_at_first" and step == 0) or (kind == "zero_at_last" and step == steps - 1):
        return torch.zeros(shape)
    if kind == "rank_one":
        return torch.ones(shape)
    return torch.randn(shape, generator=torch.Generator().manual_seed(step))


def drive(rule: Rule, state: dict[str, Tensor], grad: Tensor, weight: Tensor, step: int) -> Tensor:
    """One step of a rule on a whole matrix without an engine; `state` takes the new states."""
    view = StateView(state)
    run = rule.update(grad, weight, view, step_values(rule, step, Shape(*grad.shape[1:]), False))
    answer = None
    while True:
        try:
            answer = run.send(answer).x
        except StopIteration as end:
            state.update(view.new)
            weight = end.value
            return weight


def begin(name: str, size: int, **options: Any) -> tuple[Rule, dict[str, Tensor]]:
    rule = rule_class(name)(**options)
    declared = rule.states(Shape(size, size))
    shapes = {key: s.shape if s.kind == "owner" else (size, size) for key, s in declared.items()}
    return rule, {key: torch.full((1, *shape), declared[key].fill) for key, shape in shapes.items()}


@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1.0, 1e15, 1e30])
@pytest.mark.parametrize("name", RULES)
def test_updates_are_finite_at_every_scale(name: str, scale: float) -> None:
    steps = 4
    params = {f"{kind}-{key}": nn.Parameter(torch.ones(s)) for kind in GRADIENTS for key, s in SHAPES.items()}
    optimizer = getattr(distopt, name.split("-")[0])(params.items(), lr=0.1, **RULES[name])
    for step in range(steps):
        for key, param in params.items():
            param.grad = scale * gradient(key.split("-")[0], tuple(param.shape), step, steps)
        optimizer.step()
        for key, param in params.items():
            assert param.isfinite().all(), f"{key}, step {step}"
            assert all(value.isfinite().all() for value in optimizer.state[param].values()), f"{key}, step {step}"


@pytest.mark.parametrize("name", ["Shampoo", "CASPR", "Shampoo-newton"])
def test_the_step_does_not_depend_on_the_scale_of_the_gradient(name: str) -> None:
    def change(scale: float) -> Tensor:
        rule, state = begin(name.split("-")[0].lower(), 6, eps=1e-30, **RULES[name])
        weight = torch.zeros(1, 6, 6)
        for step in range(1, 5):
            weight = drive(rule, state, scale * gradient("full", (1, 6, 6), step, 0), weight, step)
        return weight

    reference = change(1.0)
    assert reference.abs().max() > 1e-3
    for scale in (1e-8, 1e6):
        rel = (change(scale) - reference).norm() / reference.norm()
        assert rel < 1e-2, f"{scale}: {rel}"
    # There each gradient is scaled down to the same largest entry, so that their weights in the means are others.
    assert 0.5 < change(1e30).norm() / reference.norm() < 2


@pytest.mark.parametrize("root", ["eigh", "newton", "qr"])
def test_a_root_that_fails_keeps_the_last_one(root: str) -> None:
    rule, state = begin("shampoo", 6, root=root)
    weight = drive(rule, state, gradient("full", (1, 6, 6), 0, 0), torch.zeros(1, 6, 6), 1)
    last = state["root_left"]
    state["factor_left"] = state["factor_left"].clone()
    state["factor_left"][0, 2, 3] = torch.nan
    moved = drive(rule, state, gradient("full", (1, 6, 6), 1, 0), weight, 2)
    assert torch.equal(state["root_left"], last)
    assert moved.isfinite().all()
    assert not torch.equal(moved, weight)


def test_a_basis_that_fails_keeps_the_last_one() -> None:
    rule, state = begin("kl_shampoo", 6, precondition_frequency=1)
    weight = drive(rule, state, gradient("full", (1, 6, 6), 0, 0), torch.zeros(1, 6, 6), 1)
    last = state["basis_left"]
    state["factor_left"] = torch.full((1, 6, 6), torch.nan)
    moved = drive(rule, state, gradient("full", (1, 6, 6), 1, 0), weight, 2)
    assert torch.equal(state["basis_left"], last)
    assert moved.isfinite().all()
    assert not torch.equal(moved, weight)


def test_roots_change_at_multiples_of_the_frequency_only() -> None:
    rule, state = begin("shampoo", 6, precondition_frequency=3)
    weight, changed = torch.zeros(1, 6, 6), []
    for step in range(1, 10):
        before = state["root_left"]
        weight = drive(rule, state, gradient("full", (1, 6, 6), step, 0), weight, step)
        if not torch.equal(before, state["root_left"]):
            changed.append(step)
    assert changed == [1, 3, 6, 9]


def test_dion2_moves_the_selected_rows_and_lets_the_others_grow() -> None:
    rule, state = begin("dion2", 8, fraction=0.25, ef_decay=0.5, weight_decay=0.0)
    grad = torch.ones(1, 8, 8) * torch.arange(1.0, 9.0)[:, None]
    moved = []
    weight = torch.zeros(1, 8, 8)
    for step in range(1, 4):
        new = drive(rule, state, grad, weight, step)
        moved.append((new != weight).any(-1)[0].nonzero().flatten().tolist())
        weight = new
    # Row i gains i a step: 7, 8 | 2·6, 7/2 + 7, 8/2 + 8 | 3·5, 12/2 + 6, 10.5 + 7, 12/2 + 8.
    assert moved == [[6, 7], [5, 7], [4, 6]]


def test_bad_options_are_refused() -> None:
    matrix = nn.Parameter(torch.ones(4, 4))
    wrong: list[tuple[str, dict[str, Any], str]] = [
        ("Shampoo", {"root": "cholesky"}, "cholesky"),
        ("Shampoo", {"grafting": "lion"}, "lion"),
        ("Shampoo", {"eps": 0.0}, "eps"),
        ("Shampoo", {"precondition_frequency": 0}, "precondition_frequency"),
        ("CASPR", {"max_precond_dim": 0}, "max_precond_dim"),
        ("KLShampoo", {"init_factor": 0.0}, "init_factor"),
        ("NorMuon", {"adjust_lr_fn": "frobenius"}, "adjust_lr_fn"),
        ("NorMuon", {"eps": 0.0}, "eps"),
        ("Dion2", {"fraction": 0.0}, "fraction"),
    ]
    for name, options, match in wrong:
        with pytest.raises(ValueError, match=match):
            getattr(distopt, name)([matrix], **options)
    for name in ("NorMuon", "KLShampoo", "Dion2"):
        with pytest.raises(ValueError, match=r"needs a matrix.*rule='adamw'"):
            getattr(distopt, name)([("bias", nn.Parameter(torch.ones(4)))])


@pytest.mark.parametrize("name", [name for name in RULES if "Shampoo" in name or name in ("CASPR", "SOAP")])
def test_a_root_that_keeps_failing_is_counted_and_then_an_error(name: str) -> None:
    """With the check of gradients off, a NaN stays in the factors for good."""
    options = {**RULES[name], "precondition_frequency": 1, "max_precond_dim": 100}
    weight = nn.Parameter(torch.zeros(6, 6))
    optimizer = getattr(distopt, name.split("-")[0])([("w", weight)], nonfinite=None, **options)
    for step in range(2):
        weight.grad = gradient("full", (6, 6), step, 2)
        optimizer.step()
    kept = {
        key: value.clone() for key, value in optimizer.state[weight].items() if key.split("_")[0] in ("root", "basis")
    }
    weight.grad = torch.full((6, 6), torch.nan)
    for _ in range(MAX_FAILURES + 1):
        optimizer.step()
    with pytest.raises(ValueError, match=r"'w': failures_left is 4, above 3"):
        optimizer.step()
    state = optimizer.state[weight]
    assert state["failures_left"].item() == state["failures_right"].item() == MAX_FAILURES + 1
    assert kept and all(torch.equal(state[key], value) for key, value in kept.items()), "the last good ones are kept"


def test_a_root_that_fails_once_is_forgiven() -> None:
    assert counted(torch.full((2, 1, 1), 2.0), torch.tensor([True, False])).flatten().tolist() == [0, 3]
