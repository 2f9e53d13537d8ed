"""A line search for the strong Wolfe conditions (Nocedal and Wright, 2006, algorithms 3.5 and 3.6), with the cubic
interpolation and the safeguards of minFunc (Schmidt, 2005), which torch.optim.LBFGS has too: the same steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

DECREASE, CURVATURE = 1e-4, 0.9
"""c1: the least share of the decrease that the slope promises; c2: the largest share of the slope that may be left."""


@dataclass(frozen=True)
class Trial:
    """A point on the line.

    Attributes:
        t: how far along the direction.
        loss: there.
        slope: of the loss along the direction, there.
        grad: the local gradient, there.
        largest: largest magnitude in the gradient.
    """

    t: float
    loss: float
    slope: float
    grad: Tensor
    largest: float


def strong_wolfe(
    evaluate: Callable[[float], Trial], start: Trial, t: float, *, extent: float, tolerance: float, max_evals: int
) -> tuple[Trial, int]:
    """A point where the loss has decreased enough and the slope has flattened enough, or the best one found.

    Args:
        evaluate: the trial at a distance.
        start: the trial at 0; its slope is negative.
        t: the first distance to try.
        extent: largest magnitude in the direction.
        tolerance: give up when the bracket moves no coordinate by more.
        max_evals: evaluations after the first.

    Returns:
        The trial, and how many evaluations were made.
    """

    def too_high(trial: Trial) -> bool:
        return not trial.loss <= start.loss + DECREASE * trial.t * start.slope  # also where it is not a number

    def flat(trial: Trial) -> bool:
        return abs(trial.slope) <= -CURVATURE * start.slope

    # Go on until something is passed that the conditions hold at, or before.
    before, here, evals = start, evaluate(t), 1
    while True:
        if evals > max_evals:
            return (here if here.loss < start.loss else start), evals
        if too_high(here) or (evals > 2 and here.loss >= before.loss):
            break
        if flat(here):
            return here, evals
        if here.slope >= 0:
            break
        t = minimum_of_cubic(before, here, here.t + 0.01 * (here.t - before.t), 10 * here.t)
        before, here, evals = here, evaluate(t), evals + 1

    # Close in on it: `low` is the best end of the bracket, `high` the other.
    low, high = (before, here) if before.loss <= here.loss else (here, before)
    hugging = False
    while evals <= max_evals and abs(high.t - low.t) * extent >= tolerance:
        left, right = min(low.t, high.t), max(low.t, high.t)
        t = minimum_of_cubic(low, high, left, right)
        margin = 0.1 * (right - left)
        near = min(right - t, t - left) < margin
        if near and (hugging or not left < t < right):  # twice at an end: the interpolation is stuck there
            t = right - margin if right - t < t - left else left + margin
            near = False
        hugging = near
        here, evals = evaluate(t), evals + 1
        if too_high(here) or here.loss >= low.loss:
            low, high = (here, low) if here.loss < low.loss else (low, here)
        else:
            if flat(here):
                return here, evals
            low, high = here, (low if here.slope * (high.t - low.t) >= 0 else high)
    return low, evals


def minimum_of_cubic(a: Trial, b: Trial, low: float, high: float) -> float:
    """Where the cubic through two losses and slopes has its minimum, kept within [low, high]; the middle of these where it
    has none (Nocedal and Wright, eq. 3.59)."""
    if a.t > b.t:
        a, b = b, a
    bend = a.slope + b.slope - 3 * (a.loss - b.loss) / (a.t - b.t)
    square = bend**2 - a.slope * b.slope
    if not (math.isfinite(square) and square >= 0):
        return (low + high) / 2
    root = math.sqrt(square)
    divisor = b.slope - a.slope + 2 * root
    if divisor == 0:
        return (low + high) / 2
    return min(max(b.t - (b.t - a.t) * ((b.slope + root - bend) / divisor), low), high)
