"""Learning-rate schedules as pure functions of the step: a factor in [0, 1] that multiplies the base learning rate.

`Scheduler(optimizer, schedule)` gives them torch's scheduler interface; a loop may as well set `group["lr"]` itself.
`step` counts committed steps from 0: a skipped step does not advance it. All warmups are linear, step 0 has factor
1/warmup_steps, so that no step is lost to a zero rate; 0 is no warmup.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


@dataclass(frozen=True, kw_only=True)
class WarmupConstant:
    """Linear warmup, then 1; the base of the others.

    Attributes:
        warmup_steps: steps of linear warmup.

    Raises:
        ValueError: for a negative warmup.
    """

    warmup_steps: int = 0

    def __post_init__(self) -> None:
        _check(None, self.warmup_steps, 0)

    def __call__(self, step: int) -> float:
        """The factor of `step` (0-based)."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        return self.after_warmup(step - self.warmup_steps)

    def after_warmup(self, steps: int) -> float:
        """The factor so many steps after the warmup."""
        return 1.0


@dataclass(frozen=True, kw_only=True)
class WarmupCosine(WarmupConstant):
    """Linear warmup, then half a cosine down to `min_lr_ratio` at `total_steps` (Loshchilov and Hutter 2017, eq. 5, one
    cycle), and constant beyond.

    Attributes:
        total_steps: the length of the run, warmup included.
        warmup_steps: steps of linear warmup.
        min_lr_ratio: the factor at the end, in [0, 1].

    Raises:
        ValueError: for a warmup longer than the run or a ratio outside [0, 1].
    """

    total_steps: int
    min_lr_ratio: float = 0.1

    def __post_init__(self) -> None:
        _check(self.total_steps, self.warmup_steps, self.min_lr_ratio)

    def after_warmup(self, steps: int) -> float:
        """The factor so many steps after the warmup."""
        progress = min(1.0, steps / max(1, self.total_steps - self.warmup_steps))
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True, kw_only=True)
class WarmupStableDecay(WarmupConstant):
    """Linear warmup, a constant stretch, and a decay of `decay_steps` (Hu et al. 2024, MiniCPM, section 4; the 1-sqrt
    shape is Hägele et al. 2024, "Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations").

    The decay ends at `total_steps`, or begins when it is told to: `decaying_from(step)`, `Scheduler.start_decay()`.

    Attributes:
        total_steps: the length of the run, warmup and decay included; None: not known yet.
        warmup_steps: steps of linear warmup.
        decay_steps: steps of decay.
        min_lr_ratio: the factor at the end, in [0, 1].
        decay_shape: "linear", "sqrt" (1 - sqrt of the progress) or "cosine".
        decay_start: the first step of the decay; None: total_steps - decay_steps.

    Raises:
        ValueError: for warmup and decay longer than the run together, a ratio outside [0, 1], or an unknown shape.
    """

    total_steps: int | None = None
    decay_steps: int
    min_lr_ratio: float = 0.0
    decay_shape: Literal["linear", "sqrt", "cosine"] = "linear"
    decay_start: int | None = None

    def __post_init__(self) -> None:
        _check(self.total_steps, self.warmup_steps, self.min_lr_ratio)
        longest = math.inf if self.total_steps is None else self.total_steps - self.warmup_steps
        if not 0 <= self.decay_steps <= longest:
            raise ValueError(
                f"decay_steps={self.decay_steps}: expected 0 to total_steps - warmup_steps = {longest}; shorten the "
                "warmup or the decay"
            )
        if self.decay_shape not in ("linear", "sqrt", "cosine"):
            raise ValueError(f"decay_shape={self.decay_shape!r}: expected 'linear', 'sqrt' or 'cosine'")
        if self.decay_start is not None and self.decay_start < self.warmup_steps:
            raise ValueError(
                f"decay_start={self.decay_start}: the warmup takes {self.warmup_steps} steps; start the decay after it"
            )

    def after_warmup(self, steps: int) -> float:
        """The factor so many steps after the warmup."""
        into = steps + self.warmup_steps - self._start()
        if into < 0:
            return 1.0
        progress = 1.0 if into >= self.decay_steps else into / self.decay_steps
        if self.decay_shape == "linear":
            left = 1 - progress
        elif self.decay_shape == "sqrt":
            left = 1 - math.sqrt(progress)
        else:
            left = 0.5 * (1 + math.cos(math.pi * progress))
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * left

    def decaying_from(self, step: int) -> "WarmupStableDecay":
        """The same schedule, whose decay begins at `step`, sooner or later than was planned.

        Raises:
            ValueError: the warmup is not over then, or the decay has begun before.
        """
        if self._start() < step:
            raise ValueError(f"the decay began at step {self._start()}, it cannot start again at {step}")
        return replace(self, decay_start=step)

    def _start(self) -> float:
        if self.decay_start is not None:
            return self.decay_start
        return math.inf if self.total_steps is None else self.total_steps - self.decay_steps


@dataclass(frozen=True, kw_only=True)
class WarmupLinear(WarmupConstant):
    """Linear warmup, then linearly down to `min_lr_ratio` at `total_steps`, and constant beyond (Bergsma et al. 2025,
    arXiv 2502.15938, find the decay to zero best).

    Attributes:
        total_steps: the length of the run, warmup included.
        warmup_steps: steps of linear warmup.
        min_lr_ratio: the factor at the end, in [0, 1].

    Raises:
        ValueError: for a warmup longer than the run or a ratio outside [0, 1].
    """

    total_steps: int
    min_lr_ratio: float = 0.0

    def __post_init__(self) -> None:
        _check(self.total_steps, self.warmup_steps, self.min_lr_ratio)

    def after_warmup(self, steps: int) -> float:
        """The factor so many steps after the warmup."""
        progress = min(1.0, steps / max(1, self.total_steps - self.warmup_steps))
        return 1 - (1 - self.min_lr_ratio) * progress


@dataclass(frozen=True, kw_only=True)
class WarmupInverseSqrt(WarmupConstant):
    """Linear warmup, then √(timescale / (timescale + steps since)), which needs no end (Vaswani et al. 2017, section
    5.3, where the timescale is the warmup; Zhai et al. 2022, arXiv 2106.04560, section 3.5, which has one of its own).

    Attributes:
        warmup_steps: steps of linear warmup.
        timescale: steps after which the factor has fallen to 1/√2; None: the warmup, or 10,000 without one.

    Raises:
        ValueError: for a negative warmup, or a timescale below 1.
    """

    timescale: int | None = None

    def __post_init__(self) -> None:
        _check(None, self.warmup_steps, 0)
        if self.timescale is not None and self.timescale < 1:
            raise ValueError(f"timescale={self.timescale}: expected at least 1 step")

    def after_warmup(self, steps: int) -> float:
        """The factor so many steps after the warmup."""
        timescale = self.timescale or self.warmup_steps or 10_000
        return math.sqrt(timescale / (timescale + steps))


@dataclass(frozen=True, kw_only=True)
class WarmupCyclic(WarmupConstant):
    """Linear warmup, then cycles between `min_lr_ratio` and 1 without end.

    Attributes:
        cycle_steps: length of a cycle.
        warmup_steps: steps of linear warmup.
        min_lr_ratio: the factor at the foot of a cycle, in [0, 1].
        cycle_shape: "triangle" goes down and up again, so that it goes on from the warmup (Smith 2017, the triangular
            policy, half a cycle on); "cosine" goes down and restarts at 1 (Loshchilov and Hutter 2017, eq. 5).

    Raises:
        ValueError: for a cycle shorter than 2 steps, a negative warmup, a ratio outside [0, 1], or an unknown shape.
    """

    cycle_steps: int
    min_lr_ratio: float = 0.1
    cycle_shape: Literal["triangle", "cosine"] = "triangle"

    def __post_init__(self) -> None:
        _check(None, self.warmup_steps, self.min_lr_ratio)
        if self.cycle_steps < 2:
            raise ValueError(f"cycle_steps={self.cycle_steps}: expected at least 2")
        if self.cycle_shape not in ("triangle", "cosine"):
            raise ValueError(f"cycle_shape={self.cycle_shape!r}: expected 'triangle' or 'cosine'")

    def after_warmup(self, steps: int) -> float:
        """The factor so many steps after the warmup."""
        progress = steps % self.cycle_steps / self.cycle_steps
        high = abs(1 - 2 * progress) if self.cycle_shape == "triangle" else 0.5 * (1 + math.cos(math.pi * progress))
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * high


class Scheduler(LRScheduler):
    """torch's scheduler interface for a schedule: every group's lr is the one it was built with, times the factor.

    Call `step()` after each `optimizer.step()`. A step that the optimizer skipped (`skipped_steps`) does not move it.
    `state_dict` holds the position and the start of a decay; the schedule's settings are those it is built with.

    Args:
        optimizer: any torch.optim.Optimizer.
        schedule: one of this module, or any function from the step (0-based) to a factor.
        last_epoch: as in torch: -1 begins.
    """

    def __init__(self, optimizer: Optimizer, schedule: Callable[[int], float], last_epoch: int = -1) -> None:
        self.schedule = schedule
        self._skipped: int = getattr(optimizer, "skipped_steps", 0)
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[Any]:
        """The learning rates of this step."""
        factor = self.schedule(self.last_epoch)
        return [base * factor for base in self.base_lrs]

    def step(self, epoch: int | None = None) -> None:
        """Go on to the next step, unless the optimizer skipped this one."""
        before, self._skipped = self._skipped, getattr(self.optimizer, "skipped_steps", 0)
        if self._skipped == before:
            super().step(epoch)

    def start_decay(self) -> None:
        """Let the decay of a `WarmupStableDecay` begin with the next step; the same on every rank.

        Raises:
            ValueError: the schedule is another; it warms up still, or decays already.
        """
        if not isinstance(self.schedule, WarmupStableDecay):
            raise ValueError(f"{type(self.schedule).__name__} has no decay to start; use WarmupStableDecay")
        self.schedule = self.schedule.decaying_from(self.last_epoch)

    def state_dict(self) -> dict[str, Any]:
        """JSON-able where the learning rates are numbers."""
        kept = {key: value for key, value in super().state_dict().items() if key not in ("schedule", "_skipped")}
        return {**kept, "decay_start": getattr(self.schedule, "decay_start", None)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken.

        Raises:
            ValueError: a decay had begun there, and the schedule here has none.
        """
        start = state_dict["decay_start"]
        if start is not None:
            if not isinstance(self.schedule, WarmupStableDecay):
                raise ValueError(
                    f"the state dict is of a WarmupStableDecay whose decay began at step {start}; the schedule here is "
                    f"a {type(self.schedule).__name__}"
                )
            self.schedule = replace(self.schedule, decay_start=start)
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "decay_start"})


def _check(total_steps: int | None, warmup_steps: int, min_lr_ratio: float) -> None:
    if total_steps is not None and total_steps < 1:
        raise ValueError(f"total_steps={total_steps}: expected at least 1")
    if warmup_steps < 0 or (total_steps is not None and warmup_steps > total_steps):
        end = "" if total_steps is None else f" to total_steps={total_steps}; shorten the warmup"
        raise ValueError(f"warmup_steps={warmup_steps}: expected 0{end or ' or more'}")
    if not 0 <= min_lr_ratio <= 1:
        raise ValueError(f"min_lr_ratio={min_lr_ratio}: expected a fraction of the base learning rate in [0, 1]")
