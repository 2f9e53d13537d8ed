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
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import distopt
from distopt.kernels import native
from distopt.kernels.jobs import Coding, Job, table
from distopt.matrix.newton_schulz import orthogonalize
from distopt.state import fused
from distopt.state.codecs import CODECS
from tests.test_codecs import stores

ROOT = Path(__file__).parents[1]
SHAPES = {"whole": (40, 256), "ragged": (37, 100), "vector": (5000,), "large": (300, 512), "small": (10,)}
RULES: dict[str, dict[str, Any]] = {
    "AdamW": {},
    "Lion": {"weight_decay": 0.1},
    "SGD": {"momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01},
}

needs_compiler = pytest.mark.skipif(native.build("Lion", ("Int8",)) is None, reason="needs a C++ compiler")


def trained(rule: str, codec: Any, steps: int = 4, **options: Any) -> tuple[list[Tensor], Any]:
    """Weights after some steps, one of which lacks a gradient, and the optimizer."""
    generator = torch.Generator().manual_seed(0)
    params = {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}
    built = getattr(distopt, rule)(params.items(), lr=1e-2, state_codec=codec, **RULES[rule], **options)
    for number in range(steps):
        for name, param in params.items():
            noise, spread = (torch.randn(param.shape, generator=generator) for _ in range(2))
            param.grad = None if number == 2 and name == "ragged" else noise * spread.exp()
        built.step()
    return [param.detach() for param in params.values()], built


@pytest.fixture
def without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    fused._native.cache_clear()
    monkeypatch.setattr(native, "build", lambda rule, codecs: None)
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
    monkeypatch.setattr(native, "build", lambda rule, codecs: lambda table, scalars, look: called.append(rule))
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
