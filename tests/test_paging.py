"""States in pages, one process: the same bits as on the device, and the bytes that the plan says."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import distopt
from distopt.plan import build as planning
from distopt.plan import pages as planned
from distopt.state.codecs import CODECS
from tests.cases import collect
from tests.paging import MIXED, SMALL, Params, build, differing, train

pytestmark = pytest.mark.usefixtures("short_pages")


@pytest.mark.parametrize("name", sorted(collect()))
def test_paged_equals_resident_for_every_rule_and_codec(name: str, tmp_path: Path) -> None:
    case = collect()[name]
    shapes = {key: shape for key, shape in SMALL.items() if len(shape) in case.ndims}
    options = {"lr": 0.01, **next(iter(case.variants.values()))}
    everywhere = {"cpu": 0.3, f"disk:{tmp_path}": 0.4}
    for codec in CODECS:
        ran = []
        for offload in (None, everywhere):
            params, built = build(case.optimizer, shapes, state_codec=codec, offload=offload, **options)
            train(params, built, range(4), case)
            ran.append((params, built))
        assert differing(*ran) == [], codec


@pytest.mark.parametrize("rule", ["AdamW", "Lion", "SGD", "Muon", "Adafactor", "SOAP"])
@pytest.mark.parametrize(
    ("dtype", "master"),
    [(torch.float32, "none"), (torch.bfloat16, "none"), (torch.bfloat16, "bits8"), (torch.float16, "fp32")],
)
def test_pages_of_large_and_of_small_tensors(rule: str, dtype: torch.dtype, master: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"lr": 1e-2, "master_codec": master}
    options |= {"SGD": {"momentum": 0.9}, "SOAP": {"max_precond_dim": 40, "packed": True}}.get(rule, {})
    shapes = {key: shape for key, shape in MIXED.items() if rule != "Muon" or len(shape) == 2}
    for codec in ("fp32", "int8") if rule != "SOAP" else ("int8",):
        ran = []
        for offload in (None, f"disk:{tmp_path}"):
            params, built = build(rule, shapes, dtype, state_codec=codec, offload=offload, **options)
            train(params, built, range(3))
            ran.append((params, built))
        assert differing(*ran) == [], codec
        assert master == "none" or torch.equal(
            *(each._bind().groups[0].units.read(0, None, "master") for _, each in ran)
        )


@pytest.mark.parametrize("tier", ["cpu", "disk"])
@pytest.mark.parametrize(
    ("rule", "options"),
    [
        ("AdamW", {}),
        ("AdamW", {"state_codec": "int8"}),
        ("Muon", {"state_codec": "int8"}),
        ("SOAP", {"precondition_frequency": 50, "synchronous": True, "max_precond_dim": 300}),
        ("Shampoo", {"precondition_frequency": 50, "synchronous": True, "max_precond_dim": 300}),
        ("Shampoo", {"precondition_frequency": 50, "synchronous": True, "max_precond_dim": 300, "packed": True}),
    ],
)
def test_what_moves_is_what_the_plan_says(tier: str, rule: str, options: dict[str, Any], tmp_path: Path) -> None:
    where = "cpu" if tier == "cpu" else f"disk:{tmp_path}"
    shapes = {key: shape for key, shape in MIXED.items() if rule == "AdamW" or len(shape) == 2}
    params, built = build(rule, shapes, lr=1e-3, offload=where, **options)
    train(params, built, range(2), gaps=False)
    built.reset_traffic()
    train(params, built, range(2, 3), gaps=False)
    plan, moved = built.plan.summary(), built.traffic()
    assert moved["page_bytes_read"] == plan["page_bytes_read_per_step"] > 0
    assert moved["page_bytes_written"] == plan["page_bytes_written_per_step"] > 0
    assert set(plan["paged_bytes"]) == {where}
    assert where in built.plan.explain()
    if "state_codec" in options:
        fp32 = build(rule, shapes, lr=1e-3, offload="cpu")[1].plan.summary()
        assert plan["page_bytes_read_per_step"] < 0.3 * fp32["page_bytes_read_per_step"]


def test_a_parameter_in_several_buckets_is_fetched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "BUCKET_BYTES", 0)
    shapes = {"experts": (6, 64, 96), "square": (64, 64)}
    params, built = build("Muon", shapes, lr=1e-2, offload="cpu")
    plan = built.plan.summary()
    built.reset_traffic()
    train(params, built, range(1), gaps=False)
    assert built.traffic()["page_bytes_read"] == plan["page_bytes_read_per_step"] == 4 * (6 * 64 * 96 + 64 * 64)


def test_shares_and_budgets_are_kept(tmp_path: Path) -> None:
    shapes = {**MIXED, "large": (900, 700)}
    _, built = build("AdamW", shapes, lr=1e-3, offload={"cpu": 0.25, f"disk:{tmp_path}": 0.5})
    tiers = built.plan.summary()["paged_bytes"]
    total, largest = sum(tiers.values()), planned.slot_bytes(built._bind().plans)
    for tier, share in (("cpu", 0.25), (f"disk:{tmp_path}", 0.5), ("device", 0.25)):
        assert abs(tiers[tier] - share * total) <= largest
    whole = build("AdamW", shapes, lr=1e-3)[1].plan.summary()["state_bytes"]
    for budget in (whole - 1, "3MiB", 2 * whole):
        params, built = build("AdamW", shapes, lr=1e-3, offload="cpu", device_budget=budget)
        plan = built.plan.summary()
        assert plan["state_bytes"] == whole
        limit = planned.parse_bytes(budget)
        assert plan["device_state_bytes"] <= limit
        assert measured(built) <= limit + planned.SECTOR * len(MIXED)
        assert ("cpu" in plan["paged_bytes"]) == (limit < whole)
        resident = build("AdamW", shapes, lr=1e-3)
        train(params, built, range(2))
        train(*resident, range(2))
        assert differing((params, built), resident) == []


def measured(built: Any) -> int:
    """Bytes of the tensors that states lie in on the device."""
    bound = built._bind()
    kept = sum(t.nbytes for group in bound.groups for window in group.windows for t in window.state.values())
    slots = [*bound.pager._free, *bound.pager._going]
    return int(kept + sum(t.nbytes for t in bound.pager._here.values()) + sum(s.buffer.nbytes for s in slots))


@pytest.mark.parametrize("rule", ["AdamW", "Muon", "SOAP"])
def test_state_dicts_checkpoints_and_copies_go_anywhere(rule: str, tmp_path: Path) -> None:
    shapes = {"a": (40, 60), "b": (60, 40)}
    options: dict[str, Any] = {"lr": 1e-2, "state_codec": "int8"}
    resident, paged = (build(rule, shapes, offload=o, **options) for o in (None, f"disk:{tmp_path / 'p'}"))
    for params, built in (resident, paged):
        train(params, built, range(3))
    for source, offload in ((resident, "cpu"), (paged, None), (paged, f"disk:{tmp_path / 'p'}")):
        other = build(rule, shapes, offload=offload, **options)
        for name, param in other[0].items():
            param.data.copy_(source[0][name])
        other[1].load_state_dict(source[1].state_dict())
        assert other[1].param_groups[0]["offload"] == offload
        train(*other, range(3, 5))
        clone: tuple[Params, Any] = pickle.loads(pickle.dumps(source))
        train(*clone, range(3, 5))
        assert differing(other, clone) == []
    twin = copy.deepcopy(paged)
    train(*twin, range(3, 5))
    assert differing(twin, clone) == []
    assert differing(paged, resident) == [], "copies have pages of their own"


def test_native_checkpoint_continues_elsewhere(tmp_path: Path) -> None:
    def made(offload: Any) -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(60, 40), nn.Linear(40, 30))
        return model, distopt.SOAP(model.named_parameters(), lr=1e-2, state_codec="int8", offload=offload)

    model, built = made(f"disk:{tmp_path / 'pages'}")
    train(dict(model.named_parameters()), built, range(3))
    distopt.checkpoint.save(tmp_path / "a", model=model, optimizer=built)
    train(dict(model.named_parameters()), built, range(3, 5))
    for offload in (None, "cpu", f"disk:{tmp_path / 'pages'}"):
        other, again = made(offload)
        distopt.checkpoint.load(tmp_path / "a", model=other, optimizer=again)
        assert again.param_groups[0]["offload"] == offload
        train(dict(other.named_parameters()), again, range(3, 5))
        ran = [(dict(m.named_parameters()), o) for m, o in ((model, built), (other, again))]
        assert differing(*ran) == []


def test_clipping_skipping_and_added_groups(tmp_path: Path) -> None:
    ran = []
    for offload in (None, f"disk:{tmp_path}"):
        params, built = build("AdamW", MIXED, lr=1e-2, max_grad_norm=0.5, nonfinite="skip", offload=offload)
        train(params, built, range(2))
        params["wide"].grad = torch.full_like(params["wide"], torch.inf)
        built.step()
        assert built.skipped_steps == 1
        torch.manual_seed(3)
        params["more"] = nn.Parameter(torch.randn(50, 50))
        built.add_param_group({"params": [("more", params["more"])], "rule": "muon"})
        assert built.param_groups[1]["offload"] == offload
        schedule = torch.optim.lr_scheduler.StepLR(built, 1, 0.5)
        for step in range(2, 5):
            train(params, built, range(step, step + 1))
            schedule.step()
        ran.append((params, built))
    assert differing(*ran) == []


def test_stepping_in_backward(tmp_path: Path) -> None:
    ran = []
    for offload in (None, f"disk:{tmp_path}"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(50, 40), nn.Tanh(), nn.Linear(40, 30))
        built = distopt.AdamW(model.named_parameters(), lr=1e-2, nonfinite=None, state_codec="int8", offload=offload)
        distopt.step_in_backward(model, built)
        for _ in range(3):
            model(torch.randn(8, 50)).square().mean().backward()
        ran.append((dict(model.named_parameters()), built))
    assert differing(*ran) == []


def test_state_is_shown_by_state_dicts_alone() -> None:
    params, built = build("AdamW", SMALL, lr=1e-2, offload="cpu")
    train(params, built, range(1))
    shown: Tensor = built.state[params["matrix"]]["exp_avg"]
    assert shown.is_meta
    assert built.state_dict()["state"][0]["exp_avg"].any()


@pytest.mark.parametrize("options", [{"offload": "cpu"}, {"offload": "cpu", "device_budget": "3MiB"}, {}])
def test_state_bytes_are_those_on_the_device(options: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Linear(700, 900), nn.Linear(900, 30))
    built = distopt.create_optimizer("adamw", model, lr=1e-3, **options)
    assert distopt.state_bytes("adamw", model, **options) == built.plan.summary()["device_state_bytes"]
