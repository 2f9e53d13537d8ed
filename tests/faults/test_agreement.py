"""Ranks act as one: they agree on what they optimize, on one verdict per step, and on one norm.

What goes wrong on one rank is the same error, or the same skipped step, on every rank, before anything is changed.
"""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import distopt
from tests.distributed.layouts import LAYOUTS, Full, Laid, flat_range, lay_out, local_tensor, mesh, ranks_mesh
from tests.distributed.pool import pool
from tests.distributed.training import Shapes, gradients, weights

HERE = __name__

# Rank 3 of 4 holds nothing of `short`, `row` and `three`, and less than the others of `uneven`.
SMALL: Shapes = {"uneven": (37, 16), "three": (3, 20), "row": (1, 40), "column": (50, 1), "short": (2,), "norm": (33,)}
OPTIONS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.01, "momentum": 0.9},
    "AdamW": {"lr": 0.01},
    "Lion": {"lr": 0.01},
    "Adafactor": {"lr": 0.01},
    "Muon": {"lr": 0.01},
    "SOAP": {"lr": 0.01, "precondition_frequency": 2},
}


def accepted(optimizer: str, shapes: Shapes) -> Shapes:
    return {name: shape for name, shape in shapes.items() if optimizer != "Muon" or len(shape) > 1}


def build(optimizer: str, layout: str, **options: Any) -> tuple[Laid, distopt.Optimizer]:
    """A model after one step, so that there are states to spoil."""
    shapes = accepted(optimizer, SMALL if LAYOUTS[layout].shapes is LAYOUTS["fsdp"].shapes else LAYOUTS[layout].shapes)
    laid = lay_out(LAYOUTS[layout], weights(shapes))
    built = getattr(distopt, optimizer)(laid.named(), **{**OPTIONS[optimizer], **LAYOUTS[layout].options(), **options})
    step(laid, built, 0)
    return laid, built


def set_grads(laid: Laid, number: int) -> None:
    shapes = full_shapes(laid).items()
    laid.set_grads({name: torch.randn(shape, generator=seeded(number, name)) for name, shape in shapes})


def full_shapes(laid: Laid) -> Shapes:
    """Whatever holds them, shapes of the whole tensors."""
    specs = {name: getattr(param, "_distopt_flat", param) for name, param in laid.params.items()}
    return {name: tuple(spec.shape) for name, spec in specs.items()}


def seeded(number: int, name: str) -> torch.Generator:
    return torch.Generator().manual_seed(1000 * number + sum(map(ord, name)))


def step(laid: Laid, built: distopt.Optimizer, number: int) -> None:
    set_grads(laid, number)
    built.step()


def snapshot(laid: Laid, built: distopt.Optimizer, *, partitioned: bool = False) -> dict[str, Tensor]:
    """All that an optimizer step may change on this rank; collective where states live with owners."""
    entries = built.state if partitioned else built.state_dict()["state"]
    found = {name: local_tensor(param).detach().clone() for name, param in laid.params.items()}
    for index, (name, param) in enumerate(laid.params.items()):
        for key, value in entries[param if partitioned else index].items():
            found[f"{name}/{key}"] = local_tensor(value).clone()
    return found


def changes(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    assert set(before) == set(after)
    return [name for name in before if not torch.equal(before[name], after[name])]


def spoil(laid: Laid, rank: int, value: float) -> str:
    """Put a value into one local gradient on one rank; the parameter's name."""
    name = next(name for name, param in laid.params.items() if local_tensor(param).numel() > 20)
    if dist.get_rank() == rank:
        grad = laid.params[name].grad
        assert grad is not None
        local_tensor(grad).view(-1)[-1] = value
    return name


# ---- the handshake


def chunked(full: Tensor, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    """Shard(0) without a word to other ranks, who may believe something else."""
    parts = full.to(dtype).chunk(dist.get_world_size())
    local = parts[dist.get_rank()] if dist.get_rank() < len(parts) else full.to(dtype)[:0]
    return nn.Parameter(
        DTensor.from_local(local, ranks_mesh(), [Shard(0)], run_check=False, shape=full.shape, stride=full.stride())
    )


def disagree(kind: str) -> tuple[str, bool]:
    """Rank 1 builds something else; what the step says, and whether any weight changed."""
    odd = dist.get_rank() == 1
    dtype = torch.bfloat16 if odd and kind == "dtype" else torch.float32
    named = [("a", chunked(torch.ones(8, 4))), ("b", chunked(torch.ones(8, 4), dtype)), ("c", chunked(torch.ones(6)))]
    cls, options = distopt.AdamW, {"lr": 0.1}
    groups: Any = named
    if odd and kind == "lr":
        options = {"lr": 0.2}
    if odd and kind == "order":
        groups = [named[1], named[0], named[2]]
    if odd and kind == "names":
        groups = [("a", named[0][1]), ("other", named[1][1]), named[2]]
    if odd and kind == "count":
        groups = named[:2]
    if odd and kind == "rule":
        cls = distopt.Lion
    if odd and kind == "max_grad_norm":
        options = {"lr": 0.1, "max_grad_norm": 1.0}
    if odd and kind == "nonfinite":
        options = {"lr": 0.1, "nonfinite": "skip"}
    if odd and kind == "rates":
        options = {"lr": 0.1, "rates": "h100"}
    if odd and kind == "groups":
        groups = [{"params": named[:1]}, {"params": named[1:], "lr": 0.05}]
    built = cls(groups, **options)
    for _, param in named:
        param.grad = torch.ones_like(param)
    try:
        built.step()
    except ValueError as error:
        return str(error), any(bool((local_tensor(param) != 1).any()) for _, param in named)
    return "", True


@pytest.mark.parametrize(
    "kind", ["lr", "order", "names", "dtype", "count", "rule", "max_grad_norm", "nonfinite", "rates", "groups"]
)
def test_ranks_that_differ_raise_the_same_error_before_anything_is_changed(kind: str) -> None:
    answers = pool(4).run(f"{HERE}:disagree", kind, deadline=60)
    for message, changed in answers:
        assert message.startswith("ranks disagree")
        assert "rank 1" in message or "ranks [1]" in message
        assert not changed


def disagree_on_flat_ranges(kind: str) -> str:
    odd, rank = dist.get_rank() == 1, dist.get_rank()
    a, b = torch.ones(8, 4), torch.ones(2, 20)
    cut = {name: flat_range(t, t.numel() // 4 * rank, t.numel() // 4 * (rank + 1)) for name, t in (("a", a), ("b", b))}
    named = list(cut.items())
    if odd and kind == "order":
        named = named[::-1]
    if odd and kind == "count":
        named = named[:1]
    built = distopt.AdamW(named, lr=0.1)
    for _, param in named:
        param.grad = torch.ones_like(param)
    try:
        built.step()
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("kind", ["order", "count"])
def test_flat_ranges_declared_differently_are_an_error_on_every_rank(kind: str) -> None:
    for message in pool(4).run(f"{HERE}:disagree_on_flat_ranges", kind, deadline=60):
        assert "ranks disagree" in message


def with_partial() -> str:
    param = nn.Parameter(DTensor.from_local(torch.ones(4, 4), ranks_mesh(), [Partial()], run_check=False))
    try:
        distopt.AdamW([("weight", param)], lr=0.1)
    except ValueError as error:
        return str(error)
    return ""


def test_a_partial_placement_is_refused_at_construction() -> None:
    for message in pool(2).run(f"{HERE}:with_partial"):
        assert "'weight'" in message
        assert "Partial" in message


# ---- small shapes


def train_small(optimizer: str, shapes: Shapes, full_weights: Full) -> dict[str, float]:
    """Three steps under FSDP2's placements; per parameter the largest difference from what one process gets."""
    laid = lay_out(LAYOUTS["distributed"], weights(shapes))
    built = getattr(distopt, optimizer)(laid.named(), **OPTIONS[optimizer])
    for number in range(3):
        laid.set_grads({name: torch.randn(s, generator=seeded(number, name)) for name, s in shapes.items()})
        built.step()
    gathered = laid.gather(shapes)
    return {
        name: float((gathered[name] - full_weights[name]).abs().max()) if gathered[name].numel() else 0.0
        for name in shapes
    }


def one_process(optimizer: str, shapes: Shapes, steps: int = 3) -> Full:
    params = {name: nn.Parameter(weight) for name, weight in weights(shapes).items()}
    built = getattr(distopt, optimizer)(params.items(), **OPTIONS[optimizer])
    for number in range(steps):
        for name, param in params.items():
            param.grad = torch.randn(shapes[name], generator=seeded(number, name))
        built.step()
    return {name: param.detach() for name, param in params.items()}


SMALL_CASES: dict[str, Shapes] = {
    "a_rank_that_holds_nothing_at_all": {"three": (3, 20), "two": (2, 9), "one": (1, 7)},
    "single_rows_and_columns": {"row": (1, 40), "column": (50, 1), "one": (1, 1)},
    "a_parameter_without_elements": {"none": (0, 8), "flat": (8, 0), "some": (5, 8)},
    "a_matrix_cut_over_all_ranks": {"wide": (18, 130), "tall": (37, 16)},
}


@pytest.mark.parametrize("case", SMALL_CASES)
@pytest.mark.parametrize("optimizer", ["AdamW", "Adafactor", "Muon", "SOAP"])
def test_the_update_is_one_process_s_with(optimizer: str, case: str) -> None:
    shapes = SMALL_CASES[case]
    expected = one_process(optimizer, shapes)
    assert all(not torch.equal(expected[name], weight) for name, weight in weights(shapes).items() if weight.numel())
    # Sums over ranks are added in another order; everything else has the same bits.
    limit = 1e-6 if optimizer == "Adafactor" else 0.0
    for found in pool(4).run(f"{HERE}:train_small", optimizer, shapes, expected):
        assert max(found.values()) <= limit, found


@pytest.mark.parametrize("kind", ["zero", "rank_one"])
@pytest.mark.parametrize("optimizer", OPTIONS)
def test_degenerate_gradients_leave_weights_and_states_finite(optimizer: str, kind: str) -> None:
    for finite in pool(2).run(f"{HERE}:train_degenerate", optimizer, kind):
        assert finite == []


def train_degenerate(optimizer: str, kind: str) -> list[str]:
    """What is not finite after four steps of gradients without information."""
    laid = lay_out(LAYOUTS["distributed"], weights(accepted(optimizer, SMALL)))
    built = getattr(distopt, optimizer)(laid.named(), **OPTIONS[optimizer])
    for _ in range(4):
        grads = {name: torch.ones(shape) for name, shape in accepted(optimizer, SMALL).items()}
        if kind == "zero":
            grads = {name: torch.zeros_like(grad) for name, grad in grads.items()}
        laid.set_grads(dict(grads))
        built.step()
    return [name for name, value in snapshot(laid, built).items() if not value.isfinite().all()]


# ---- one verdict


def step_with_a_bad_gradient(optimizer: str, layout: str, option: str, value: float) -> Any:
    """What one bad number on rank 1 leads to: (message, changed names, skipped steps, its parameter's name)."""
    laid, built = build(optimizer, layout, nonfinite=option)
    partitioned = layout == "partitioned"
    before = snapshot(laid, built, partitioned=partitioned)
    set_grads(laid, 1)
    name = spoil(laid, 1, value)
    message = ""
    try:
        built.step()
    except ValueError as error:
        message = str(error)
    changed = changes(before, snapshot(laid, built, partitioned=partitioned))
    step(laid, built, 1)
    moved = changes(before, snapshot(laid, built, partitioned=partitioned))
    return message, changed, built.skipped_steps, name, bool(moved)


BAD = [
    ("AdamW", "fsdp", 4),
    ("Adafactor", "fsdp", 4),
    ("Muon", "fsdp", 4),
    ("SOAP", "fsdp", 4),
    ("Muon", "fsdp-tp", 4),
    ("AdamW", "tp", 2),
    ("AdamW", "partitioned", 2),
    ("AdamW", "flat", 4),
]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("option", ["raise", "skip"])
@pytest.mark.parametrize(("optimizer", "layout", "world_size"), BAD)
def test_one_bad_number_on_one_rank_is_one_verdict_and_changes_nothing(
    optimizer: str, layout: str, world_size: int, option: str, value: float
) -> None:
    answers = pool(world_size).run(f"{HERE}:step_with_a_bad_gradient", optimizer, layout, option, value)
    name = answers[1][3]
    for message, changed, skipped, _, moved in answers:
        assert changed == []
        assert moved, "the next step, with good gradients, is taken"
        if option == "raise":
            assert f"{name!r} is not finite" in message
            assert skipped == 0
        else:
            assert message == ""
            assert skipped == 1


def step_with_a_bad_copy() -> list[str]:
    """What differs after rank 1 had a NaN in what rank 0 steps of a parameter."""
    ran = []
    for bad in (True, False):
        laid, built = build("AdamW", "partitioned")
        set_grads(laid, 1)
        if bad and dist.get_rank() == 1:
            grad = next(param.grad for param in laid.params.values() if param.numel() > 20)
            assert grad is not None
            grad.view(-1)[0] = float("nan")
        built.step()
        ran.append(snapshot(laid, built, partitioned=True))
    return changes(*ran)


def test_of_replicas_that_share_the_work_only_the_gradients_that_are_used_count() -> None:
    assert pool(2).run(f"{HERE}:step_with_a_bad_copy") == [[], []]


def step_unchecked() -> tuple[float | None, int, dict[str, bool]]:
    """With nonfinite=None: the norm, skipped steps, and which parameters are finite here after a bad step."""
    laid, built = build("AdamW", "fsdp", nonfinite=None)
    set_grads(laid, 1)
    spoil(laid, 1, float("nan"))
    built.step()
    finite = {name: bool(local_tensor(param).isfinite().all()) for name, param in laid.params.items()}
    return built.last_grad_norm, built.skipped_steps, finite


def test_without_a_check_the_step_is_taken_and_only_the_bad_element_suffers() -> None:
    for rank, (norm, skipped, finite) in enumerate(pool(4).run(f"{HERE}:step_unchecked")):
        assert norm is None
        assert skipped == 0
        assert [name for name, good in finite.items() if not good] == (["uneven"] if rank == 1 else [])


def step_with_found_inf(option: str | None) -> Any:
    """A gradient scaler found an infinity on rank 1 only; afterwards it finds none, with gradients scaled by 1024."""
    laid, built = build("AdamW", "fsdp", nonfinite=option)
    reference, unscaled = build("AdamW", "fsdp", nonfinite=option)
    before = snapshot(laid, built)
    set_grads(laid, 1)
    built.grad_scale = torch.tensor(1024.0)
    built.found_inf = torch.tensor(float(dist.get_rank() == 1))
    built.step()
    found = float(built.found_inf)
    changed = changes(before, snapshot(laid, built))
    set_grads(laid, 2)
    for param in laid.params.values():
        assert param.grad is not None
        local_tensor(param.grad).mul_(1024.0)
    built.found_inf = torch.tensor(0.0)
    built.step()
    step(reference, unscaled, 2)
    return found, changed, built.skipped_steps, changes(snapshot(laid, built), snapshot(reference, unscaled))


@pytest.mark.parametrize("option", ["raise", "skip", None])
def test_found_inf_on_one_rank_makes_every_rank_skip(option: str | None) -> None:
    for found, changed, skipped, differing in pool(4).run(f"{HERE}:step_with_found_inf", option, deadline=60):
        assert found == 1.0
        assert changed == []
        assert skipped == 1
        assert differing == [], "the step after it is the unscaled one, with the same step number"


def scaled_by_torch() -> tuple[float, float, list[str], list[str]]:
    """torch's own scaler on DTensors: its scale after a step with an infinity on rank 1, and after a good one."""
    laid, built = build("AdamW", "fsdp")
    reference, plain = build("AdamW", "fsdp")
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)
    before = snapshot(laid, built)
    scales = []
    for number, bad in ((1, True), (2, False)):
        scaler.scale(torch.zeros(()))
        set_grads(laid, number)
        for param in laid.params.values():
            assert param.grad is not None
            local_tensor(param.grad).mul_(scaler.get_scale())
        if bad:
            spoil(laid, 1, float("inf"))
        scaler.step(built)
        scaler.update()
        scales.append(scaler.get_scale())
        if bad:
            changed = changes(before, snapshot(laid, built))
    step(reference, plain, 2)
    return scales[0], scales[1], changed, changes(snapshot(laid, built), snapshot(reference, plain))


def test_torch_grad_scaler_skips_and_rescales_alike_on_every_rank() -> None:
    for first, second, changed, differing in pool(2).run(f"{HERE}:scaled_by_torch", deadline=60):
        assert (first, second) == (512.0, 1024.0)
        assert changed == []
        assert differing == []


# ---- missing gradients


def step_without_one_gradient(optimizer: str, option: str) -> tuple[str, list[str], Full]:
    """Rank 1 has no gradient of `uneven`; what is said, what changed, the weights."""
    laid, built = build(optimizer, "fsdp", missing_grad=option)
    before = snapshot(laid, built)
    set_grads(laid, 1)
    if dist.get_rank() == 1:
        laid.params["uneven"].grad = None
    message = ""
    try:
        built.step()
    except ValueError as error:
        message = str(error)
    return message, changes(before, snapshot(laid, built)), laid.gather(full_shapes(laid))


@pytest.mark.parametrize("optimizer", ["AdamW", "Muon"])
def test_a_gradient_missing_on_one_rank_counts_as_zero_there(optimizer: str) -> None:
    shapes = accepted(optimizer, SMALL)
    params = {name: nn.Parameter(weight) for name, weight in weights(shapes).items()}
    built = getattr(distopt, optimizer)(params.items(), **OPTIONS[optimizer])
    for number in range(2):
        for name, param in params.items():
            param.grad = torch.randn(shapes[name], generator=seeded(number, name))
        if number == 1:
            assert params["uneven"].grad is not None
            params["uneven"].grad[10:20] = 0.0
        built.step()
    for message, _, full in pool(4).run(f"{HERE}:step_without_one_gradient", optimizer, "zero"):
        assert message == ""
        assert [name for name in shapes if not torch.equal(full[name], params[name])] == []


@pytest.mark.parametrize("optimizer", ["AdamW", "Muon", "SOAP"])
def test_a_gradient_missing_on_one_rank_raises_on_every_rank_if_asked_for(optimizer: str) -> None:
    for message, changed, _ in pool(4).run(f"{HERE}:step_without_one_gradient", optimizer, "raise"):
        assert "'uneven' is missing on some ranks" in message
        assert changed == []


def step_without_gradients(optimizer: str) -> tuple[list[str], list[str]]:
    """No rank has a gradient of `uneven` and `short`: what changed in this step, and in the one after it."""
    laid, built = build(optimizer, "fsdp", missing_grad="raise")
    before = snapshot(laid, built)
    set_grads(laid, 1)
    for name in ("uneven", "short"):
        if name in laid.params:
            laid.params[name].grad = None
    built.step()
    now = snapshot(laid, built)
    step(laid, built, 2)
    return changes(before, now), changes(now, snapshot(laid, built))


@pytest.mark.parametrize("optimizer", OPTIONS)
def test_a_parameter_without_gradient_on_all_ranks_is_inert_and_keeps_its_state(optimizer: str) -> None:
    for rank, (first, second) in enumerate(pool(4).run(f"{HERE}:step_without_gradients", optimizer)):
        still = [name for name in first if name.split("/")[0] in ("uneven", "short") and not name.endswith("/step")]
        assert still == []
        assert "column" in first
        assert rank == 3 or "uneven" in second


# ---- one norm


def global_norm(shapes: Shapes, number: int) -> float:
    grads = [grad for grad in gradients(shapes, number).values() if grad is not None]
    return torch.cat([grad.flatten().double() for grad in grads]).norm().item()


def clipped_step(layout: str) -> tuple[float | None, dict[str, bool]]:
    """The norm, and per parameter whether its gradient was left clipped to 0.5."""
    shapes = LAYOUTS[layout].shapes
    laid = lay_out(LAYOUTS[layout], weights(shapes))
    built = distopt.SGD(laid.named(), lr=0.1, max_grad_norm=0.5, **LAYOUTS[layout].options())
    grads = gradients(shapes, 0)
    laid.set_grads(grads)
    built.step()
    scale = 0.5 / global_norm(shapes, 0)
    left = {}
    for name, param in laid.params.items():
        whole = grads[name]
        assert whole is not None
        assert param.grad is not None
        expected = laid.local(name, whole) * scale
        left[name] = torch.allclose(local_tensor(param.grad), expected, rtol=1e-5, atol=0)
    return built.last_grad_norm, left


@pytest.mark.parametrize(
    ("layout", "world_size"),
    [("tp", 2), ("fsdp-tp", 4), ("experts-fsdp", 4), ("hsdp", 4), ("pipeline", 2), ("pipeline", 4), ("flat", 4)],
)
def test_every_shard_counts_once_in_the_norm(layout: str, world_size: int) -> None:
    for norm, left in pool(world_size).run(f"{HERE}:clipped_step", layout):
        assert norm == pytest.approx(global_norm(LAYOUTS[layout].shapes, 0), rel=1e-6)
        assert all(left.values()), left


def clipped_mixture() -> tuple[float | None, float, float]:
    """DTensors of two meshes beside plain tensors in two groups: the norm, and one element of two updates."""
    both = mesh(("replicate", 2), ("shard", 2))
    ones = torch.ones(8, 8)
    params = {
        "sharded": nn.Parameter(distribute_tensor(ones, ranks_mesh(), [Shard(0)])),
        "hybrid": nn.Parameter(distribute_tensor(ones, both, [Replicate(), Shard(1)])),
        "plain": nn.Parameter(ones.clone()),
    }
    named = list(params.items())
    built = distopt.SGD([{"params": named[:1]}, {"params": named[1:]}], lr=1.0, max_grad_norm=2.0)
    for param in params.values():
        param.grad = torch.ones_like(param)
    built.step()
    change = [float(1 - local_tensor(params[name]).flatten()[0]) for name in ("sharded", "plain")]
    return built.last_grad_norm, change[0], change[1]


def test_clipping_takes_dtensors_of_several_meshes_and_plain_tensors_together() -> None:
    norm = (3 * 64) ** 0.5
    for measured, sharded, plain in pool(4).run(f"{HERE}:clipped_mixture"):
        assert measured == pytest.approx(norm, rel=1e-6)
        assert sharded == pytest.approx(2 / norm, rel=1e-5)
        assert plain == pytest.approx(2 / norm, rel=1e-5)


def bad_stage(option: str) -> tuple[str, int, list[str]]:
    """A NaN in the first pipeline stage: what each stage says and changes."""
    shapes = LAYOUTS["pipeline"].shapes
    laid = lay_out(LAYOUTS["pipeline"], weights(shapes))
    built = distopt.AdamW(laid.named(), lr=0.1, nonfinite=option, norm_group=dist.group.WORLD)
    before = snapshot(laid, built)
    laid.set_grads(gradients(shapes, 0))
    if dist.get_rank() == 0:
        grad = next(iter(laid.params.values())).grad
        assert grad is not None
        local_tensor(grad).view(-1)[0] = float("nan")
    message = ""
    try:
        built.step()
    except ValueError as error:
        message = str(error)
    return message, built.skipped_steps, changes(before, snapshot(laid, built))


@pytest.mark.parametrize("option", ["raise", "skip"])
def test_a_bad_gradient_in_one_pipeline_stage_stops_all_stages(option: str) -> None:
    for message, skipped, changed in pool(4).run(f"{HERE}:bad_stage", option, deadline=60):
        assert changed == []
        assert skipped == (option == "skip")
        assert ("not finite" in message) == (option == "raise")
