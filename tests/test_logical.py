"""Logical matrices in one process: what splits mean, what they refuse, and that a split parameter is its parts."""

from typing import Any

import pytest
import torch
from torch import nn

import distopt
from distopt.plan.geometry import logical_of
from distopt.plan.split import parse_split
from distopt.rules.adafactor import Adafactor
from distopt.rules.muon import Muon
from tests.splits import BLOCKS, CASES, NAMES, STEPS, Case, alone, gradients, in_parts, weights

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "Muon": {"lr": 0.01},
    "NorMuon": {"lr": 0.01},
    "SOAP": {"lr": 0.01, "precondition_frequency": 2, "max_precond_dim": 24},
    "Shampoo": {"lr": 0.01, "eps": 1e-2, "betas": (0.9, 0.99), "grafting": "adam"},
    "Adafactor": {"lr": 0.01},
    "CAME": {"lr": 0.01},
    "LAMB": {"lr": 0.01},
    "AdamMini": {"lr": 0.01},
}

SUMS = ("Adafactor", "CAME", "LAMB", "AdamMini")


def split_up(case: Case, optimizer: str, options: dict[str, Any]) -> dict[str, torch.Tensor]:
    params = {name: nn.Parameter(weight) for name, weight in weights(case).items()}
    with alone():
        built = getattr(distopt, optimizer)(params.items(), **options, split=case.split or None)
        for step in range(STEPS):
            for name, grad in gradients(case, step).items():
                params[name].grad = grad
            built.step()
    return {name: param.detach() for name, param in params.items()}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_split_parameter_is_trained_as_its_parts(optimizer: str, name: str) -> None:
    case, options = CASES[name], dict(OPTIMIZERS[optimizer])
    if optimizer == "AdamMini":
        options["whole_parts"] = ()  # parts as parameters of their own have no names
    found, expected = split_up(case, optimizer, options), in_parts(case, optimizer, options)
    # Sums over a matrix that lies in several pieces, or transposed, come in another order.
    exact = optimizer not in SUMS or not (case.transposed or "interleaved" in case.split)
    for key in NAMES:
        if exact:
            assert torch.equal(found[key], expected[key])
        else:
            torch.testing.assert_close(found[key], expected[key], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("split", "shape", "says"),
    [
        ("q:1024,k:256,v:250", (1536, 64), "the parts add up to 1530 of 1536 rows"),
        ("q,k,v", (64, 64), "64 rows do not divide into 3 equal parts"),
        ("heads=12", (64, 64), "64 rows do not divide into 12 heads"),
        ("heads=12 cols", (12, 64), "64 columns do not divide into 12 heads"),
        ("q,k,v interleaved=5", (48, 64), "16 rows of part 'q' do not divide into interleaved=5"),
        ("q:8h,k:2h,v:2h interleaved=4", (48, 64), "2 heads of part 'k' do not divide into interleaved=4"),
        ("transpose", (64, 64), "unknown word 'transpose', did you mean 'transposed'?"),
        ("fancy", (64, 64), "unknown word 'fancy'"),
        ("q,k;v", (64, 64), "unknown word 'q,k;v'"),
        ("q,k,v per_head", (48, 64), "per_head needs the number of heads"),
        ("q:1h,k:3", (48, 64), "sizes must be all in rows, all in heads, or not given"),
        ("q:0,k:48", (48, 64), "a part has size 0"),
        ("q,q", (48, 64), "two parts have one name"),
        ("q,k,v gate,up", (48, 64), "parts are named twice"),
        ("heads=0", (48, 64), "heads must be a number ≥ 1"),
        ("q,k heads=2", (48, 64), "heads=N is for one part"),
    ],
)
def test_a_split_that_does_not_fit_is_refused_at_construction(split: str, shape: tuple[int, ...], says: str) -> None:
    param = nn.Parameter(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"model\.qkv") as error:
        distopt.Muon([("model.qkv", param)], split=split)
    assert says in str(error.value)
    assert "param group" in str(error.value)


@pytest.mark.parametrize("split", [["q", "k", "v"], {"q": 8}, 3])
def test_a_split_that_is_no_text_is_refused(split: Any) -> None:
    with pytest.raises(ValueError, match=r"'qkv' of shape \(24, 8\).*split is text"):
        distopt.Muon([("qkv", nn.Parameter(torch.zeros(24, 8)))], split=split)


def test_a_split_of_a_vector_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'norm'.*needs a matrix"):
        distopt.Adafactor([("norm", nn.Parameter(torch.zeros(4)))], split="q,k")


def test_matrices_have_the_shapes_of_their_parts() -> None:
    def shapes(tensor: tuple[int, ...], split: str) -> list[tuple[int, int]]:
        return [(shape.rows, shape.cols) for shape in logical_of(tensor, Muon(), split).shapes]

    assert shapes((1536, 64), "q:32h,k:8h,v:8h") == [(1024, 64), (256, 64), (256, 64)]
    assert shapes((1536, 64), "q:32h,k:8h,v:8h per_head") == [(32, 64)] * 48
    assert shapes((64, 96), "heads=12 cols") == [(64, 8)] * 12
    assert shapes((64, 192), "transposed q,k,v") == [(64, 64)] * 3
    assert shapes((64, 192), "transposed heads=4 cols") == [(192, 16)] * 4
    assert shapes((8, 96, 64), "gate,up") == [(48, 64)] * 16
    assert shapes((8, 64, 96), "transposed gate,up") == [(48, 64)] * 16
    assert shapes((8, 3, 5), "flattened") == [(8, 15)]
    assert shapes((0, 5), "q,k") == []


def test_a_transposed_weight_has_the_scale_of_its_transpose() -> None:
    """lr · √(rows/cols) is not that of what is stored."""
    stored, plain = nn.Parameter(torch.zeros(8, 32)), nn.Parameter(torch.zeros(8, 32))
    grad = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    stored.grad, plain.grad = grad.clone(), grad.clone()
    for param, split in ((stored, "transposed"), (plain, None)):
        distopt.Muon([("w", param)], lr=1.0, weight_decay=0.0, adjust_lr_fn="spectral", split=split).step()
    torch.testing.assert_close(stored.detach(), 4 * plain.detach(), rtol=1e-4, atol=1e-6)


def test_a_split_is_saved_with_the_state_and_another_one_is_refused() -> None:
    def build(split: str | None) -> distopt.Optimizer:
        param = nn.Parameter(torch.zeros(48, 16))
        param.grad = torch.ones(48, 16)
        return distopt.Muon([("qkv", param)], split=split)

    first = build("q:32,k:8,v:8")
    first.step()
    saved = first.state_dict()
    assert saved["param_groups"][0]["split"] == "q:32,k:8,v:8"
    build("q:32,k:8,v:8").load_state_dict(saved)
    for other in ("q,k,v", None):
        with pytest.raises(ValueError, match="group 0 was saved with split='q:32,k:8,v:8'"):
            build(other).load_state_dict(saved)
    first.param_groups[0]["split"] = "q,k,v"
    with pytest.raises(ValueError, match="changed after bind"):
        first.step()


def test_groups_may_have_splits_of_their_own() -> None:
    params = {name: nn.Parameter(torch.zeros(48, 16)) for name in ("qkv", "up", "norm")}
    params["norm"] = nn.Parameter(torch.zeros(16))
    groups = [
        {"params": [("qkv", params["qkv"])], "split": "q,k,v"},
        {"params": [("up", params["up"])]},
        {"params": [("norm", params["norm"])], "rule": "adamw"},
    ]
    optimizer = distopt.Muon(groups, split="gate,up")
    assert [group["split"] for group in optimizer.param_groups] == ["q,k,v", "gate,up", None]
    assert [group["matrices"] for group in optimizer.plan.summary()["groups"]] == [3, 2, 0]


def test_names_of_parts_reach_only_rules_that_ask() -> None:
    assert {shape.part for shape in logical_of((48, 16), Adafactor(), "q,k,v").shapes} == {""}
    assert parse_split("q:32h,k:8h,v:8h").parts[1].name == "k"


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("optimizer", ["Shampoo", "CASPR", "KLShampoo", "SOAP"])
def test_blocks_are_cut_from_the_logical_matrix(optimizer: str, name: str) -> None:
    case, options = BLOCKS[name], {"lr": 0.01, "eps": 1e-2, "precondition_frequency": 2}
    found = split_up(case, optimizer, {**options, "block_size": 16})
    expected = in_parts(case, optimizer, options)
    for key in NAMES:
        assert torch.equal(found[key], expected[key])


def test_a_block_size_that_no_dim_reaches_changes_nothing() -> None:
    case, options = Case("", (24, 20), lambda w: [(w, (24, 20))]), {"lr": 0.01, "eps": 1e-2}
    found = split_up(case, "Shampoo", {**options, "block_size": 24})
    expected = in_parts(case, "Shampoo", options)
    assert all(torch.equal(found[key], expected[key]) for key in NAMES)


@pytest.mark.parametrize("size", [0, -1])
def test_a_block_size_of_nothing_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"block_size must be ≥ 1 or None, got {size}"):
        distopt.Shampoo([("w", nn.Parameter(torch.zeros(4, 4)))], block_size=size)


def test_other_blocks_are_refused_when_a_state_is_loaded() -> None:
    def build(size: int | None) -> distopt.Optimizer:
        param = nn.Parameter(torch.zeros(32, 16))
        param.grad = torch.ones(32, 16)
        return distopt.Shampoo([("w", param)], block_size=size)

    first = build(16)
    first.step()
    build(16).load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match="saved with block_size=16, here it has None"):
        build(None).load_state_dict(first.state_dict())


def test_adam_mini_has_a_moment_per_head_as_the_package_has() -> None:
    """Queries and keys of a grouped-query attention; values, the output projection and an embedding per row."""
    from adam_mini import Adam_mini  # type: ignore[import-untyped]

    dim, heads, kv_heads = 24, 4, 2
    shapes = {
        "q_proj.weight": (24, dim), "k_proj.weight": (12, dim), "v_proj.weight": (12, dim), "o_proj.weight": (dim, 24),
        "embed.weight": (50, dim),
    }  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    first = {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    ours, theirs = ({name: nn.Parameter(w.clone()) for name, w in first.items()} for _ in range(2))
    settings: dict[str, Any] = {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1}
    splits = {"q_proj.weight": "q:4h per_head", "k_proj.weight": "k:2h per_head"}
    groups = [{"params": [item], "split": splits.get(item[0])} for item in ours.items()]
    mine = distopt.AdamMini(groups, **settings)
    package = Adam_mini(list(theirs.items()), dim=dim, n_heads=heads, n_kv_heads=kv_heads, verbose=False, **settings)
    for _ in range(8):
        for name, shape in shapes.items():
            ours[name].grad = torch.randn(shape, generator=generator)
            theirs[name].grad = ours[name].grad.clone()  # type: ignore[union-attr]
        mine.step()
        package.step()
    for name, weight in first.items():
        change = (theirs[name].detach() - weight).norm()
        assert (ours[name] - theirs[name]).norm() <= 2e-6 * change, name


def test_a_fused_projection_has_the_moments_of_its_parts() -> None:
    """Per head for the queries and keys in it, per row for the values."""
    fused = nn.Parameter(torch.zeros(40, 16))
    apart = {"q": nn.Parameter(torch.zeros(20, 16)), "k": nn.Parameter(torch.zeros(10, 16))}
    apart["v"] = nn.Parameter(torch.zeros(10, 16))
    grad = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    fused.grad = grad.clone()
    for param, part in zip(apart.values(), grad.split([20, 10, 10])):
        param.grad = part.clone()
    splits = {"q": "q:4h per_head", "k": "k:2h per_head", "v": None}
    distopt.AdamMini([("qkv", fused)], split="q:4h,k:2h,v:2h per_head").step()
    distopt.AdamMini([{"params": [item], "split": splits[item[0]]} for item in apart.items()]).step()
    assert torch.equal(fused.detach(), torch.cat([param.detach() for param in apart.values()]))
