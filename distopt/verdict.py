"""The verdict of a step: one small reduction decides, before anything is changed, whether and how to go on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distopt.comm.groups import Domain

SLICE = 1 << 12
"""Elements per partial sum of squares: added in fp64, so that the norm of a large tensor keeps fp32's precision."""


@dataclass(frozen=True)
class Verdict:
    """What all ranks know of this step's gradients.

    Attributes:
        norm: global gradient norm, each shard counted once; None where nobody asked for it.
        finite: no NaN or infinity anywhere.
        inert: parameters without a gradient on any rank, by position.
        partial: parameters with a gradient on some ranks only, by position.
    """

    norm: float | None
    finite: bool
    inert: frozenset[int]
    partial: frozenset[int]


def square_sum(flat: Tensor) -> float:
    """Sum of squares of a contiguous tensor; inf or nan where an element is, exact in range where squares overflow fp32."""
    return square_sums([flat])[0]


def square_sums(flats: Sequence[Tensor]) -> list[float]:
    """Of several contiguous tensors of one device; it is waited for once."""
    if flats and not flats[0].is_cpu:
        return on_device(flats).tolist()
    return [_on_host(flat) for flat in flats]


def on_device(flats: Sequence[Tensor]) -> Tensor:
    """Their sums of squares in fp64, where they lie; inf or nan where an element is."""
    wide = (flat if flat.dtype == torch.float32 else flat.float() for flat in flats)
    return torch.stack([torch.linalg.vector_norm(flat, dtype=torch.float64) for flat in wide]).square()


def added(squares: Sequence[float | Tensor]) -> float:
    """Their sum; those that are on a device (0-D, fp64) are waited for once."""
    there = [square for square in squares if isinstance(square, Tensor)]
    here = [square for square in squares if not isinstance(square, Tensor)]
    return math.fsum([*here, torch.stack(there).sum().item()] if there else here)


def _on_host(tensor: Tensor) -> float:
    if tensor.numel() == 0:
        return 0.0
    flat = tensor.float().view(-1)
    whole = flat.numel() // SLICE * SLICE
    parts, rest = flat[:whole].view(-1, SLICE), flat[whole:]
    total = torch.dot(rest, rest).item()
    if whole:
        total += torch.linalg.vector_norm(parts, dim=1).double().square().sum().item()
    return total if math.isfinite(total) else torch.linalg.vector_norm(flat, dtype=torch.float64).item() ** 2


def reach_verdict(
    squares: Sequence[tuple[float, float]] | None,
    present: Sequence[bool],
    holds: Sequence[bool],
    union: Domain,
    norm: Domain,
    device: torch.device,
    *,
    checked: bool = True,
    found_inf: float | None = None,
    error: ValueError | None = None,
) -> Verdict:
    """Reduce what this rank sees.

    Args:
        squares: (sum of squares, share) of gradients, where share is 1 / copies among the ranks of `union`; None: no check.
        present: per parameter, whether it has a gradient here.
        holds: per parameter, whether this rank holds any of its elements; one that holds none abstains.
        union: the ranks that hold these parameters.
        norm: the ranks that the norm is taken over: the union, or more (pipeline stages).
        checked: whether the ranks look for a norm at all.
        found_inf: what a gradient scaler found here; None: there is no scaler, on any rank.
        error: why this rank cannot take the step; it says so before it raises, so that nobody waits for it.

    Raises:
        ValueError: `error`, or that another rank has one.
    """
    total = math.inf if found_inf or error else 0.0
    failed = error is not None
    if squares is not None and not math.isinf(total):
        total = sum(found * share for found, share in squares)
    count = len(present)
    if union.size == 1:
        lacking = () if all(present) else (i for i in range(count) if not present[i])
        inert, partial = frozenset(lacking), frozenset[int]()
    else:
        votes = torch.tensor(
            [*present, *(h and not p for h, p in zip(holds, present)), failed], dtype=torch.float32, device=device
        )
        _sum(union, votes)
        *both_votes, failures = votes.tolist()
        there, without = both_votes[:count], both_votes[count:]
        failed = failures > 0
        inert = frozenset(i for i in range(count) if not there[i])
        partial = frozenset(i for i in range(count) if there[i] and without[i])
    if norm.size > 1 and (checked or found_inf is not None):
        total = sum_squares(total, norm, device)
    if error is not None:
        raise error
    if failed:
        raise ValueError("this step was refused on another rank, whose error says why; nothing was changed")
    if not checked and found_inf is None:
        return Verdict(None, True, inert, partial)
    finite = math.isfinite(total)
    length = math.sqrt(total) if finite else math.inf
    return Verdict(None if squares is None else length, finite, inert, partial)


def sum_squares(squares: float, norm: Domain, device: torch.device) -> float:
    """This rank's sum of squares added over the ranks of `norm`; inf where any is not finite."""
    finite = math.isfinite(squares)
    both = torch.tensor([squares if finite else 0.0, 0.0 if finite else 1.0], dtype=torch.float64, device=device)
    _sum(norm, both)
    total, bad = both.tolist()
    return math.inf if bad else float(total)


def first_nonfinite(grads: Sequence[Tensor | None], union: Domain, device: torch.device) -> int:
    """Position of the first parameter with a non-finite gradient on any rank of the union; collective. -1: none here."""
    flags = [float(grad is not None and not bool(grad.isfinite().all())) for grad in grads]
    votes = torch.tensor(flags, dtype=torch.float32, device=device)
    _sum(union, votes)
    return next((i for i, vote in enumerate(votes.tolist()) if vote), -1)


def _sum(domain: Domain, values: Tensor) -> None:
    work = domain.all_reduce(values)
    if work is not None:
        work.wait()
