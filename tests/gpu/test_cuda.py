"""On a CUDA device every rule gives what it gives on the CPU, and a step leaves no tensor on the host."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import distopt
from distopt import bucket
from distopt.matrix.newton_schulz import orthogonalize
from distopt.plan.tiles import whole_tiles
from distopt.rules import RULES
from distopt.state import coded, fused, units
from distopt.state.codecs import CODECS
from distopt.state.noise import Key

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SHAPES = {"tall": (300, 40), "wide": (24, 200), "row": (1, 64), "vector": (130,), "experts": (3, 40, 24)}


def trained(rule: str, device: str) -> dict[str, torch.Tensor]:
    """Weights after five steps on fixed gradients."""
    generator = torch.Generator().manual_seed(0)
    cls = getattr(distopt, RULES[rule])
    params = {}
    for name, shape in SHAPES.items():
        if name != "vector" or rule in ("sgd", "adamw", "lion", "adafactor", "soap"):
            params[name] = nn.Parameter(torch.randn(shape, generator=generator).to(device))
    options = {"ns_dtype": torch.float32} if rule.endswith("muon") else {}
    optimizer = cls(params.items(), lr=1e-2, **options)
    for _ in range(5):
        for param in params.values():
            param.grad = torch.randn(param.shape, generator=generator).to(device)
        optimizer.step()
    assert all(
        tensor.device.type == torch.device(device).type
        for state in optimizer.state.values()
        for name, tensor in state.items()
        if name != "step"
    )
    return {name: param.detach().cpu() for name, param in params.items()}


@pytest.mark.parametrize("rule", ["sgd", "adamw", "lion", "adafactor", "muon", "normuon"])
def test_a_rule_on_cuda_equals_the_rule_on_cpu(rule: str) -> None:
    there, here = trained(rule, "cuda"), trained(rule, "cpu")
    for name, weight in here.items():
        assert (there[name] - weight).norm() <= 1e-4 * weight.norm(), name


def test_stretches_of_rules_are_one_kernel_each(monkeypatch: pytest.MonkeyPatch) -> None:
    from distopt.kernels import triton_stretches

    launched, launch = [], triton_stretches.launch
    monkeypatch.setattr(triton_stretches, "launch", lambda *args: launched.append(args[0]) or launch(*args))
    for rule, expected in (("muon", 2), ("adafactor", 2)):
        launched.clear()
        param = nn.Parameter(torch.randn(40, 300, device="cuda"))
        param.grad = torch.randn_like(param)
        getattr(distopt, RULES[rule])([param]).step()
        assert len(launched) == expected, rule


@pytest.mark.parametrize("codec", list(CODECS))
@pytest.mark.parametrize(("cols", "signed"), [(256, True), (301, False)])
def test_states_are_read_and_written_as_the_codecs_text_does(codec: str, signed: bool, cols: int) -> None:
    x = torch.randn(37 * cols) * torch.randn(37 * cols).exp()
    x, tiles, ran = x if signed else x.square(), whole_tiles(37, cols), []
    for device in ("cuda", "cpu"):
        starts = np.arange(tiles.count) * 1000
        store = coded.Coded(CODECS[codec](signed), tiles, torch.device(device), 0.0, starts)
        store.write(x.to(device), None, Key(0, 3, "x"))
        ran.append((store.stored.cpu().view(torch.uint8), store.scales.cpu(), store.read().cpu()))
    (codes, scales, values), (other, others, expected) = ran
    assert torch.equal(scales, others)
    assert codes.ne(other).float().mean() <= 2e-3, "roots of torch's are off by one bit here and there"
    assert (values - expected).norm() <= 1e-2 * expected.norm()


@pytest.mark.parametrize("master", ["bits8", "bits16", "fp32"])
def test_muon_on_coded_states_equals_the_text(master: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    for text in (False, True):
        if text:
            for module in (coded, units):
                monkeypatch.setattr(module, "state_kernels", lambda device: None)
            monkeypatch.setattr(bucket, "stretch_kernels", lambda device: {})
        generator = torch.Generator().manual_seed(0)
        params = [nn.Parameter(torch.randn(300, n, generator=generator).cuda().bfloat16()) for n in (40, 301)]
        optimizer = distopt.Muon(params, lr=1e-2, state_codec="int8", master_codec=master, ns_dtype=torch.float32)
        for _ in range(4):
            for param in params:
                param.grad = torch.randn(param.shape, generator=generator).cuda().bfloat16()
            optimizer.step()
        ran.append([weight for _, weight in optimizer._bind().master_weights()])
    for mine, other in zip(*ran):
        assert (mine - other).norm() <= 1e-3 * other.norm()


@pytest.mark.parametrize("options", [{}, {"state_codec": "int8", "master_codec": "bits8"}])
@pytest.mark.parametrize("rule", ["sgd", "adamw", "lion", "adafactor", "muon"])
def test_a_step_waits_for_nothing_and_the_device_leaves_out_a_bad_one(rule: str, options: dict[str, str]) -> None:
    ran = []
    for bad in (True, False):
        generator = torch.Generator().manual_seed(0)
        dtype = torch.bfloat16 if options else torch.float32
        params = [
            nn.Parameter(torch.randn(shape, generator=generator).to("cuda", dtype))
            for name, shape in SHAPES.items()
            if name != "vector" or rule != "muon"
        ]
        optimizer = getattr(distopt, RULES[rule])(params, lr=1e-2, max_grad_norm=0.5, nonfinite="skip", **options)
        for step in range(5):
            for param in params:
                param.grad = torch.randn(param.shape, generator=generator).to("cuda", dtype)
            if step == 3 and bad:
                params[0].grad[0, 0] = torch.nan  # type: ignore[index]
            if step == 3 and not bad:
                continue
            torch.cuda.set_sync_debug_mode("error" if step else "default")
            try:
                optimizer.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        assert optimizer.skipped_steps == bad
        ran.append(
            [*params, *(value for entry in optimizer.state_dict()["state"].values() for value in entry.values())]
        )
    assert all(map(torch.equal, *ran))


def test_soap_on_cuda_is_finite_and_moves() -> None:
    weights = trained("soap", "cuda")
    assert all(weight.isfinite().all() for weight in weights.values())


@pytest.mark.parametrize("rule", ["AdamW", "Lion"])
@pytest.mark.parametrize("codec", ["int8", "bf16", "bf16_sr"])
@pytest.mark.parametrize("master", ["fp32 weights", "none", "bits8", "bits16", "fp32"])
def test_fused_steps_equal_the_rules_text(rule: str, codec: str, master: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    find = fused.Fused.find
    for fuse in (True, False):
        kernels: list[object] = []

        def choose(self: fused.Fused, unit: object, fuse: bool = fuse, kernels: list[object] = kernels) -> object:
            kernels.append(find(self, unit) if fuse else None)
            return kernels[-1]

        monkeypatch.setattr(fused.Fused, "find", choose)
        generator = torch.Generator().manual_seed(0)
        dtype = torch.float32 if master == "fp32 weights" else torch.bfloat16
        options = {} if master == "fp32 weights" else {"master_codec": master}
        params = [
            nn.Parameter(torch.randn(shape, generator=generator).to("cuda", dtype))
            for shape in ((300, 512), (37, 100), (5000,), (10,))
        ]
        optimizer = getattr(distopt, rule)(params, lr=1e-2, state_codec=codec, **options)
        for _ in range(3):
            for param in params:
                param.grad = torch.randn(param.shape, generator=generator).to("cuda", dtype)
            optimizer.step()
        assert kernels
        assert all((kernel is not None) == fuse for kernel in kernels)
        found.append([param.detach().float() for param in params])
    for mine, other in zip(*found):
        assert (mine - other).norm() <= (1e-3 if dtype == torch.float32 else 4e-3) * other.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_triangle_equals_full_products(dtype: torch.dtype) -> None:
    x = torch.randn(2, 600, 1500, device="cuda")
    full, triangle = (orthogonalize(x, dtype=dtype, symmetric=symmetric) for symmetric in (False, True))
    assert (full - triangle).float().norm() <= (1e-4 if dtype == torch.float32 else 3e-2) * full.float().norm()


@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("codec", ["fp32", "int8"])
def test_paged_states_give_the_same_bits(codec: str, where: str, tmp_path: Path) -> None:
    ran = []
    for offload in (None, "cpu_pages" if where == "cpu" else f"disk:{tmp_path}"):
        generator = torch.Generator().manual_seed(0)
        param = nn.Parameter(torch.randn((3000, 4100), generator=generator).cuda())
        optimizer = distopt.AdamW([("weight", param)], lr=1e-2, state_codec=codec, offload=offload)
        for _ in range(4):
            param.grad = torch.randn(param.shape, generator=generator).cuda()
            optimizer.step()
        ran.append((param.detach(), optimizer.state_dict()["state"][0]))
    (weight, states), (paged, others) = ran
    assert torch.equal(weight, paged)
    assert all(torch.equal(states[name], others[name]) for name in states)


@pytest.mark.parametrize("codec", ["fp32", "int8", "bf16_sr"])
def test_a_step_on_the_host_is_that_on_the_device_but_for_roots(codec: str) -> None:
    ran = []
    for offload in (None, "cpu_step"):
        generator = torch.Generator().manual_seed(0)
        params = {n: nn.Parameter(torch.randn(n, 1500, generator=generator).cuda().bfloat16()) for n in (3000, 3)}
        named = [(str(name), param) for name, param in params.items()]
        optimizer = distopt.AdamW(named, lr=1e-2, state_codec=codec, master_codec="bits16", offload=offload)
        for _ in range(4):
            for param in params.values():
                param.grad = torch.randn(param.shape, generator=generator).cuda().bfloat16()
            optimizer.step()
        ran.append([weight for _, weight in optimizer._bind().master_weights()])
        assert all(weight.is_cuda for weight in ran[-1])
    for resident, hosted in zip(*ran):
        assert (resident - hosted).norm() <= 1e-5 * resident.norm()
