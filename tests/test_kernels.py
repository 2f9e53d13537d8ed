"""Kernels against what they replace: compiled C++ on CPU, Triton in its interpreter and compiled without a GPU."""

import os
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

import distopt
from distopt import elementwise, engine, verdict
from distopt.kernels import native
from distopt.kernels.jobs import Coding, Job, table
from distopt.matrix.newton_schulz import orthogonalize
from distopt.state import fused
from distopt.state.codecs import CODECS
from distopt.state.master import MASTERS, Master
from tests.distributed.pool import pool
from tests.test_codecs import every_code, stores

ROOT = Path(__file__).parents[1]
SHAPES = {"whole": (40, 256), "ragged": (37, 100), "vector": (5000,), "large": (300, 512), "small": (10,)}
RULES: dict[str, dict[str, Any]] = {
    "AdamW": {},
    "Lion": {"weight_decay": 0.1},
    "SGD": {"momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01},
}

needs_compiler = pytest.mark.skipif(native.build("Lion", ("Int8",)) is None, reason="needs a C++ compiler")


def trained(
    rule: str, codec: Any, steps: int = 4, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[list[Tensor], Any]:
    """Weights after some steps, one of which lacks a gradient, and the optimizer."""
    generator = torch.Generator().manual_seed(0)
    params = {name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in SHAPES.items()}
    built = getattr(distopt, rule)(params.items(), lr=1e-2, state_codec=codec, **RULES[rule], **options)
    for number in range(steps):
        for name, param in params.items():
            noise, spread = (torch.randn(param.shape, generator=generator) for _ in range(2))
            param.grad = None if number == 2 and name == "ragged" else (noise * spread.exp()).to(dtype)
        built.step()
    return [param.detach() for param in params.values()], built


@pytest.fixture
def without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    fused._native.cache_clear()
    monkeypatch.setattr(native, "build", lambda *_: None)
    yield
    fused._native.cache_clear()


@needs_compiler
@pytest.mark.parametrize(("rule", "codec"), [*product(RULES, ["int8", "bf16"]), ("AdamW", {"exp_avg": "int8"})])
def test_a_compiled_step_is_the_rules_own(
    rule: str, codec: Any, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []
    find = fused.Fused.find
    monkeypatch.setattr(fused.Fused, "find", lambda self, unit: taken.append(find(self, unit)) or taken[-1])
    weights, built = trained(rule, codec)
    assert taken and all(taken)
    request.getfixturevalue("without_compiler")
    taken.clear()
    expected, reference = trained(rule, codec)
    assert taken and not any(taken)
    for weight, other in zip(weights, expected):
        assert (weight - other).norm() <= 1e-5 * other.norm()
    for mine, other in zip(stores(built), stores(reference)):
        assert torch.allclose(mine.scales, other.scales, rtol=1e-3)
        apart = (mine.stored.float() - other.stored.float()).abs()
        assert apart.ne(0).float().mean() <= (1e-3 if mine.codec.scaled else 5e-3)
        assert not mine.codec.scaled or apart.max() <= 1


@needs_compiler
def test_all_units_of_a_kind_are_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, made = [], fused.Table
    monkeypatch.setattr(fused, "Table", lambda rows, *others: calls.append(len(rows)) or made(rows, *others))
    trained("AdamW", "int8")
    assert calls == [4, 4, 3, 1, 3], "four units, of which one lacks a gradient in the third step, and is younger then"


@needs_compiler
def test_a_compiled_step_gives_the_same_bits_with_any_number_of_threads() -> None:
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            param = nn.Parameter(torch.linspace(-1, 1, 700 * 1000).view(700, 1000))
            built = distopt.AdamW([param], state_codec="int8")
            for _ in range(2):
                param.grad = param.detach().sin()
                built.step()
            found.append(
                [param.detach(), *(tensor for store in stores(built) for tensor in (store.stored, store.scales))]
            )
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *found))


@needs_compiler
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("name", ["int8", "bf16", "fp32"])
def test_compiled_codecs_give_back_every_code(name: str, signed: bool) -> None:
    codec = CODECS[name](signed)
    kernel = native.build("SGD", (native.CODECS[type(codec).__name__, signed],))
    assert kernel is not None
    codes = torch.arange(512 * 128).remainder(255 if signed else 256).view(512, 128) - 127 * signed
    codes[:, 0] = 127 if signed else 255  # the scale is that of the largest
    codes = codes.view(-1).to(codec.dtype)
    if name == "bf16":
        codes = (torch.arange(1 << 16) - (1 << 15)).to(torch.int16).view(torch.bfloat16)
        codes = torch.where(codes.isfinite(), codes, 0)
    scales = torch.logspace(-27, 37, 512)
    stored, kept = codes.clone(), scales.clone()
    weight = torch.zeros(1 << 16)
    coding = Coding(stored, kept if codec.scaled else None)
    kernel(table([Job(weight, weight, None, 512, None, (coding,))]), (0.0, 1.0, 0.0, 0.0), False)
    assert torch.equal(stored, codes)
    assert torch.allclose(kept, scales, rtol=0, atol=0)


@needs_compiler
@pytest.mark.parametrize("kept", [True, False])
def test_builds_are_whole_before_they_are_kept_and_leave_nothing_else(
    kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, scratch, calls = tmp_path / "cache", tmp_path / "scratch", []
    scratch.mkdir()
    if not kept:
        root.write_text("not a directory")
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: [calls.append("sync"), sync(file)])
    monkeypatch.setattr(os, "replace", lambda made, to: [calls.append("replace"), replace(made, to)])
    monkeypatch.setenv("XDG_CACHE_HOME", str(root))
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    assert native.build.__wrapped__("SGD", ("Fp32",)) is not None
    assert calls == ["sync", "replace"] * kept
    assert list(scratch.iterdir()) == []
    if kept:
        assert [file.suffix for file in (root / "distopt").iterdir()] == [".so"]


def test_a_kernel_that_does_something_else_is_not_used(without_compiler: None, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr(native, "build", lambda rule, *_: lambda table, scalars, look: called.append(rule))
    trained("AdamW", "int8", steps=1)
    assert called == ["AdamW"], "asked once, for its trial"


@pytest.mark.parametrize(("module", "interpreted", "says"), [
    ("tests.interpreted", True, "all equal"),
    ("tests.ahead_of_time", False, "compiled for (80, 90)"),
])  # fmt: skip
def test_triton_kernels(module: str, interpreted: bool, says: str) -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": str(int(interpreted))}
    done = subprocess.run(
        [sys.executable, "-m", module], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert says in done.stdout


class Reads(TorchDispatchMode):
    """Counts how often a tensor's values are read by the host."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.count, tolist = 0, Tensor.tolist
        monkeypatch.setattr(Tensor, "tolist", lambda tensor: self._read() or tolist(tensor))

    def _read(self) -> None:
        self.count += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self._read()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("options", "expected"), [
    ({"nonfinite": None}, 0), ({}, 1), ({"nonfinite": None, "max_grad_norm": 1.0}, 1),
])  # fmt: skip
@pytest.mark.parametrize(("rule", "codec"), [
    ("AdamW", "fp32"), ("AdamW", "int8"), ("Lion", "int4"), ("Muon", "int8"), ("Adafactor", "fp32"),
])  # fmt: skip
def test_a_step_waits_for_the_device_once_where_there_is_a_verdict_and_else_never(
    rule: str, codec: str, options: dict[str, Any], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (engine, elementwise):  # as on a GPU
        monkeypatch.setattr(module, "square_sums", lambda flats: verdict.on_device(flats).tolist())
    params = [nn.Parameter(torch.randn(shape)) for shape in ((40, 256), (37, 100), (300, 512))]
    built = getattr(distopt, rule)(params, state_codec=codec, **options)
    reads = Reads(monkeypatch)
    for expects in (None, expected):
        for param in params:
            param.grad = torch.randn_like(param)
        reads.count = 0
        with reads:
            built.step()
        assert expects is None or reads.count == expects


def test_norms_on_a_device_are_those_on_the_host() -> None:
    flats = [
        torch.randn(3_000_000),
        torch.randn(5000).bfloat16(),
        torch.empty(0),
        torch.full((4,), 1e30),
        torch.full((1 << 20,), 0.333),
    ]
    found = verdict.on_device(flats)
    expected = [flat.double().square().sum().item() for flat in flats]
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(expected, rel=1e-10)
    assert [verdict.square_sum(flat) for flat in flats] == pytest.approx(expected, rel=1e-5)
    assert verdict.added([*found, *expected]) == pytest.approx(2 * sum(expected), rel=1e-10)
    assert not verdict.on_device([torch.tensor([1.0, torch.inf])]).isfinite()
    assert not verdict.on_device([torch.tensor([1.0, torch.nan])]).isfinite()


@pytest.mark.parametrize("method", ["quintic", "gram"])
def test_compiled_newton_schulz_is_not_compiled_again_for_another_lr(method: Any) -> None:
    counter = CompileCounter()

    @torch.compile(backend=counter, fullgraph=True)
    def step(weight: Tensor, grad: Tensor, lr: Tensor) -> Tensor:
        return weight - lr * orthogonalize(grad, method=method)

    weight, grad = torch.randn(3, 24, 60), torch.randn(3, 24, 60)
    for lr in (1e-2, 2e-3, 0.0):
        expected = weight - lr * orthogonalize(grad, method=method)
        assert torch.allclose(step(weight, grad, torch.tensor(lr)), expected, atol=1e-5)
    assert counter.frame_count == 1


LOW: list[tuple[torch.dtype, str, str, str, dict[str, Any]]] = [
    (torch.bfloat16, "none", "AdamW", "int8", {"max_grad_norm": 0.5}),  # gradients that are clipped are fp32
    (torch.bfloat16, "bits8", "AdamW", "int8", {}),
    (torch.bfloat16, "bits16", "Lion", "bf16_sr", {}),
    (torch.bfloat16, "fp32", "SGD", "bf16", {}),
    (torch.float16, "bits8", "AdamW", "fp8", {}),
    (torch.float16, "none", "SGD", "fp8", {}),
]


@needs_compiler
@pytest.mark.parametrize(("dtype", "master", "rule", "codec", "options"), LOW)
def test_a_compiled_step_on_weights_of_lower_precision_is_the_rules_own(
    dtype: torch.dtype,
    master: str,
    rule: str,
    codec: str,
    options: dict[str, Any],
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken: list[Any] = []
    find = fused.Fused.find
    monkeypatch.setattr(fused.Fused, "find", lambda self, unit: taken.append(find(self, unit)) or taken[-1])
    mine, built = trained(rule, codec, dtype=dtype, master_codec=master, **options)
    assert taken and all(taken)
    request.getfixturevalue("without_compiler")
    taken.clear()
    text, reference = trained(rule, codec, dtype=dtype, master_codec=master, **options)
    assert taken and not any(taken)
    exact = rule != "AdamW"  # without roots all bits are the same
    for one, other in zip(mine, text):
        assert one.ne(other).float().mean() <= (0 if exact else 5e-3)
        assert (one.float() - other.float()).norm() <= 1e-4 * other.float().norm()
    for (_, one), (_, other) in zip(built._bind().master_weights(), reference._bind().master_weights()):
        assert (one - other).norm() <= (0 if exact else 1e-5 * other.norm())
    for one, other in zip(stores(built), stores(reference)):
        apart = one.stored.view(torch.uint8).ne(other.stored.view(torch.uint8))
        assert apart.float().mean() <= (0 if exact else 2e-3)


def step_once(weight: Tensor, rest: Tensor, grad: Tensor, scalars: tuple[float, ...], master: Master) -> Tensor:
    """The momentum of SGD after one step with these scalars, from zero; `weight` and `rest` are those after it."""
    kernel = native.build("SGD", ("Fp32",), native.stored_weights(weight.dtype, master.dtype))
    assert kernel is not None
    state = torch.zeros(weight.numel())
    kernel(table([Job(weight, grad, None, weight.numel() // 128, rest, (Coding(state, None),))]), scalars, False)
    return state


@needs_compiler
@pytest.mark.parametrize("master", ["fp32", "bits16", "bits8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_compiled_weights_have_the_bits_of_the_reference(dtype: torch.dtype, master: str) -> None:
    kept, generator = MASTERS[master], torch.Generator().manual_seed(0)
    assert kept is not None
    # Every parameter with many rests: what the kernel reads ends in the state.
    params = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    params = params[params.isfinite()].repeat_interleave(64)
    if kept.bits == 32:
        rest = params.float() * (1 + torch.randn(len(params), generator=generator) * torch.finfo(dtype).eps / 2)
    else:
        most = 1 << kept.bits - 1
        rest = torch.randint(-most, most, (len(params),), generator=generator, dtype=kept.dtype)
    expected = kept.join(params, rest)
    expected = torch.where(expected.isfinite(), expected, 0)
    params, rest = kept.split(expected, dtype)
    found = step_once(params, rest.clone(), torch.zeros(len(params)), (1.0, 0.0, 1.0, 0.0, 0.0), kept)
    assert torch.equal(found, kept.join(params, rest) + 0.0)
    # Every kind of fp32 number, as the gradient that a weight of zero becomes.
    values = torch.randint(-(1 << 31), 1 << 31, (1 << 20,), generator=generator).int().view(torch.float32)
    ties = params[: 1 << 19].float() * (1 + torch.finfo(dtype).eps / 2)
    values = torch.cat([values, ties, torch.randn(1 << 19, generator=generator)])
    values = torch.where(values.abs() < 3.3e38, values, 1.0) + 0.0
    weight, left = torch.zeros(len(values), dtype=dtype), torch.zeros(len(values), dtype=kept.dtype)
    step_once(weight, left, values, (0.0, 0.0, 1.0, 1.0, 0.0), kept)
    param, rest = kept.split(values, dtype)
    assert torch.equal(weight.view(torch.int16), param.view(torch.int16))
    assert torch.equal(left, rest)


@needs_compiler
@pytest.mark.parametrize("signed", [True, False])
def test_compiled_fp8_gives_back_every_code(signed: bool) -> None:
    codec = CODECS["fp8"](signed)
    codes = every_code(codec)
    codes = codes[torch.arange(512 * 128).remainder(len(codes))].view(512, 128)
    codes[:, 0] = codes.float().max().to(codec.dtype)
    scales = torch.logspace(-27, 37, 512)
    decoded = codec.decode(codes, scales[:, None])
    stored, weight = codes.clone(), torch.zeros(512 * 128)
    kernel = native.build("SGD", (native.CODECS["Fp8", signed],))
    assert kernel is not None
    job = Job(weight, torch.zeros(512 * 128), None, 512, None, (Coding(stored.view(-1), scales.clone()),))
    kernel(table([job]), (0.0, 1.0, 0.0, 1.0, 0.0), False)
    assert torch.equal(weight, decoded.view(-1))
    assert torch.equal(codec.decode(stored, scales[:, None]), decoded)


@needs_compiler
@pytest.mark.parametrize("damage", ["cut", "changed", "empty"])
def test_a_torn_build_is_made_again(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build = native.build.__wrapped__
    assert build("SGD", ("Fp32",)) is not None
    [library] = (tmp_path / "distopt").iterdir()
    whole, made = library.read_bytes(), library.stat().st_ino
    assert build("SGD", ("Fp32",)) is not None
    assert library.stat().st_ino == made, "built once"
    torn = {"cut": whole[: len(whole) // 2], "changed": whole[:5000] + b"x" + whole[5001:], "empty": b""}
    (tmp_path / "torn").write_bytes(torn[damage])
    os.replace(tmp_path / "torn", library)  # the one that is loaded stays as it is
    made = library.stat().st_ino
    assert build("SGD", ("Fp32",)) is not None
    again = library.read_bytes()
    assert native._is_whole(library)
    assert len(again) == len(whole)
    assert library.stat().st_ino != made


def replicas(lacking: int | None) -> tuple[list[Tensor], bool]:
    """A replicated parameter, stepped on every rank, where rank `lacking` has no compiler; whether a kernel was taken."""
    fused._native.cache_clear()
    build, find, taken = native.build, fused.Fused.find, []
    fused.Fused.find = lambda self, unit: taken.append(find(self, unit)) or taken[-1]  # type: ignore[method-assign]
    if dist.get_rank() == lacking:
        native.build = lambda *_: None  # type: ignore[assignment]
    try:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        whole = torch.linspace(-1, 1, 300 * 512).view(300, 512)
        param = nn.Parameter(distribute_tensor(whole, mesh, [Replicate()]))
        built = distopt.AdamW([("w", param)], lr=1e-2, state_codec="int8")
        for _ in range(3):
            param.grad = distribute_tensor(param.to_local().detach().sin(), mesh, [Replicate()])
            built.step()
        codes = [store.stored for store in stores(built)]
        return [param.to_local().detach(), *codes], all(taken) and bool(taken)
    finally:
        native.build, fused.Fused.find = build, find  # type: ignore[method-assign]
        fused._native.cache_clear()


@needs_compiler
@pytest.mark.parametrize("lacking", [None, 1])
def test_ranks_take_kernels_only_if_all_have_them(lacking: int | None) -> None:
    (mine, taken), (other, also) = pool(2).run(f"{replicas.__module__}:replicas", lacking)
    assert taken == also == (lacking is None)
    assert all(map(torch.equal, mine, other))
