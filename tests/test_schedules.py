"""The schedules against closed forms and against transformers', and the settings they refuse."""

import math

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup, get_wsd_schedule

from distopt.schedules import WarmupCosine, WarmupStableDecay


def scheduler_factors(make, steps: int) -> list[float]:
    """What a torch scheduler makes of a learning rate of 1, step by step."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = make(optimizer)
    factors = []
    for _ in range(steps):
        factors.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return factors


@pytest.mark.parametrize("schedule", [WarmupCosine, lambda **k: WarmupStableDecay(decay_steps=5, **k)])
def test_warmup_is_linear_never_zero_and_reaches_one(schedule):
    factors = [schedule(total_steps=20, warmup_steps=4)(step) for step in range(5)]
    assert factors == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_no_warmup_starts_at_the_peak():
    assert WarmupCosine(total_steps=10)(0) == 1.0
    assert WarmupStableDecay(total_steps=10, decay_steps=0)(0) == 1.0


def test_cosine_equals_transformers_after_warmup():
    ours = WarmupCosine(total_steps=50, warmup_steps=7, min_lr_ratio=0.0)
    theirs = scheduler_factors(lambda optimizer: get_cosine_schedule_with_warmup(optimizer, 7, 50), 50)
    assert [ours(step) for step in range(7, 50)] == pytest.approx(theirs[7:], abs=1e-12)


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_wsd_equals_transformers_after_warmup(shape):
    ours = WarmupStableDecay(total_steps=50, warmup_steps=7, decay_steps=13, min_lr_ratio=0.2, decay_shape=shape)
    theirs = scheduler_factors(
        lambda optimizer: get_wsd_schedule(
            optimizer,
            num_warmup_steps=7,
            num_decay_steps=13,
            num_training_steps=50,
            min_lr_ratio=0.2,
            decay_type=shape,
        ),
        50,
    )
    assert [ours(step) for step in range(7, 50)] == pytest.approx(theirs[7:], abs=1e-12)


def test_sqrt_decay_is_one_minus_the_square_root_of_the_progress():
    ours = WarmupStableDecay(total_steps=40, decay_steps=16, decay_shape="sqrt")
    assert [ours(24 + step) for step in range(17)] == pytest.approx([1 - math.sqrt(step / 16) for step in range(17)])


@pytest.mark.parametrize(
    "schedule",
    [
        WarmupCosine(total_steps=10, warmup_steps=2, min_lr_ratio=0.25),
        WarmupStableDecay(total_steps=10, warmup_steps=2, decay_steps=4, min_lr_ratio=0.25),
        WarmupStableDecay(total_steps=10, warmup_steps=2, decay_steps=0, min_lr_ratio=0.25),
    ],
)
def test_the_end_stays_at_the_minimum(schedule):
    assert [schedule(step) for step in (10, 11, 1000)] == [0.25, 0.25, 0.25]
    assert schedule(9) > 0.25


def test_fits_torch_lambda_lr():
    schedule = WarmupCosine(total_steps=12, warmup_steps=3)
    factors = scheduler_factors(lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, schedule), 12)
    assert factors == [schedule(step) for step in range(12)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WarmupCosine(total_steps=0), "total_steps=0"),
        (lambda: WarmupCosine(total_steps=5, warmup_steps=6), "warmup_steps=6.*shorten the warmup"),
        (lambda: WarmupCosine(total_steps=5, min_lr_ratio=1.5), r"min_lr_ratio=1\.5"),
        (lambda: WarmupStableDecay(total_steps=5, warmup_steps=2, decay_steps=4), "decay_steps=4.*shorten"),
        (lambda: WarmupStableDecay(total_steps=5, decay_steps=-1), "decay_steps=-1"),
        (lambda: WarmupStableDecay(total_steps=5, decay_steps=1, decay_shape="step"), "decay_shape='step'"),
    ],
)
def test_impossible_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
