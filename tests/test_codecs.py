"""States stored as codes, one process: what a codec promises, and what state dicts and checkpoints make of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import distopt
from distopt.rule import Shape
from distopt.rules import RULES, rule_class
from distopt.state.codecs import CODECS, Codec
from distopt.state.codecs.base import FLOOR
from distopt.state.master import MASTERS
from distopt.state.noise import Key
from tests.cases import collect

SHAPES = {
    "wide": (64, 256),
    "odd": (37, 100),
    "vector": (5000,),
    "small": (10,),
    "large": (130, 600),
    "narrow": (600, 3),
}
CODED = [name for name in CODECS if name != "fp32"]


def optimizer(state_codec: Any, rule: str = "AdamW", **options: Any) -> tuple[dict[str, nn.Parameter], Any]:
    generator = torch.Generator().manual_seed(0)
    params = {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}
    return params, getattr(distopt, rule)(params.items(), lr=1e-2, state_codec=state_codec, **options)


def step(params: dict[str, nn.Parameter], built: Any, steps: range) -> None:
    for number in steps:
        generator = torch.Generator().manual_seed(100 + number)
        for param in params.values():
            noise, spread = (torch.randn(param.shape, generator=generator) for _ in range(2))
            param.grad = (noise * spread.exp()).to(param.dtype)
        built.step()


def raw(built: Any) -> list[Tensor]:
    """Every stored code and scale."""
    return [tensor.clone() for store in stores(built) for tensor in (store.stored.view(torch.uint8), store.scales)]


def stores(built: Any) -> list[Any]:
    """All stores of codes."""
    groups = built._bind().groups
    lying = [store for group in groups for unit in group.units.units for store in unit.stores.values()]
    return lying + [store for group in groups for store in group.units.owned.values()]


def every_code(codec: Codec) -> Tensor:
    """All codes that encoding can give, as the codec's dtype."""
    if codec.bits == 16:
        codes = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(codec.dtype)
        return codes[~codes.isnan()]
    codes = torch.arange(1 << codec.bits, dtype=torch.int32).to(torch.uint8).view(codec.dtype)
    if codec.dtype.is_floating_point:
        codes = codes[codes.float().isfinite()]
        return codes if codec.signed else codes[codes.float() >= 0]
    values = codec.decode(codes, torch.ones(()))
    return codes[values.abs() <= 1]


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("name", CODED)
def test_encoding_what_was_decoded_gives_the_same_codes(name: str, signed: bool) -> None:
    codec = CODECS[name](signed)
    codes = every_code(codec)
    assert len(codes) >= 1 << codec.bits - 2
    generator = torch.Generator().manual_seed(0)
    scales = torch.cat(
        [torch.tensor([FLOOR, 1.0, 3.0e38, 1e-12]), torch.randn(2000, generator=generator).mul(20).exp()]
    )
    scales = scales.clamp(FLOOR, 3.0e38) if codec.scaled else scales[:1]
    for scale in scales:
        decoded = codec.decode(codes, scale)
        noise = Key(1, 2, "x").bits(torch.arange(len(codes)))
        again = codec.encode(decoded, scale, noise)
        assert torch.equal(codec.decode(again, scale), decoded)
        same = again.view(torch.uint8) == codes.view(torch.uint8)
        assert (same.view(len(codes), -1).all(1) | (decoded == 0)).all()  # zero has two codes in floating point
        if codec.scaled:
            assert decoded.abs().max() == scale, "so that the scale is found again"
            assert codec.encode(scale, scale, noise).float() == codes.float().abs().max() or codec.bits < 8


@pytest.mark.parametrize("name", [name for name in CODED if CODECS[name].scaled])
def test_no_positive_number_of_a_state_that_is_never_negative_becomes_zero(name: str) -> None:
    codec = CODECS[name](False)
    x = torch.tensor([1.0, 1e-3, 1e-9, 1e-20, 1e-37, 0.0])
    found = codec.decode(codec.encode(x, torch.ones(()), x), torch.ones(()))
    assert (found[:-1] > 0).all()
    assert found[-1] == 0


@pytest.mark.parametrize("name", CODED)
def test_codes_are_the_nearest_or_one_of_the_two_around(name: str) -> None:
    codec = CODECS[name](True)
    levels = codec.decode(every_code(codec), torch.ones(())).unique()
    x = torch.linspace(-1, 1, 10001)
    noise = Key(0, 1, "x").bits(torch.arange(len(x)))
    found = codec.decode(codec.encode(x, torch.ones(()), noise), torch.ones(()))
    above = levels[torch.searchsorted(levels, x).clamp(max=len(levels) - 1)]
    below = levels[(torch.searchsorted(levels, x, right=True) - 1).clamp(min=0)]
    assert ((found == above) | (found == below)).all()


def test_stochastic_rounding_is_right_in_the_mean() -> None:
    codec = CODECS["bf16_sr"](True)
    x = torch.full((1 << 20,), 1 + 2**-9 + 2**-11)
    found = codec.decode(codec.encode(x, x, Key(0, 7, "x").bits(torch.arange(len(x)))), x)
    assert set(found.unique().tolist()) == {1.0, 1 + 2**-7}
    assert found.double().mean().item() == pytest.approx(x[0].item(), abs=5 * 2**-8 / 1024)
    other = codec.encode(x, x, Key(0, 8, "x").bits(torch.arange(len(x))))
    assert 0.5 < (other == codec.encode(x, x, Key(0, 7, "x").bits(torch.arange(len(x))))).float().mean() < 0.9


@pytest.mark.parametrize("case", sorted(collect()))
def test_rules_declare_which_states_are_never_negative(case: str) -> None:
    """Whatever stays at or above zero under gradients of both signs is declared, and nothing else."""
    declared = collect()[case]
    [rule] = [rule_class(name)() for name, cls in RULES.items() if cls == declared.optimizer]
    for variant, options in declared.variants.items():
        shapes = {name: shape for name, shape in SHAPES.items() if len(shape) in declared.ndims and name != "large"}
        generator = torch.Generator().manual_seed(0)
        params = {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}
        built = getattr(distopt, declared.optimizer)(params.items(), **options)
        step(params, built, range(4))
        saved = built.state_dict()
        for index, (name, shape) in enumerate(shapes.items()):
            rule = built._bind().plans[0].rule
            states = rule.states(Shape(1, 7, 1) if len(shape) == 1 else Shape(*shape))
            for key, state in states.items():
                value = saved["state"][index][key]
                if state.kind in ("like", "owner") and value.any() and value.numel() > 16:  # few may be so by chance
                    assert bool((value < 0).any()) == state.signed, f"{variant}: {name}/{key}"


@pytest.mark.parametrize(
    ("rule", "codec"), [("AdamW", c) for c in CODED] + [(r, "int8") for r in ("SOAP", "Adafactor", "Shampoo", "Lion")]
)
def test_resume_is_exact_under_the_same_codec(rule: str, codec: str) -> None:
    params, built = optimizer(codec, rule)
    step(params, built, range(5))
    others, again = optimizer(codec, rule)
    with torch.no_grad():
        for name, param in others.items():
            param.copy_(params[name])
    again.load_state_dict(built.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(raw(built), raw(again)))
    step(params, built, range(5, 10))
    step(others, again, range(5, 10))
    assert all(torch.equal(params[name], others[name]) for name in params)
    assert all(torch.equal(a, b) for a, b in zip(raw(built), raw(again)))


@pytest.mark.parametrize(("before", "after"), [("fp32", "int8"), ("int8", "fp32"), ("int8", "bf16"), ("int4", "int8")])
def test_a_state_dict_loads_under_another_codec(before: str, after: str) -> None:
    params, built = optimizer(before)
    step(params, built, range(3))
    _, other = optimizer(after)
    saved = built.state_dict()
    other.load_state_dict(saved)
    assert other.param_groups[0]["state_codec"] == after
    found = other.state_dict()
    for index, name in enumerate(SHAPES):
        assert found["state"][index]["exp_avg"].dtype is torch.float32
        mine, theirs = found["state"][index]["exp_avg"], saved["state"][index]["exp_avg"]
        assert (mine - theirs).abs().max() <= 0.02 * theirs.abs().max(), name
        if name == "small":
            assert torch.equal(found["state"][index]["exp_avg_sq"], saved["state"][index]["exp_avg_sq"])


@pytest.mark.parametrize("codec", ["int8", "bf16_sr"])
def test_native_checkpoint_continues_bit_for_bit_and_loads_elsewhere(codec: str, tmp_path: Path) -> None:
    def model_and_optimizer(state_codec: str) -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(100, 60), nn.Linear(60, 40))
        return model, distopt.AdamW(model.named_parameters(), lr=1e-2, state_codec=state_codec)

    model, built = model_and_optimizer(codec)
    step(dict(model.named_parameters()), built, range(3))
    distopt.checkpoint.save(tmp_path / "a", model=model, optimizer=built)
    other_model, other = model_and_optimizer(codec)
    distopt.checkpoint.load(tmp_path / "a", model=other_model, optimizer=other)
    assert all(torch.equal(a, b) for a, b in zip(raw(built), raw(other)))
    for one, its in ((model, built), (other_model, other)):
        step(dict(one.named_parameters()), its, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other_model.parameters()))
    plain_model, plain = model_and_optimizer("fp32")
    distopt.checkpoint.load(tmp_path / "a", model=plain_model, optimizer=plain)
    assert plain.param_groups[0]["state_codec"] == "fp32"
    assert plain.state[plain_model[0].weight]["exp_avg"].any()


@pytest.mark.parametrize("codec", list(CODECS))
@pytest.mark.parametrize("rule", ["AdamW", "SOAP", "Adafactor"])
def test_planned_state_bytes_are_allocated_bytes(rule: str, codec: str) -> None:
    params, built = optimizer(codec, rule)
    exact = {}
    for group in built._bind().groups:
        tensors = [t for w in group.windows for t in w.state.values()]
        for bucket in getattr(group, "buckets", []):
            tensors += [t for slabs in (*bucket.slabs, *bucket.owned_slabs) for t in slabs.tensors.values()]
        exact |= {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}
    padding = getattr(built._bind().groups[0], "padded", 0)
    summary = built.plan.summary()
    allocated = sum(exact.values()) + sum(store.nbytes for store in stores(built))
    assert summary["state_bytes"] == summary["state_bytes_total"]
    assert 0 <= allocated - summary["state_bytes"] <= (8 * 16 if padding else 0), "but for the end of a fused slab"
    numel = sum(param.numel() for param in params.values())
    if rule == "AdamW" and codec == "int8":
        assert summary["state_bytes"] < 2.2 * numel  # rows of three elements have a scale each


def test_codecs_can_differ_by_state_and_by_group() -> None:
    generator = torch.Generator().manual_seed(0)
    params = {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}
    groups = [
        {"params": [("wide", params["wide"])], "state_codec": {"exp_avg_sq": "int8"}},
        {"params": [("odd", params["odd"])], "state_codec": "fp32"},
        {"params": [("vector", params["vector"])]},
    ]
    built = distopt.AdamW(groups, state_codec="bf16")
    step({name: params[name] for name in ("wide", "odd", "vector")}, built, range(2))
    numel = params["wide"].numel()
    found = [group["state_bytes"] for group in built.plan.summary()["groups"]]
    assert found == [numel * 5 + numel // 128 * 4, 8 * params["odd"].numel(), 4 * params["vector"].numel()]


def test_a_parameter_without_a_gradient_keeps_its_codes() -> None:
    params, built = optimizer("int8")
    step(params, built, range(2))
    before = built.state_dict()["state"]
    params["odd"].grad = params["wide"].grad = None
    weight = params["odd"].detach().clone()
    built.step()
    after = built.state_dict()["state"]
    names = list(SHAPES)
    for name in ("odd", "wide"):
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(before[names.index(name)][key], after[names.index(name)][key])
    assert torch.equal(params["odd"], weight)
    assert not torch.equal(before[names.index("vector")]["exp_avg"], after[names.index("vector")]["exp_avg"])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("int9", "did you mean 'int8'"),
        ({"exp_av": "int8"}, "keeps \\['exp_avg', 'exp_avg_sq'\\]"),
        ({"exp_avg": 8}, "is not"),
    ],
)
def test_unknown_codecs_and_states_are_refused_at_construction(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optimizer(value)


def test_a_codec_cannot_change_after_bind() -> None:
    params, built = optimizer("int8")
    step(params, built, range(1))
    built.param_groups[0]["state_codec"] = "fp32"
    with pytest.raises(ValueError, match="changed after bind"):
        step(params, built, range(1))


MASTERS_KEPT = ["fp32", "bits16", "bits8"]


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MASTERS_KEPT)
def test_master_bits_are_found_again(name: str, low: torch.dtype) -> None:
    master = MASTERS[name]
    assert master is not None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1 << 18, generator=generator) * torch.randn(1 << 18, generator=generator).mul(4).exp()
    x = torch.cat([x, torch.tensor([0.0, -0.0, 1.0, 1 - 2**-9, 1 + 2**-9, -(1 + 2**-8), 2.0**-14])])
    param, rest = master.split(x, low)
    joined = master.join(param, rest)
    again = master.split(joined, low)
    assert torch.equal(again[0], param)
    assert torch.equal(master.join(*again), joined)
    if name == "fp32" or (name == "bits16" and low is torch.bfloat16):
        assert torch.equal(joined, x)
    inside = (x.abs() < 6e4) & (x.abs() > 2**-14)
    bound = {"fp32": 0.0, "bits16": 2.0**-23, "bits8": 2.0**-16 if low is torch.bfloat16 else 2.0**-18}[name]
    assert ((joined - x).abs() <= bound * x.abs())[inside].all()
    assert ((param.float() - x).abs() <= torch.finfo(low).eps * x.abs())[inside].all()


def test_every_pair_of_a_bfloat16_and_eight_bits_is_found_again() -> None:
    master = MASTERS["bits8"]
    assert master is not None
    params = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    params = params[params.isfinite() & (params.float().abs() > 2**-126) & (params.float().abs() < 3e38)]
    for rest in range(-128, 128):
        bits = torch.full((len(params),), rest, dtype=torch.int8)
        param, found = master.split(master.join(params, bits), torch.bfloat16)
        assert torch.equal(param, params)
        assert torch.equal(found, bits)


def low_precision(master_codec: str, rule: str = "AdamW", **options: Any) -> tuple[dict[str, nn.Parameter], Any]:
    generator = torch.Generator().manual_seed(0)
    shapes = SHAPES if rule != "Muon" else {name: shape for name, shape in SHAPES.items() if len(shape) == 2}
    params = {name: nn.Parameter(torch.randn(shape, generator=generator).bfloat16()) for name, shape in shapes.items()}
    return params, getattr(distopt, rule)(params.items(), lr=1e-4, master_codec=master_codec, **options)


@pytest.mark.parametrize("rule", ["AdamW", "SGD", "Muon", "Adafactor", "SOAP"])
def test_master_bits_of_sixteen_are_fp32_weights_bit_for_bit(rule: str) -> None:
    params, built = low_precision("bits16", rule)
    others, copied = low_precision("fp32", rule)
    exact = {name: nn.Parameter(param.detach().float()) for name, param in params.items()}
    plain = getattr(distopt, rule)(exact.items(), lr=1e-4)
    for number in range(6):
        step(params, built, range(number, number + 1))
        step(others, copied, range(number, number + 1))
        for name, param in exact.items():
            param.grad = params[name].grad.float()
        plain.step()
    holder = nn.ParameterDict(params)
    found = built.master_state_dict(holder)
    for name in params:
        assert torch.equal(found[name], copied.master_state_dict(nn.ParameterDict(others))[name])
        # torch's fused kernels, which fp32 parameters have, round otherwise than the rule's text.
        assert (found[name] - exact[name]).abs().max() <= 1e-6 * exact[name].abs().max(), name
        assert (params[name].float() - exact[name]).abs().max() <= 2**-8 * exact[name].abs().max()


@pytest.mark.parametrize("master_codec", MASTERS_KEPT)
def test_master_weights_survive_a_state_dict_and_appear_without_one(master_codec: str) -> None:
    params, built = low_precision(master_codec, state_codec="int8")
    step(params, built, range(3))
    others, again = low_precision(master_codec, state_codec="int8")
    with torch.no_grad():
        for name, param in others.items():
            param.copy_(params[name])
    saved = built.state_dict()
    again.load_state_dict(saved)
    for number in range(3, 6):
        step(params, built, range(number, number + 1))
        step(others, again, range(number, number + 1))
    assert all(torch.equal(params[name], others[name]) for name in params)
    ours, theirs = built.state_dict()["state"], again.state_dict()["state"]
    assert all(torch.equal(ours[i]["master"], theirs[i]["master"]) for i in ours)
    for entry in saved["state"].values():
        del entry["master"]
    again.load_state_dict(saved)
    masters = again.master_state_dict(nn.ParameterDict(others))
    assert all(torch.equal(masters[name], others[name].float()) for name in others)


def test_small_updates_vanish_without_master_weights_and_not_with_them() -> None:
    moved = {}
    for master_codec in ("none", "bits8", "bits16"):
        param = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
        built = distopt.SGD([("w", param)], lr=1e-4, master_codec=master_codec)
        for _ in range(100):
            param.grad = torch.ones_like(param)
            built.step()
        moved[master_codec] = 1 - param.float().mean().item()
    assert moved["none"] == 0
    assert moved["bits16"] == pytest.approx(0.01, rel=0.25)
    assert moved["bits8"] == pytest.approx(0.01, rel=0.25)


def test_bf16_training_takes_about_seven_bytes_per_parameter() -> None:
    param = nn.Parameter(torch.randn(768, 3072).bfloat16())
    built = distopt.AdamW([("w", param)], lr=1e-3, state_codec="int8", master_codec="bits8")
    param.grad = torch.randn_like(param)
    built.step()
    rest = [unit.rest.nbytes for group in built._bind().groups for unit in group.units.units]
    held = param.nbytes + param.grad.nbytes + sum(store.nbytes for store in stores(built)) + sum(rest)
    assert built.plan.summary()["state_bytes"] == held - param.nbytes - param.grad.nbytes
    assert held / param.numel() <= 7.1


def test_codes_of_bitsandbytes_are_read() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    theirs = nn.Parameter(torch.randn(64, 256))
    other = bitsandbytes.optim.AdamW8bit([theirs], lr=1e-3)
    for _ in range(3):
        theirs.grad = torch.randn_like(theirs)
        other.step()
    saved = other.state_dict()
    ours = nn.Parameter(theirs.detach().clone())
    built = distopt.AdamW([ours], lr=1e-3, state_codec="int8")
    built.load_state_dict({"state": saved["state"], "param_groups": [{"params": [0], "lr": 1e-3}]})
    found = built.state_dict()["state"][0]
    exact = nn.Parameter(theirs.detach().clone())
    reference = torch.optim.AdamW([exact], lr=1e-3)
    torch.manual_seed(0)
    torch.randn(64, 256)
    for _ in range(3):
        exact.grad = torch.randn(64, 256)
        reference.step()
    assert int(found["step"]) == 3
    for key in ("exp_avg", "exp_avg_sq"):
        error = (found[key] - reference.state[exact][key]).norm() / reference.state[exact][key].norm()
        assert error < 0.05, key


@pytest.mark.parametrize("codec", ["fp32", "int8"])
def test_states_go_to_torch_and_come_back(codec: str) -> None:
    params, built = optimizer(codec)
    step(params, built, range(3))
    theirs = torch.optim.AdamW([param.detach().clone().requires_grad_() for param in params.values()], lr=1e-2)
    saved = built.state_dict()
    theirs.load_state_dict({"state": saved["state"], "param_groups": [{**theirs.state_dict()["param_groups"][0]}]})
    for index, param in enumerate(theirs.param_groups[0]["params"]):
        assert torch.equal(theirs.state[param]["exp_avg"], saved["state"][index]["exp_avg"])
        param.grad = torch.ones_like(param)
    theirs.step()
    _, again = optimizer(codec)
    again.load_state_dict(theirs.state_dict())
    assert int(again.state_dict()["state"][0]["step"]) == 4


@pytest.mark.parametrize("level", [1e-3, 1e-6, 1e-9])
def test_no_update_is_much_larger_than_with_fp32_states(level: float) -> None:
    """Coordinates of log-normal scales (σ = 1.2), which tiles have to share a scale among."""
    largest = {}
    for codec in ("fp32", "int8"):
        generator = torch.Generator().manual_seed(0)
        scales = level * torch.exp(1.2 * torch.randn(64, 128, generator=generator))
        param = nn.Parameter(torch.zeros(64, 128))
        built = distopt.AdamW([param], lr=1.0, eps=1e-16, weight_decay=0.0, state_codec=codec)
        largest[codec] = 0.0
        for _ in range(200):
            before = param.detach().clone()
            param.grad = scales * torch.randn(64, 128, generator=generator)
            built.step()
            largest[codec] = max(largest[codec], (param.detach() - before).abs().max().item())
    assert largest["int8"] <= 2.5 * largest["fp32"], "1.7 measured"
