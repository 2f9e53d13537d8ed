"""Every update rule in one process: against its oracles, in torch.optim's terms, and the references against the public.

rel is ‖Δ − Δref‖ / ‖Δref‖ of a parameter's change after 8 steps on identical fixed gradients.
"""

import inspect
from dataclasses import replace
from functools import cache

import pytest
import torch
from _pytest.mark import ParameterSet
from torch import Tensor, nn

import distopt
from distopt.rules import RULES, rule_class
from tests.cases import MIXED, Case, Oracle, Shape, collect, observation, show

STEPS = 8
# The tolerances speak of rounding in the change; larger weights would add rounding of the weights themselves.
WEIGHT_SCALE = 0.02


@cache
def start(shape: Shape) -> tuple[Tensor, list[Tensor]]:
    """A weight and the gradients of all steps, float32 values."""
    generator = torch.Generator().manual_seed(sum(size * 1000**i for i, size in enumerate(shape, 1)) + len(shape))
    weight = WEIGHT_SCALE * torch.randn(shape, generator=generator)
    grads = [torch.randn(shape, generator=generator) for _ in range(STEPS)]
    if weight.numel() == 1:  # eight steps of one element could cancel, and their sum be nothing but rounding
        grads = [grad.abs() for grad in grads]
    return weight, grads


def distance(result: Tensor, reference: Tensor, weight: Tensor) -> float:
    """rel, as above; 0 where nothing changes."""
    change = (reference.double() - weight.double()).norm().item()
    error = (result.double() - reference.double()).norm().item()
    return float(error / change if change else error)


@cache
def ours(name: str, variant: str) -> dict[str, Tensor]:
    """The weights after the last step, all shapes in one optimizer if they have nothing to do with each other."""
    case = collect()[name]
    params = {key: nn.Parameter(start(shape)[0].clone()) for key, shape in case.accepted(MIXED).items()}
    for together in [[item] for item in params.items()] if case.alone else [list(params.items())]:
        optimizer = getattr(distopt, case.optimizer)(together, **case.variants[variant])
        for step in range(STEPS):
            if case.observes and step % 3 == 0:
                show(optimizer, case.observes, dict(together), step)
            for key, param in together:
                param.grad = start(MIXED[key])[1][step].clone()
            optimizer.step()
    return {key: param.detach() for key, param in params.items()}


def observed_kind(case: Case) -> str:
    """Whether it is like a gradient or per row."""
    assert case.observes is not None
    rule = rule_class(next(name for name, cls in RULES.items() if cls == case.optimizer))
    return rule.observes[case.observes]


def theirs(oracle: Oracle, case: Case, variant: str, shape: Shape) -> Tensor:
    """The weight that an oracle arrives at."""
    weight, grads = start(shape)
    shown = {}
    if case.observes:
        steps = range(0, STEPS, 3)
        shown["observed"] = {s: observation(observed_kind(case), shape, s).to(oracle.dtype) for s in steps}
    grads = [grad.to(oracle.dtype) for grad in grads]
    return oracle.run(weight.to(oracle.dtype), grads, **shown, **case.variants[variant])


def comparisons(public_only: bool = False) -> list[ParameterSet]:
    """All (case, variant, oracle); or those whose oracle is public and whose mathematics the naive reference has."""
    rows = []
    for name, case in collect().items():
        [reference] = [oracle for oracle in case.oracles if oracle.name == "reference"]
        for oracle in case.oracles:
            for variant in filter(oracle.has, case.variants):
                comparable = oracle.dtype is not torch.float64 and reference.has(variant)
                if comparable or not public_only:
                    rows.append(pytest.param(name, variant, oracle, id=f"{name}-{variant}-{oracle.name}"))
    return rows


@pytest.mark.parametrize(("name", "variant", "oracle"), comparisons())
def test_rule_agrees_with_its_oracle(name: str, variant: str, oracle: Oracle) -> None:
    case = collect()[name]
    shapes = {key: s for key, s in case.accepted(MIXED).items() if oracle.where(s, case.variants[variant])}
    assert shapes, "an oracle that is compared on no shape says nothing"
    rel = {
        key: distance(ours(name, variant)[key], theirs(oracle, case, variant, shape), start(shape)[0])
        for key, shape in shapes.items()
    }
    assert all(value <= oracle.rel for value in rel.values()), f"limit {oracle.rel} ({oracle.why}): {rel}"


ENTRYWISE = [name for name in collect() if rule_class(name).reach != "matrix"]


@pytest.mark.parametrize("name", ENTRYWISE)
def test_ours_loses_no_more_digits_than_float32_itself(name: str) -> None:
    """Where a change is small beside the weight, rounding of the weight alone is above 2e-6 of it: then the naive
    reference, run in float32, is as far from itself in float64 as ours is."""
    case = collect()[name]
    [reference] = [oracle for oracle in case.oracles if oracle.name == "reference"]
    in_float32 = replace(reference, dtype=torch.float32)
    for variant in filter(reference.has, case.variants):
        for key, shape in case.accepted(MIXED).items():
            weight, exact = start(shape)[0], theirs(reference, case, variant, shape)
            found = distance(ours(name, variant)[key], exact, weight)
            rounding = distance(theirs(in_float32, case, variant, shape), exact, weight) if found > 2e-6 else 0.0
            assert found <= max(2e-6, 1.5 * rounding), f"{variant}, {key}: {found}, float32 {rounding}"


@pytest.mark.parametrize(("name", "variant", "oracle"), comparisons(public_only=True))
def test_reference_agrees_with_the_public_implementation(name: str, variant: str, oracle: Oracle) -> None:
    case = collect()[name]
    [reference] = [o for o in case.oracles if o.name == "reference"]
    options = case.variants[variant]
    for shape in case.accepted(MIXED).values():
        if oracle.where(shape, options) and reference.where(shape, options):
            weight, grads = start(shape)[0].double(), [grad.double() for grad in start(shape)[1]]
            result = oracle.run(weight, grads, **options)
            rel = distance(result, reference.run(weight, grads, **options), weight)
            assert rel < 1e-6, f"{shape}: {rel}, in float64"


@pytest.mark.parametrize(
    ("name", "dtype"), [(name, dtype) for name, case in collect().items() for dtype in case.dtypes]
)
def test_low_precision_weights_are_rounded_once(name: str, dtype: torch.dtype) -> None:
    """The first update of bf16 or fp16 weights is the exact one, computed in float32 and rounded once."""
    case = collect()[name]
    [oracle] = [oracle for oracle in case.oracles if oracle.name == "reference"]
    options = next(iter(case.variants.values())) | {"lr": 0.1}
    first = {key: start(s)[0].to(dtype) for key, s in case.accepted(MIXED).items() if oracle.where(s, options)}
    params = {key: nn.Parameter(weight.clone()) for key, weight in first.items()}
    grads = {key: [grad.to(dtype) for grad in start(MIXED[key])[1][: case.first_update]] for key in first}
    optimizer = getattr(distopt, case.optimizer)(params.items(), **options)
    for step in range(case.first_update):
        for key, param in params.items():
            param.grad = grads[key][step].clone()
        optimizer.step()
    for key, param in params.items():
        exact = oracle.run(first[key].double(), [grad.double() for grad in grads[key]], **options)
        assert param.dtype is dtype
        assert param.numel() == 0 or not torch.equal(param, first[key]), f"{key} did not move"
        # Half a unit in the last place; the absolute term is the error of float32 where weight and update cancel.
        unit = torch.finfo(dtype).eps / 2
        assert torch.allclose(param.detach().double(), exact, rtol=1.01 * unit, atol=2e-5), key


@pytest.mark.parametrize("name", collect())
def test_a_parameter_whose_first_gradient_comes_late_is_trained(name: str) -> None:
    case = collect()[name]
    weight, grads = start((32, 32))

    def change(first_step: int) -> float:
        early, param = (nn.Parameter(weight.clone()) for _ in range(2))
        optimizer = getattr(distopt, case.optimizer)([("early", early), ("late", param)], lr=0.01)
        for step in range(STEPS):
            early.grad = grads[step].clone()
            param.grad = grads[step - first_step].clone() if step >= first_step else None
            optimizer.step()
            if step < first_step:
                assert torch.equal(param, weight)
        return float((param - weight).norm())

    # Counters belong to groups, so bias corrections may differ from a parameter's own; the size of the change does not.
    on_time, delayed = change(first_step=0), change(first_step=2)
    assert 0.3 * on_time < delayed < 1.2 * on_time


def test_every_rule_has_a_case() -> None:
    assert list(RULES.values()) == [collect()[name].optimizer for name in RULES]
    assert set(collect()) == set(RULES)


@pytest.mark.parametrize("name", collect())
def test_constructor_has_the_arguments_of_torch(name: str) -> None:
    case = collect()[name]
    if case.torch_class is None:
        pytest.skip("torch has no such class")
    implementation = {"foreach", "fused", "capturable", "differentiable"}
    theirs = dict(inspect.signature(case.torch_class).parameters)
    positional = [p for p in theirs.values() if p.kind is p.POSITIONAL_OR_KEYWORD and p.name not in implementation]
    own = dict(inspect.signature(getattr(distopt, case.optimizer)).parameters)
    assert list(own)[: len(positional)] == [p.name for p in positional]
    for parameter in theirs.values():
        if parameter.name not in implementation:
            assert own[parameter.name].default == parameter.default, parameter.name
