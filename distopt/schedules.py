"""Learning-rate schedules as pure functions of the step: a factor in [0, 1] that multiplies the base learning rate.

They fit `torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)`, or a loop that sets `group["lr"]` itself. `step`
counts committed steps from 0: a skipped step does not advance it.
"""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class WarmupCosine:
    """Linear warmup, then half a cosine down to `min_lr_ratio` at `total_steps` (Loshchilov and Hutter 2017, eq. 5, one
    cycle), and constant beyond.

    Attributes:
        total_steps: the length of the run, warmup included.
        warmup_steps: steps of linear warmup. Step 0 has factor 1/warmup_steps, so no step is lost to a zero rate; 0 is
            no warmup.
        min_lr_ratio: the factor at the end, in [0, 1].

    Raises:
        ValueError: for a warmup longer than the run or a ratio outside [0, 1].
    """

    total_steps: int
    warmup_steps: int = 0
    min_lr_ratio: float = 0.1

    def __post_init__(self) -> None:
        _check(self.total_steps, self.warmup_steps, self.min_lr_ratio)

    def __call__(self, step: int) -> float:
        """The factor of `step` (0-based)."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        length = max(1, self.total_steps - self.warmup_steps)
        progress = min(1.0, (step - self.warmup_steps) / length)
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True, kw_only=True)
class WarmupStableDecay:
    """Linear warmup, a constant stretch, and a decay over the last `decay_steps` (Hu et al. 2024, MiniCPM, section 4;
    the 1-sqrt shape is Hägele et al. 2024, "Scaling Laws and Compute-Optimal Training Beyond Fixed Training
    Durations").

    Attributes:
        total_steps: the length of the run, warmup and decay included.
        warmup_steps: steps of linear warmup. Step 0 has factor 1/warmup_steps; 0 is no warmup.
        decay_steps: steps of decay at the end.
        min_lr_ratio: the factor at the end, in [0, 1].
        decay_shape: "linear", "sqrt" (1 - sqrt of the progress) or "cosine".

    Raises:
        ValueError: for warmup and decay longer than the run together, a ratio outside [0, 1], or an unknown shape.
    """

    total_steps: int
    warmup_steps: int = 0
    decay_steps: int
    min_lr_ratio: float = 0.0
    decay_shape: Literal["linear", "sqrt", "cosine"] = "linear"

    def __post_init__(self) -> None:
        _check(self.total_steps, self.warmup_steps, self.min_lr_ratio)
        if not 0 <= self.decay_steps <= self.total_steps - self.warmup_steps:
            raise ValueError(
                f"decay_steps={self.decay_steps}: expected 0 to total_steps - warmup_steps = "
                f"{self.total_steps - self.warmup_steps}; shorten the warmup or the decay"
            )
        if self.decay_shape not in ("linear", "sqrt", "cosine"):
            raise ValueError(f"decay_shape={self.decay_shape!r}: expected 'linear', 'sqrt' or 'cosine'")

    def __call__(self, step: int) -> float:
        """The factor of `step` (0-based)."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        decay_start = self.total_steps - self.decay_steps
        if step < decay_start:
            return 1.0
        progress = 1.0 if step >= self.total_steps else (step - decay_start) / self.decay_steps
        if self.decay_shape == "linear":
            left = 1 - progress
        elif self.decay_shape == "sqrt":
            left = 1 - math.sqrt(progress)
        else:
            left = 0.5 * (1 + math.cos(math.pi * progress))
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * left


def _check(total_steps: int, warmup_steps: int, min_lr_ratio: float) -> None:
    if total_steps < 1:
        raise ValueError(f"total_steps={total_steps}: expected at least 1")
    if not 0 <= warmup_steps <= total_steps:
        raise ValueError(f"warmup_steps={warmup_steps}: expected 0 to total_steps={total_steps}; shorten the warmup")
    if not 0 <= min_lr_ratio <= 1:
        raise ValueError(f"min_lr_ratio={min_lr_ratio}: expected a fraction of the base learning rate in [0, 1]")
