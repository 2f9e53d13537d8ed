"""The schedules against closed forms, torch's and transformers', the scheduler around them, and what they refuse."""

import json
import math

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts, CyclicLR
from transformers import (
    get_cosine_schedule_with_warmup,
    get_inverse_sqrt_schedule,
    get_linear_schedule_with_warmup,
    get_wsd_schedule,
)

import distopt
from distopt.schedules import (
    Scheduler,
    WarmupConstant,
    WarmupCosine,
    WarmupCyclic,
    WarmupInverseSqrt,
    WarmupLinear,
    WarmupStableDecay,
)


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


SCHEDULES = [
    lambda **k: WarmupCosine(total_steps=20, **k),
    lambda **k: WarmupLinear(total_steps=20, **k),
    lambda **k: WarmupStableDecay(total_steps=20, decay_steps=5, **k),
    lambda **k: WarmupStableDecay(decay_steps=5, **k),
    lambda **k: WarmupCyclic(cycle_steps=10, **k),
    WarmupInverseSqrt,
    WarmupConstant,
]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warmup_is_linear_never_zero_and_reaches_one(schedule):
    factors = [schedule(warmup_steps=4)(step) for step in range(5)]
    assert factors == [0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_warmup_starts_at_the_peak(schedule):
    assert schedule()(0) == 1.0


def test_cosine_equals_transformers_after_warmup():
    ours = WarmupCosine(total_steps=50, warmup_steps=7, min_lr_ratio=0.0)
    theirs = scheduler_factors(lambda optimizer: get_cosine_schedule_with_warmup(optimizer, 7, 50), 50)
    assert [ours(step) for step in range(7, 50)] == pytest.approx(theirs[7:], abs=1e-12)


def test_linear_equals_transformers_after_warmup():
    ours = WarmupLinear(total_steps=50, warmup_steps=7)
    theirs = scheduler_factors(lambda optimizer: get_linear_schedule_with_warmup(optimizer, 7, 50), 50)
    assert [ours(step) for step in range(7, 50)] == pytest.approx(theirs[7:], abs=1e-12)


@pytest.mark.parametrize("timescale", [None, 90])
def test_inverse_sqrt_equals_transformers_after_warmup(timescale):
    ours = WarmupInverseSqrt(warmup_steps=7, timescale=timescale)
    theirs = scheduler_factors(lambda optimizer: get_inverse_sqrt_schedule(optimizer, 7, timescale), 300)
    assert [ours(step) for step in range(7, 300)] == pytest.approx(theirs[7:], abs=1e-12)


def test_triangular_cycles_equal_torch_half_a_cycle_on():
    ours = WarmupCyclic(cycle_steps=12, min_lr_ratio=0.2)
    theirs = scheduler_factors(lambda o: CyclicLR(o, base_lr=0.2, max_lr=1.0, step_size_up=6, cycle_momentum=False), 60)
    assert [ours(step) for step in range(54)] == pytest.approx(theirs[6:], abs=1e-9)


def test_cosine_cycles_equal_torch_warm_restarts():
    ours = WarmupCyclic(cycle_steps=12, min_lr_ratio=0.2, cycle_shape="cosine", warmup_steps=3)
    theirs = scheduler_factors(lambda o: CosineAnnealingWarmRestarts(o, T_0=12, eta_min=0.2), 60)
    assert [ours(step + 3) for step in range(60)] == pytest.approx(theirs, abs=1e-12)


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
        WarmupLinear(total_steps=10, warmup_steps=2, min_lr_ratio=0.25),
        WarmupStableDecay(total_steps=10, warmup_steps=2, decay_steps=4, min_lr_ratio=0.25),
        WarmupStableDecay(total_steps=10, warmup_steps=2, decay_steps=0, min_lr_ratio=0.25),
    ],
)
def test_the_end_stays_at_the_minimum(schedule):
    assert [schedule(step) for step in (10, 11, 1000)] == [0.25, 0.25, 0.25]
    assert schedule(9) > 0.25


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("cls", [Scheduler, torch.optim.lr_scheduler.LambdaLR])
def test_schedulers_follow_their_schedule(cls, schedule):
    schedule = schedule(warmup_steps=3)
    assert scheduler_factors(lambda optimizer: cls(optimizer, schedule), 12) == [schedule(step) for step in range(12)]


class Run:
    """An optimizer of two groups with a schedule."""

    def __init__(self, schedule, **options):
        self.weights = [torch.zeros(2, requires_grad=True) for _ in range(2)]
        groups = [{"params": [self.weights[0]], "lr": 1.0}, {"params": [self.weights[1]], "lr": 0.5}]
        self.optimizer = distopt.SGD(groups, lr=1.0, **options)
        self.scheduler = Scheduler(self.optimizer, schedule)

    def steps(self, count, grad=1.0):
        """The learning rates of both groups in `count` steps."""
        rates = []
        for _ in range(count):
            rates.append(tuple(group["lr"] for group in self.optimizer.param_groups))
            for weight in self.weights:
                weight.grad = torch.full_like(weight, grad)
            self.optimizer.step()
            self.scheduler.step()
        return rates


@pytest.mark.parametrize("total_steps", [None, 100])
def test_a_decay_started_later_lasts_its_steps_and_stays_at_the_minimum(total_steps):
    run = Run(WarmupStableDecay(total_steps=total_steps, warmup_steps=2, decay_steps=4, min_lr_ratio=0.2))
    assert run.steps(7)[2:] == [(1.0, 0.5)] * 5
    run.scheduler.start_decay()
    first = [rate for rate, _ in run.steps(7)]
    # the lr of the next step is set already: the first step of the decay is still the peak's
    assert first == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2, 0.2, 0.2])


def test_a_started_decay_survives_the_state_dict():
    schedule = WarmupStableDecay(decay_steps=10, decay_shape="sqrt")
    run = Run(schedule)
    run.steps(5)
    run.scheduler.start_decay()
    run.steps(3)
    saved = json.loads(json.dumps(run.scheduler.state_dict()))
    optimizer_state = run.optimizer.state_dict()
    other = Run(schedule)
    other.optimizer.load_state_dict(optimizer_state)
    other.scheduler.load_state_dict(saved)
    assert other.steps(10) == run.steps(10)


def test_a_decay_that_was_not_started_is_not_started_by_loading():
    run, other = (Run(WarmupStableDecay(decay_steps=10)) for _ in range(2))
    run.steps(5)
    other.scheduler.load_state_dict(run.scheduler.state_dict())
    assert other.steps(50)[-1] == (1.0, 0.5)


def test_a_skipped_step_does_not_move_the_schedule():
    run = Run(WarmupLinear(total_steps=10), nonfinite="skip")
    assert run.steps(2) == [(1.0, 0.5), (0.9, 0.45)]
    assert run.steps(3, grad=math.nan) == [(0.8, 0.4)] * 3
    assert run.optimizer.skipped_steps == 3
    assert [rate for rate, _ in run.steps(2)] == pytest.approx([0.8, 0.7])


def test_a_decay_that_cannot_start_is_refused():
    run = Run(WarmupStableDecay(warmup_steps=5, decay_steps=4))
    run.steps(2)
    with pytest.raises(ValueError, match=r"decay_start=2.*start the decay after it"):
        run.scheduler.start_decay()
    run.steps(5)
    run.scheduler.start_decay()
    run.steps(1)
    with pytest.raises(ValueError, match="began at step 7"):
        run.scheduler.start_decay()
    saved = run.scheduler.state_dict()
    other = Run(WarmupConstant())
    with pytest.raises(ValueError, match="use WarmupStableDecay"):
        other.scheduler.start_decay()
    with pytest.raises(ValueError, match="decay began at step 7; the schedule here is a WarmupConstant"):
        other.scheduler.load_state_dict(saved)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WarmupCosine(total_steps=0), "total_steps=0"),
        (lambda: WarmupCosine(total_steps=5, warmup_steps=6), "warmup_steps=6.*shorten the warmup"),
        (lambda: WarmupCosine(total_steps=5, min_lr_ratio=1.5), r"min_lr_ratio=1\.5"),
        (lambda: WarmupStableDecay(total_steps=5, warmup_steps=2, decay_steps=4), "decay_steps=4.*shorten"),
        (lambda: WarmupStableDecay(total_steps=5, decay_steps=-1), "decay_steps=-1"),
        (lambda: WarmupStableDecay(total_steps=5, decay_steps=1, decay_shape="step"), "decay_shape='step'"),
        (lambda: WarmupStableDecay(warmup_steps=5, decay_steps=1, decay_start=4), "decay_start=4.*start the decay"),
        (lambda: WarmupLinear(total_steps=5, warmup_steps=6), "warmup_steps=6.*shorten the warmup"),
        (lambda: WarmupConstant(warmup_steps=-1), "warmup_steps=-1: expected 0 or more"),
        (lambda: WarmupInverseSqrt(timescale=0), "timescale=0"),
        (lambda: WarmupCyclic(cycle_steps=1), "cycle_steps=1"),
        (lambda: WarmupCyclic(cycle_steps=5, cycle_shape="saw"), "cycle_shape='saw'"),
    ],
)
def test_impossible_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
