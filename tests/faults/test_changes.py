"""What changes between steps: gradients that come late, layouts of memory, parameters taken out, options, precision."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import distopt
from tests.distributed.pool import pool


@pytest.mark.parametrize("numel", [100, 20000])
def test_a_late_parameter_gets_gradients_scaled_like_the_others(numel: int) -> None:
    params = [nn.Parameter(torch.zeros(numel)) for _ in range(2)]
    optimizer = distopt.SGD(params, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(2):
        optimizer.zero_grad()
        scaler.scale(params[0].sum() + (params[1].sum() if step else 0)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert torch.allclose(params[0], torch.tensor(-0.2))
    assert torch.allclose(params[1], torch.tensor(-0.1))


def test_memory_format_changed_after_bind_still_updates_the_right_elements() -> None:
    ours = nn.Conv2d(16, 16, 4, bias=False)
    theirs = copy.deepcopy(ours)
    first, second = distopt.AdamW(ours.parameters(), lr=0.1), torch.optim.AdamW(theirs.parameters(), lr=0.1)
    for step in range(2):
        if step:
            ours.to(memory_format=torch.channels_last)
        grad = torch.randn(16, 16, 4, 4)
        ours.weight.grad, theirs.weight.grad = grad.clone(), grad.clone()
        first.step()
        second.step()
    assert torch.allclose(ours.weight, theirs.weight, atol=1e-6)


def test_a_bare_parameter_taken_out_leaves_its_neighbour_its_own_state() -> None:
    params = [nn.Parameter(torch.randn(8)) for _ in range(2)]
    optimizer = distopt.AdamW(params, lr=0.1)
    for param, value in zip(params, (1.0, -5.0)):
        param.grad = torch.full((8,), value)
    optimizer.step()
    expected = optimizer.state[params[1]]["exp_avg"].clone()
    optimizer.param_groups[0]["params"] = [params[1]]
    assert torch.equal(optimizer.state[params[1]]["exp_avg"], expected)


@pytest.mark.parametrize("numel", [1000, 20000])
def test_low_precision_gradients_are_unscaled_in_fp32_whatever_the_size(numel: int) -> None:
    weight = nn.Parameter(torch.zeros(numel, dtype=torch.float16))
    optimizer = distopt.AdamW([weight], lr=0.1)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(65536.0), torch.tensor(0.0)
    weight.grad = torch.full((numel,), 1e-3, dtype=torch.float16)
    optimizer.step()
    gradient = float(torch.tensor(1e-3, dtype=torch.float16)) / 65536
    assert weight[0].item() == pytest.approx(-0.1 * gradient / (gradient + 1e-8), rel=1e-3)


def test_an_option_that_adds_states_after_bind_is_refused_before_anything_changes() -> None:
    weight = nn.Parameter(torch.ones(4))
    optimizer = distopt.SGD([weight], lr=0.1)
    weight.grad = torch.ones(4)
    optimizer.step()
    before = weight.detach().clone()
    optimizer.param_groups[0]["momentum"] = 0.9
    with pytest.raises(ValueError, match="momentum_buffer"):
        optimizer.step()
    assert torch.equal(weight, before)


def wrapped() -> nn.Module:
    return nn.Sequential(checkpoint_wrapper(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))))


def test_buffers_under_a_checkpoint_wrapper_are_saved_and_unexpected_tensors_refused(tmp_path: Path) -> None:
    model = wrapped()
    optimizer = distopt.AdamW(model.parameters())
    model(torch.randn(8, 4) + 5).sum().backward()
    optimizer.step()
    distopt.checkpoint.save(tmp_path / "step-1", model=model, optimizer=optimizer)
    other = wrapped()
    distopt.checkpoint.load(tmp_path / "step-1", model=other, optimizer=distopt.AdamW(other.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), other.buffers(), strict=True))
    other[0].register_buffer("extra", torch.zeros(1))
    grown = distopt.AdamW(other.parameters())
    with pytest.raises(distopt.checkpoint.CheckpointError, match="extra"):
        distopt.checkpoint.load(tmp_path / "step-1", model=other, optimizer=grown)


def test_a_bad_lr_on_one_rank_stops_every_rank_at_once() -> None:
    answers = pool(2).run("tests.faults.changes:bad_lr_on_rank_one")
    assert "lr" in answers[1][0]
    assert "another rank" in answers[0][0]
    assert all(unchanged for _, unchanged in answers)


def test_a_channels_last_weight_is_updated_when_replicas_share_the_work() -> None:
    for moved in pool(2).run("tests.faults.changes:partitioned_channels_last"):
        assert moved > 0.05


def test_fsdp_checkpoint_after_an_evaluation_holds_the_sharded_parameters(tmp_path: Path) -> None:
    assert all(pool(2).run("tests.faults.changes:save_after_evaluation", str(tmp_path / "step-1")))


def test_lone_state_dict_ends_with_the_way_to_do_it() -> None:
    try:
        error, _ = pool(2).run("tests.faults.changes:lone_state_dict")
    finally:
        pool(2).close()  # its ranks do not agree any more about how many collectives there were
    assert "every one of them has to call it" in error
    assert "distopt.checkpoint.save" in error


def test_bare_tensors_on_several_ranks_are_warned_of() -> None:
    for bare, named in pool(2).run("tests.faults.changes:warnings_of_bare_tensors"):
        assert len(bare) == 1
        assert "named_parameters()" in bare[0]
        assert not named


def test_checkpoint_in_the_middle_of_accumulation_is_refused(tmp_path: Path) -> None:
    model = nn.Linear(4, 4)
    optimizer = distopt.AdamW(model.named_parameters())

    def save() -> None:
        distopt.checkpoint.save(tmp_path / "saved", model=model, optimizer=optimizer)

    for _ in range(2):
        model(torch.ones(2, 4)).sum().backward()
        with pytest.raises(distopt.checkpoint.CheckpointError, match="no step has taken"):
            save()
        optimizer.step()
        save()  # gradients that were taken may still be there
    model(torch.ones(2, 4)).sum().backward()
    with pytest.raises(distopt.checkpoint.CheckpointError, match="no step has taken"):
        save()
    optimizer.zero_grad(set_to_none=False)
    save()
    optimizer.zero_grad()
    save()


def test_hyperparameters_that_a_load_changes_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Linear(4, 4)
    optimizer = distopt.AdamW(model.named_parameters(), weight_decay=0.1)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    distopt.checkpoint.save(tmp_path / "saved", model=model, optimizer=optimizer)
    loads: tuple[Callable[[distopt.Optimizer], Any], ...] = (
        lambda other: other.load_state_dict(optimizer.state_dict()),
        lambda other: distopt.checkpoint.load(tmp_path / "saved", model=model, optimizer=other),
    )
    for load in loads:
        caplog.clear()
        other = distopt.AdamW(model.named_parameters(), lr=0.5, weight_decay=0.2)
        load(other)
        assert [record.getMessage() for record in caplog.records] == [
            "group 0: weight_decay was 0.2 here and is 0.1 now, as it was saved"
        ]
        assert other.param_groups[0]["lr"] == 1e-3
