"""Steps that do not wait for their verdict: nothing is read on the host, and what is left behind is what a step that waits
leaves. They are forced on CPU here."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import distopt
from distopt import vanishing
from distopt.deferred import Reading
from distopt.verdict import on_device
from tests.cases import Case, collect, show

BAD = 3
SHAPES = {"up": (40, 32), "down": (64, 48), "experts": (2, 24, 32), "norm": (1500,), "bias": (40,), "scale": ()}
PLAIN = {"fp32": {}}
CODED = {"int8": {"state_codec": "int8", "master_codec": "bits8"}}
LOOKS: dict[str, dict[str, Any]] = {
    "looks": {},
    "clips": {"max_grad_norm": 0.5},
    "scaler": {},
    "both": {"max_grad_norm": 0.5},
}
READS = {
    "_local_scalar_dense",
    "item",
    "nonzero",
    "equal",
    "is_nonzero",
    "masked_select",
    "unique",
    "unique_consecutive",
}
METHODS = {"item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__", "__array__", "nonzero"}


class Operators(TorchDispatchMode):
    """Refuses operators that the host would have to wait for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in READS, f"the host waits for {name}"
        if name in ("index", "index_put", "index_put_"):
            assert not any(index is not None and index.dtype == torch.bool for index in args[1]), "a mask is counted"
        return func(*args, **(kwargs or {}))


class Calls(TorchFunctionMode):
    """Refuses what reads a tensor without an operator, and numbers that are copied to the device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if not reading:
            assert name not in METHODS, f"the host waits for {name}"
            assert func is not torch.tensor or not (kwargs or {}).get("device"), "a number travels to the device"
        return func(*args, **(kwargs or {}))


reading: list[bool] = []
"""Not empty while what a step has sent is read: that has arrived."""


@pytest.fixture(autouse=True)
def _alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sums and kernels of a device, whoever waits for them."""
    for module in ("elementwise", "engine"):
        monkeypatch.setattr(f"distopt.{module}.square_sums", lambda flats: on_device(flats).tolist() if flats else [])
    monkeypatch.setattr("distopt.state.fused._native", lambda *_: None)
    tolist = Reading.tolist

    def read(self: Reading) -> list[Any]:
        reading.append(True)
        try:
            return tolist(self)
        finally:
            reading.pop()

    monkeypatch.setattr(Reading, "tolist", read)


@contextmanager
def deferring(defers: bool = True) -> Iterator[None]:
    """Optimizers that are bound within do not wait."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distopt.bound.defers", lambda *_: defers)
        yield


def build(case: Case, storage: dict[str, Any], **options: Any) -> tuple[dict[str, nn.Parameter], Any]:
    """Parameters and their optimizer, bound."""
    generator = torch.Generator().manual_seed(1)
    params = {
        name: nn.Parameter(
            (0.1 * torch.randn(shape, generator=generator)).to(
                torch.bfloat16 if "master_codec" in storage else torch.float32
            )
        )
        for name, shape in case.accepted(SHAPES).items()
    }
    variant = next(iter(case.variants.values()))
    optimizer = getattr(distopt, case.optimizer)(params.items(), **variant, **storage, **options)
    assert optimizer.state is not None
    return params, optimizer


def set_grads(params: dict[str, nn.Parameter], step: int, scale: float = 1.0, bad: bool = False) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for param in params.values():
        param.grad = (scale * torch.randn(param.shape, generator=generator)).to(param.dtype)
    if bad:
        last = list(params.values())[-1].grad
        assert last is not None
        last.view(-1)[0] = float("nan")


def run(case: Case, storage: dict[str, Any], look: str, *, guarded: bool) -> tuple[list[Tensor], Any]:
    """Six steps, one with a NaN; nothing is read in them if `guarded`. Everything there is afterwards."""
    params, optimizer = build(case, storage, nonfinite="skip", **LOOKS[look])
    scaled, norms = look in ("scaler", "both"), []
    for step in range(6):
        if case.observes is not None and step % 3 == 0 and "master_codec" not in storage:
            show(optimizer, case.observes, params, step)
        set_grads(params, step, 64.0 if scaled else 1.0, step == BAD)
        if step in (2, BAD):
            next(iter(params.values())).grad = None
        if scaled:
            optimizer.grad_scale, optimizer.found_inf = (
                torch.tensor(64.0),
                torch.tensor(float(step == BAD and look == "scaler")),
            )
        if guarded and step:  # the first one makes tables
            with Calls(), Operators():
                optimizer.step()
        else:
            optimizer.step()
        if scaled:
            assert optimizer.found_inf == (step == BAD)
        if step % 2:
            norms.append(torch.tensor(optimizer.last_grad_norm))
    assert optimizer.skipped_steps == 1
    saved = optimizer.state_dict()
    found = [*params.values(), *(p.grad for p in params.values()), *norms]
    found += [value for entry in saved["state"].values() for value in entry.values()]
    return [tensor.clone() for tensor in found], optimizer


CASES = collect()
SOLVERS = {"shampoo", "caspr"}
"""Their first variant's roots are iterated on until they are exact enough."""


@pytest.mark.parametrize("storage", [*PLAIN, *CODED])
@pytest.mark.parametrize("rule", CASES)
def test_a_step_that_does_not_wait_does_what_one_that_waits_does(rule: str, storage: str) -> None:
    stored = (PLAIN | CODED)[storage]
    for look in LOOKS if rule in ("adamw", "sgd", "lion", "adafactor", "muon", "soap", "prodigy") else ["both"]:
        expected, _ = run(CASES[rule], stored, look, guarded=False)
        with deferring():
            found, _ = run(CASES[rule], stored, look, guarded=rule not in SOLVERS)
        assert len(found) == len(expected)
        for one, other in zip(found, expected):
            assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0)), (one.shape, look)


@pytest.mark.parametrize("codec", ["fp32", "int8", "bf16_sr"])
@pytest.mark.parametrize("rule", ["adamw", "lion", "schedule_free_adamw"])
def test_pages_of_a_step_that_is_not_taken_are_what_they_were(rule: str, codec: str, short_pages: None) -> None:
    stored = {"state_codec": codec, "master_codec": "bits16", "offload": "cpu_pages"}
    expected, _ = run(CASES[rule], stored, "both", guarded=False)
    with deferring():
        found, _ = run(CASES[rule], stored, "both", guarded=False)
    for one, other in zip(found, expected):
        assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))


def test_a_step_that_waits_does_not_pass_for_one_that_does_not() -> None:
    for look in LOOKS:
        with pytest.raises(AssertionError, match="the host waits for"):
            run(CASES["adamw"], {}, look, guarded=True)


SETTLING: dict[str, Callable[[Any, nn.Parameter], Any]] = {
    "step": lambda optimizer, param: optimizer.step(),
    "state": lambda optimizer, param: optimizer.state[param],
    "state_dict": lambda optimizer, param: optimizer.state_dict(),
    "load_state_dict": lambda optimizer, param: optimizer.load_state_dict(optimizer.state_dict()),
    "add_param_group": lambda optimizer, param: optimizer.add_param_group(
        {"params": [("new", nn.Parameter(param.clone()))]}
    ),
    "deepcopy": lambda optimizer, param: copy.deepcopy(optimizer),
    "last_grad_norm": lambda optimizer, param: optimizer.last_grad_norm,
    "skipped_steps": lambda optimizer, param: optimizer.skipped_steps,
    "step_parameter": lambda optimizer, param: optimizer.step_parameter(param, 1.0),
}


@pytest.mark.parametrize("storage", [*PLAIN, *CODED])
@pytest.mark.parametrize("rule", ["adamw", "soap", "adafactor"])
@pytest.mark.parametrize("settles", SETTLING)
def test_the_error_comes_with_what_is_done_next_and_nothing_was_changed(settles: str, rule: str, storage: str) -> None:
    with deferring():
        params, optimizer = build(CASES[rule], (PLAIN | CODED)[storage])
        twins, twin = build(CASES[rule], (PLAIN | CODED)[storage])
    for step in range(2):
        for given in (params, twins):
            set_grads(given, step)
        optimizer.step()
        twin.step()
    before = {name: param.detach().clone() for name, param in params.items()}
    set_grads(params, BAD, bad=True)
    optimizer.step()
    optimizer.zero_grad()
    assert all(torch.equal(param, before[name]) for name, param in params.items())
    with pytest.raises(ValueError, match="in the last step the gradient of 'scale' was not finite"):
        SETTLING[settles](optimizer, params["up"])
    assert len(optimizer.param_groups) == 1
    for given, each in ((params, optimizer), (twins, twin)):
        set_grads(given, 4)
        each.step()
    assert optimizer.last_grad_norm == twin.last_grad_norm
    assert optimizer.skipped_steps == 0
    one, other = (each.state_dict()["state"] for each in (optimizer, twin))
    assert all(torch.equal(one[i][name], value) for i, entry in other.items() for name, value in entry.items())
    assert all(torch.equal(param, twins[name]) for name, param in params.items())


def test_the_first_parameter_at_fault_is_named_whatever_its_size() -> None:
    for name in SHAPES:
        for rule in ("adamw", "adafactor"):
            with deferring():
                params, optimizer = build(CASES[rule], {}, max_grad_norm=0.5)
            set_grads(params, 0, bad=True)
            params[name].grad.view(-1)[-1] = float("inf")  # type: ignore[union-attr]
            optimizer.step()
            with pytest.raises(ValueError, match=f"gradient of '{name}' was not finite"):
                optimizer.step()


def test_a_gradient_scaler_is_told_at_once() -> None:
    ran = []
    for defers in (True, False):
        with deferring(defers):
            params, optimizer = build(CASES["adamw"], {}, max_grad_norm=0.5)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        scales = []
        for step in range(6):
            scaler.scale(torch.zeros(()))
            set_grads(params, step, scaler.get_scale(), step in (1, BAD))
            scaler.step(optimizer)
            scaler.update()
            scales.append(torch.tensor(scaler.get_scale()))
        assert optimizer.skipped_steps == 2
        ran.append([*scales, *params.values(), *optimizer.state[params["up"]].values()])
    assert all(map(torch.equal, *ran))


def test_accumulated_and_zeroed_gradients_are_stepped_as_ever() -> None:
    ran = []
    for defers in (True, False):
        with deferring(defers):
            params, optimizer = build(CASES["muon"], CODED["int8"], nonfinite="skip", max_grad_norm=1.0)
        for step in range(6):
            for micro in range(2):
                generator = torch.Generator().manual_seed(10 * step + micro)
                loss = sum((param * torch.randn(param.shape, generator=generator)).sum() for param in params.values())
                (loss * (float("nan") if step == BAD else 1.0)).backward()  # type: ignore[union-attr]
            optimizer.step()
            optimizer.zero_grad(set_to_none=step % 2 == 0)
        ran.append([*params.values(), *optimizer.state_dict()["state"][0].values()])
    assert all(map(torch.equal, *ran))


def test_a_step_that_was_not_taken_does_not_count_as_swallowed_by_rounding(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(vanishing, "EVERY", 2)
    with deferring():
        params, _ = build(CASES["sgd"], {})
        low = {name: nn.Parameter(param.detach().bfloat16()) for name, param in params.items()}
        optimizer = distopt.SGD(low.items(), lr=1.0, nonfinite="skip")
        for step in range(4):
            set_grads(low, step, bad=step == 1)
            optimizer.step()
    assert not [warning for warning in recwarn if "vanish" in str(warning.message)]


def test_a_state_that_counts_failures_is_looked_at_without_waiting() -> None:
    with deferring():
        params, optimizer = build(CASES["soap"], {})
    for step in range(2):
        set_grads(params, step)
        optimizer.step()
    group = optimizer._bound.groups[0]
    assert group._alarms
    saved = copy.deepcopy(optimizer.state_dict())
    with torch.no_grad():
        for _, tensor, _ in group._alarms:
            tensor.fill_(9.0)
    bad = copy.deepcopy(optimizer.state_dict())
    for state in (bad, None):
        if state is not None:
            optimizer.load_state_dict(state)
        for _ in range(2):
            set_grads(params, 2)
            with pytest.raises(ValueError, match=r"failures_.* is 9, above 3"):
                optimizer.step()
    optimizer.load_state_dict(saved)
    optimizer.step()
    assert optimizer.state[params["up"]]["step"] == 3
