"""Many fp32 parameters, stepped where they are by one compiled call."""

import math
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import distopt
from distopt.kernels import native
from distopt.state import allocation, placed
from distopt.state.lying import MANY

pytestmark = pytest.mark.skipif(native.build("Lion", ("Fp32",)) is None, reason="needs a C++ compiler")

SHAPES = [(7,), (3, 5), (1,), (0,), (130,), (16, 8), (2, 3, 4), (5000,), (300, 401)] * 8
RULES: list[tuple[str, dict[str, Any]]] = [
    ("AdamW", {"weight_decay": 0.1}),
    ("AdamW", {"max_grad_norm": 0.5, "maximize": True}),
    ("SGD", {"momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01}),
    ("SGD", {"momentum": 0.9, "nesterov": True}),
    ("Lion", {"weight_decay": 0.1}),
]


def trained(rule: str, options: dict[str, Any], *, steps: int = 5, odd: bool = True) -> tuple[list[Tensor], Any]:
    """Weights and states after some steps in which gradients are missing, strided, or of a channels_last weight."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    if odd:
        params.append(
            nn.Parameter(torch.randn((4, 3, 2, 2), generator=generator).to(memory_format=torch.channels_last))
        )
    built = getattr(distopt, rule)([(f"p{i}", p) for i, p in enumerate(params)], lr=1e-2, **options)
    for number in range(steps):
        for i, param in enumerate(params):
            grad = torch.randn(param.shape, generator=generator) * 10.0 ** (i % 5 - 3)
            if odd and i % 7 == 2 and grad.ndim == 2:
                grad = grad.t().contiguous().t()
            param.grad = None if odd and number == 2 and i % 9 == 4 else grad
        built.step()
    states = [built.state[param][name] for param in params for name in built.state[param] if name != "step"]
    return [param.detach() for param in params] + states, built


@pytest.mark.parametrize(("rule", "options"), RULES)
def test_the_bits_are_those_of_the_steps_that_need_no_compiler(
    rule: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, built = trained(rule, options)
    assert built._bound.groups[0].placed is not None
    monkeypatch.setattr("distopt.elementwise.MANY", 10**9)
    expected, other = trained(rule, options)
    assert other._bound.groups[0].placed is None
    if "max_grad_norm" in options:  # the norm is added up in another order
        assert built.last_grad_norm == pytest.approx(other.last_grad_norm, rel=1e-6)
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(found, expected))
    else:
        assert all(map(torch.equal, found, expected))


def test_as_torchs_own_over_steps() -> None:
    found, _ = trained("AdamW", {"nonfinite": None}, odd=False)
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    torchs = torch.optim.AdamW(params, lr=1e-2, fused=True)
    for _ in range(5):
        for i, param in enumerate(params):
            param.grad = torch.randn(param.shape, generator=generator) * 10.0 ** (i % 5 - 3)
        torchs.step()
    for mine, other in zip(found, params):
        assert torch.equal(
            mine.view(-1)[: mine.numel() // 16 * 16], other.detach().view(-1)[: other.numel() // 16 * 16]
        )
        assert torch.allclose(mine, other.detach(), rtol=1e-6)


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    for bad in (float("nan"), float("inf")):
        found, built = trained("AdamW", {}, odd=False)
        before = [tensor.clone() for tensor in found]
        built.param_groups[0]["params"][-1].grad.view(-1)[-1] = bad
        with pytest.raises(ValueError, match=f"the gradient of 'p{len(SHAPES) - 1}' is not finite"):
            built.step()
        assert all(map(torch.equal, found, before))


def test_large_and_small_gradients_have_an_exact_norm() -> None:
    for scale in (1e25, 1e-15):
        params = [nn.Parameter(torch.zeros(100)) for _ in range(MANY)]
        built = distopt.AdamW([(f"p{i}", p) for i, p in enumerate(params)], lr=1e-3)
        for param in params:
            param.grad = torch.full((100,), scale)
        built.step()
        assert built.last_grad_norm == pytest.approx(scale * (100 * MANY) ** 0.5, rel=1e-6, abs=0)


def test_a_parameter_whose_storage_was_exchanged_is_refused_before_anything_changes() -> None:
    _, built = trained("AdamW", {}, odd=False)
    first, last = built.param_groups[0]["params"][0], built.param_groups[0]["params"][-1]
    before = first.detach().clone()
    last.data = torch.zeros(3)
    last.grad = torch.zeros(3)
    with pytest.raises(ValueError, match="had 120300 elements on cpu here when the optimizer was bound, and has 3"):
        built.step()
    assert torch.equal(first.detach(), before)
    last.data = torch.ones(300, 401)  # the same size again, elsewhere
    last.grad = torch.ones(300, 401)
    built.step()
    assert not torch.equal(first.detach(), before) and bool((last != 1).all())


def many(shape: tuple[int, ...], rule: str = "AdamW", *, count: int = MANY, **options: Any) -> tuple[Any, Any]:
    """Parameters of a shape, with gradients, and an optimizer of them."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for _ in range(count)]
    for param in params:
        param.grad = torch.randn(shape, generator=generator)
    return params, getattr(distopt, rule)([(f"p{i}", p) for i, p in enumerate(params)], lr=1e-2, **options)


@pytest.mark.parametrize("codec", ["fp32", "int8"])
def test_weights_that_shrank_under_their_gradients_are_refused(codec: str) -> None:
    params, built = many((50, 60), state_codec=codec)
    built.step()
    before = params[0].detach().clone()
    params[-1].data = torch.empty(0)
    with pytest.raises(ValueError, match="had 3000 elements on cpu here when the optimizer was bound, and has 0"):
        built.step()
    assert torch.equal(params[0], before)
    params[-1].grad = None
    params[-1].data = torch.zeros(3)
    params[-1].grad = torch.zeros(3)
    with pytest.raises(ValueError, match="and has 3 on cpu"):
        built.step()


def test_memory_that_was_freed_is_refused() -> None:
    params, built = many((40,))
    params[3].grad.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="the gradient of 'p3' has no memory"):
        built.step()
    params[3].grad = torch.ones(40)
    params[5].data.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="'p5' has no memory"):
        built.step()


def test_states_that_were_moved_to_shared_memory_are_found() -> None:
    params, built = many((50, 60))
    twins, other = many((50, 60))
    for _ in range(2):
        built.step()
        other.step()
        for param in params:
            for value in built.state[param].values():
                value.share_memory_()
    assert all(map(torch.equal, params, twins))
    states = [(built.state[p]["exp_avg"], other.state[q]["exp_avg"]) for p, q in zip(params, twins)]
    assert all(torch.equal(a, b) for a, b in states)


def test_nesterov_may_be_switched_on() -> None:
    params, built = many((40,), "SGD", momentum=0.9)
    twins = [nn.Parameter(param.detach().clone()) for param in params]
    for twin, param in zip(twins, params):
        twin.grad = param.grad.clone()
    torchs = torch.optim.SGD(twins, lr=1e-2, momentum=0.9)
    for optimizer in (built, torchs):
        optimizer.step()
        optimizer.param_groups[0]["nesterov"] = True
        optimizer.step()
    assert all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(params, twins))


def test_nesterov_switched_on_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for compiler in (True, False):
        params, built = many((4, 10), "SGD", momentum=0.9)
        params[1].data = params[1].data.t().contiguous().t()
        built.step()
        built.param_groups[0]["nesterov"] = True
        if not compiler:
            monkeypatch.setattr(placed, "exact_kernel", lambda _: None)
        params[0].grad = None
        built.step()
        found.append(params)
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("codec", ["fp32", "int8"])
def test_a_backward_pass_knows_that_weights_were_changed(codec: str) -> None:
    params, built = many((50, 60), state_codec=codec)
    loss = torch.stack([param.square().sum() for param in params]).sum()
    loss.backward(retain_graph=True)
    built.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradients_are_left_clipped() -> None:
    params, built = many((4, 10), max_grad_norm=0.1)
    params[1].grad = params[1].grad.t().contiguous().t()
    params[2].grad = torch.ones(()).expand(4, 10)  # which cannot be written to
    built.step()
    left = [param.grad for i, param in enumerate(params) if i != 2] + [torch.full((40,), 0.1 / built.last_grad_norm)]
    norm = torch.stack([grad.norm() for grad in left]).norm().item()
    assert norm == pytest.approx(0.1, rel=1e-4)


@pytest.mark.parametrize("bad", [1.0, math.inf])
@pytest.mark.parametrize("shape", [(40,), (100, 101)])
def test_gradients_that_are_cleared_are_freed(shape: tuple[int, ...], bad: float) -> None:
    """Those of a step that is skipped as well."""
    params, built = many(shape, nonfinite="skip")
    params[1].grad.view(-1)[0] = bad
    built.step()
    assert built.skipped_steps == (bad == math.inf)
    grad = weakref.ref(params[0].grad)
    built.zero_grad()
    assert grad() is None


@pytest.mark.parametrize("count", [3, MANY])
@pytest.mark.parametrize("shape", [(40,), (200, 101)])
def test_a_gradient_that_two_parameters_have_alike_is_clipped_once(count: int, shape: tuple[int, ...]) -> None:
    """As torch.autograd.grad gives it: torch's own clipping multiplies it twice."""
    params, built = many(shape, count=count, max_grad_norm=1.0)
    params[1].data.copy_(params[0].data)
    params[1].grad = params[0].grad
    built.step()
    assert torch.equal(params[0], params[1])
    norm = torch.stack([param.grad.norm() for param in params]).norm().item()
    assert norm == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("size", [30, 50])
@pytest.mark.parametrize("what", ["weight", "gradient"])
def test_a_small_parameter_of_another_size_is_refused_before_anything_changes(what: str, size: int) -> None:
    params, built = many((40,), count=3)
    built.step()
    before = [param.detach().clone() for param in params]
    params[1].grad = None
    params[1].data = torch.ones(size)
    params[1].grad = torch.ones(size)  # torch wants them alike now
    if what == "weight":
        before[1] = params[1].detach().clone()
    else:
        params[1].data = before[1].clone()
    with pytest.raises(ValueError, match=f"'p1' had 40 elements on cpu here .* has {size}"):
        built.step()
    assert all(map(torch.equal, params, before))


def test_gradients_are_not_touched_where_there_is_no_kernel_and_nothing_to_clip(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    params, built = many((40,))
    monkeypatch.setattr(placed, "exact_kernel", lambda rule: None)
    versions = [param.grad._version for param in params]
    built.step()
    assert versions == [param.grad._version for param in params]


def test_overlapping_gradients_are_stepped_alike_on_any_number_of_threads() -> None:
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            params, built = many((100, 101), max_grad_norm=1.0)
            params[1].data.copy_(params[0].data)
            params[1].grad = params[0].grad.view(100, 101)
            built.step()
            found.append(torch.stack([param.detach() for param in params]))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)
    assert torch.equal(found[0][0], found[0][1])


def test_any_number_of_threads_finds_the_same_norm() -> None:
    threads, found = torch.get_num_threads(), set()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            _, built = many((100, 101), count=MANY + 1)
            built.step()
            found.add(built.last_grad_norm)
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 1


def test_states_are_fp32_whatever_the_default_is() -> None:
    params, built = many((40,))
    built.step()
    torch.set_default_dtype(torch.float64)
    try:
        twins = [nn.Parameter(torch.empty(40, dtype=torch.float32)) for _ in params]
        other = distopt.AdamW([(f"p{i}", p) for i, p in enumerate(twins)], lr=1e-2)
        fresh = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for twin in twins:
                twin.copy_(torch.randn(40, generator=fresh, dtype=torch.float32))
        for twin, param in zip(twins, params):
            twin.grad = param.grad
        other.step()
    finally:
        torch.set_default_dtype(torch.float32)
    assert other.state[twins[0]]["exp_avg"].dtype == torch.float32
    assert all(map(torch.equal, params, twins))


STARVED = """
import resource, torch, distopt
from torch import nn
from distopt.state.lying import MANY
torch.set_num_threads(1)
params = [nn.Parameter(torch.ones(10_000)) for _ in range(MANY)]
built = distopt.AdamW([(f"p{i}", p) for i, p in enumerate(params)], lr=1e-2)
for param in params:
    param.grad = torch.ones_like(param)
built.step()
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (4 << 20), -1))  # no stack has room
torch.set_num_threads(4)
built.step()
print(built.last_grad_norm, params[-1][-1].item())
"""


def test_a_step_is_taken_where_the_system_has_no_threads_left() -> None:
    done = subprocess.run([sys.executable, "-c", STARVED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1000:]
    norm, weight = map(float, done.stdout.split())
    assert norm == pytest.approx(math.sqrt(10_000 * MANY))
    assert weight == pytest.approx(0.98, rel=1e-3)  # two steps of lr


@pytest.mark.parametrize("maximize", [False, True])
def test_gradients_are_scaled_once_as_they_are_stepped(maximize: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> tuple[list[Tensor], bool]:
        generator = torch.Generator().manual_seed(0)
        params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
        built = distopt.AdamW([(f"p{i}", p) for i, p in enumerate(params)], lr=1e-2, maximize=maximize, nonfinite=None)
        built.grad_scale, built.found_inf = torch.tensor(24.0), torch.tensor(0.0)
        found = []
        for number in range(3):
            for i, param in enumerate(params):
                grad = torch.randn(param.shape, generator=generator)
                param.grad = None if number == 0 and i % 9 == 7 else grad  # which then are a step behind
            versions = [-1 if param.grad is None else param.grad._version for param in params]
            built.step()
            grads = [param.grad for param in params if param.grad is not None]
            assert all(p.grad is None or p.grad._version > v or not p.numel() for p, v in zip(params, versions))
            found += [grad.clone() for grad in grads]
        return [param.detach() for param in params] + found, built._bound.groups[0].placed is not None

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        mine, placed_here = run()
        monkeypatch.setattr("distopt.elementwise.MANY", 10**9)
        other, placed_there = run()
    finally:
        torch.set_num_threads(threads)
    assert placed_here and not placed_there
    assert all(map(torch.equal, mine, other))


@pytest.mark.parametrize("policy", ["always [madvise] never", "always madvise [never]", None])
def test_weights_keep_their_address_and_numbers_in_huge_pages(
    policy: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = tmp_path / "enabled"
    if policy is not None:
        said.write_text(policy)
    monkeypatch.setattr(allocation, "HUGE_PAGES", said)
    whole = torch.randn(3 * allocation.LARGE // 4)
    for tensor in (whole, whole[1:], whole[:10], torch.empty(0)):
        before, address = tensor.clone(), tensor.data_ptr()
        allocation.collapse(tensor)
        assert torch.equal(tensor, before)
        assert tensor.data_ptr() == address
