"""States in host memory that are stepped there: the same bits as on the device, and when the cost model chooses it."""

import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import distopt
from distopt.layouts import Plain
from distopt.options import GROUP_OPTIONS, rule_defaults
from distopt.plan import pages as planned
from distopt.plan.buckets import Spec
from distopt.plan.build import plan_group
from distopt.plan.cost import H100, Rates
from distopt.plan.report import PlanReport
from distopt.rule import Shape
from distopt.rules import RULES, rule_class
from distopt.state.codecs import CODECS
from distopt.state.grouping import planned_group
from tests.cases import collect
from tests.paging import MIXED, SMALL, build, differing, train

pytestmark = pytest.mark.usefixtures("short_pages")

RULE_NAMES = {optimizer: name for name, optimizer in RULES.items()}
ELEMENTWISE = sorted(
    name for name, case in collect().items() if rule_class(RULE_NAMES[case.optimizer]).reach == "elementwise"
)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_stepped_on_the_host_equals_resident_for_every_elementwise_rule_and_codec(name: str) -> None:
    case = collect()[name]
    options = {"lr": 0.01, **next(iter(case.variants.values()))}
    for codec in CODECS:
        ran = []
        for offload in (None, "cpu_step"):
            params, built = build(case.optimizer, MIXED, state_codec=codec, offload=offload, **options)
            train(params, built, range(4), case)
            ran.append((params, built))
        assert differing(*ran) == [], codec
        kept = any(state.kind == "like" for state in ran[1][1]._bind().plans[0].rule.states(Shape(1, 1, 1)).values())
        assert set(ran[1][1].plan.summary()["paged_bytes"]) == ({"cpu_step"} if kept else set())


@pytest.mark.parametrize(
    ("dtype", "master"), [(torch.bfloat16, "none"), (torch.bfloat16, "bits8"), (torch.float16, "fp32")]
)
def test_weights_of_lower_precision_are_stepped_on_the_host(dtype: torch.dtype, master: str) -> None:
    for rule, codec in (("AdamW", "int8"), ("AdamW", "fp32"), ("Lion", "int4")):
        ran = []
        for offload in (None, "cpu_step"):
            params, built = build(rule, MIXED, dtype, state_codec=codec, master_codec=master, lr=1e-2, offload=offload)
            train(params, built, range(3))
            ran.append((params, built))
        assert differing(*ran) == [], (rule, codec)
        twins = [list(built._bind().master_weights()) for _, built in ran]
        assert all(torch.equal(one, other) for (_, one), (_, other) in zip(*twins))


def test_what_is_stepped_on_the_host_is_clipped_skipped_scaled_and_saved_as_elsewhere() -> None:
    ran = []
    for offload in (None, "cpu_step"):
        params, built = build(
            "AdamW", MIXED, lr=1e-2, max_grad_norm=0.5, nonfinite="skip", state_codec="int8", offload=offload
        )
        train(params, built, range(2))
        params["wide"].grad = torch.full_like(params["wide"], torch.inf)
        built.step()
        assert built.skipped_steps == 1
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for factor in (1.0, torch.inf, 2.0):
            built.zero_grad()
            for part in (1.0, 2.0):  # accumulated
                scaler.scale(sum((param * part * factor).square().sum() for param in params.values())).backward()
            scaler.step(built)
            scaler.update()
        params["more"] = nn.Parameter(torch.ones(50, 50))
        built.add_param_group({"params": [("more", params["more"])], "rule": "muon"})
        schedule = torch.optim.lr_scheduler.StepLR(built, 1, 0.5)
        for step in range(2, 5):
            train(params, built, range(step, step + 1))
            schedule.step()
        ran.append((params, built))
    assert differing(*ran) == []
    assert set(ran[1][1].plan.summary()["paged_bytes"]) == {"cpu_step", "cpu"}, "matrices keep pages"
    for number, offload in enumerate((None, "cpu_step")):
        other = {name: nn.Parameter(param.detach().clone()) for name, param in ran[1 - number][0].items()}
        small = {"params": [("more", other["more"])], "rule": "muon"}
        large = {"params": [(name, param) for name, param in other.items() if name != "more"]}
        loaded = distopt.AdamW(
            [large, small], lr=1e-2, max_grad_norm=0.5, nonfinite="skip", state_codec="int8", offload=offload
        )
        loaded.load_state_dict(ran[1 - number][1].state_dict())
        train(other, loaded, range(5, 7))
        twin = pickle.loads(pickle.dumps(ran[number]))
        train(*twin, range(5, 7))
        assert differing((other, loaded), twin) == []


def test_what_steps_in_backward_may_be_stepped_on_the_host() -> None:
    ran = []
    for offload in (None, "cpu_step"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(50, 40), nn.Tanh(), nn.Linear(40, 30))
        built = distopt.AdamW(model.named_parameters(), lr=1e-2, nonfinite=None, state_codec="int8", offload=offload)
        distopt.step_in_backward(model, built)
        for _ in range(3):
            model(torch.randn(8, 50)).square().mean().backward()
        ran.append((dict(model.named_parameters()), built))
    assert differing(*ran) == []


SLOW_LINK = replace(H100, host_link=5e9, host_memory=200e9)
SLOW_HOST = replace(H100, host_link=50e9, host_memory=10e9)


@pytest.mark.parametrize(
    ("offload", "rates", "itemsize", "codec", "gpu", "stepped"),
    [
        ("cpu", SLOW_LINK, 2, "fp32", True, True),
        ("cpu", SLOW_HOST, 2, "fp32", True, False),
        ("cpu", SLOW_LINK, 4, "int8", True, False),  # fewer bytes than a gradient and a weight
        ("cpu", SLOW_LINK, 2, "fp32", False, False),  # there is no link
        ("cpu_step", SLOW_HOST, 2, "fp32", True, True),
        ("cpu_pages", SLOW_LINK, 2, "fp32", True, False),
        ({"cpu": 1.0}, SLOW_LINK, 2, "fp32", True, False),
        (None, SLOW_LINK, 2, "fp32", True, False),
    ],
)
def test_the_cost_model_says_where_to_step(
    offload: Any, rates: Rates, itemsize: int, codec: str, gpu: bool, stepped: bool
) -> None:
    numel = 3000 * 1000
    options = {**rule_defaults("adamw"), **GROUP_OPTIONS, "rule": "adamw", "state_codec": codec, "offload": offload}
    spec = Spec("w", Plain((3000, 1000), (0,)), 0, torch.bfloat16 if itemsize == 2 else torch.float32)
    plan = plan_group(planned_group(options, [spec], None, gpu=gpu, rates=rates), 0)
    planned.plan_pages([plan])
    tiers = {page.tier for pages in plan.pages.values() for page in pages}
    assert tiers == (set() if offload is None else {"cpu_step" if stepped else "cpu"})
    report = PlanReport([plan], ["0"], 0)
    [group] = report.summary()["groups"]
    found = group["offload_seconds"]
    assert found["stepped"] == numel * stepped
    assert found["elements"] == (0 if offload is None else numel)
    assert ("states in host memory" in report.explain()) == (offload is not None)
    if offload is not None:
        states = {"fp32": 8, "int8": 2 + 2 / 32}[codec]
        assert found["pages"] == pytest.approx(numel * states / rates.host_link)
        step = max(2 * itemsize / rates.host_link, (2 * states + 6 * itemsize) / rates.host_memory)
        assert found["cpu_step"] == pytest.approx(numel * step)
        assert (group["page_bytes_read_per_step"] > 0) == (not stepped)
        assert planned.device_bytes([plan]) == 4 * planned.slot_bytes([plan])


def test_other_names_of_places_are_refused() -> None:
    with pytest.raises(ValueError, match="did you mean 'cpu_step'"):
        build("AdamW", SMALL, offload="cpu-step")
    with pytest.raises(ValueError, match="'cpu', 'disk:/path' or shares"):
        build("AdamW", SMALL, offload={"cpu_step": 0.5})
