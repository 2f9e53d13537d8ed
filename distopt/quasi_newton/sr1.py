"""SR1 with a trust region (Nocedal and Wright, 2006, algorithm 6.2), dense."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distopt.quasi_newton.driver import QuasiNewton, require_finite, require_small
from distopt.quasi_newton.vectors import Vectors

ACCEPTED = 1e-4
"""Least share of the predicted decrease at which a step is taken."""
SKIPPED = 1e-8
"""Updates with |sᵀ(y − Bs)| below this share of ‖s‖ ‖y − Bs‖ are skipped: they would divide by nearly nothing."""


class SR1(QuasiNewton):
    """The symmetric rank-one update of the Hessian, for up to 2,048 parameters.

    Unlike BFGS's the matrix need not be positive definite: it follows negative curvature, and on a quadratic it is exact
    after as many independent steps as there are parameters. Steps minimize the model within a ball (exactly, by the
    matrix's eigenvalues), whose radius follows how well the model predicted. Matrix and mathematics are fp64, whole on
    every rank.

    lr is the first radius of the ball, in the norm of all weights.

    Start: lr 1 (Nocedal and Wright, 2006, algorithm 6.2; the radius adapts).

    Args:
        params: of one group.
        lr: see above.
        max_iter: trial steps per `step`, one evaluation each.
        tolerance_grad: stop when no coordinate of the gradient is larger.
        tolerance_change: stop when the ball is smaller.
        process_group: the ranks whose losses are averaged; replicas (DDP) must give it.

    Raises:
        TypeError: an option of the rules that has no meaning here.
        ValueError: several groups; a number out of range; more parameters than that, at bind.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1,
        max_iter: int = 20,
        tolerance_grad: float = 1e-7,
        tolerance_change: float = 1e-9,
        *,
        process_group: dist.ProcessGroup | None = None,
        **options: Any,
    ) -> None:
        defaults = {
            "lr": lr, "max_iter": max_iter, "tolerance_grad": tolerance_grad, "tolerance_change": tolerance_change,
        }  # fmt: skip
        super().__init__(params, defaults, process_group, options)
        self._numbers = {"func_evals": 0, "radius": lr}

    def _slabs(self, vectors: Vectors) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        require_small(vectors, "SR1")
        self._hessian = torch.eye(vectors.numel, dtype=torch.float64)
        return {}, {"hessian": self._hessian}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Up to `max_iter` trial steps.

        Returns:
            What the closure returned at first.

        Raises:
            ValueError: no closure; no gradient; a loss that is not finite, before anything is changed.
        """
        closure = self._closure(closure)
        vectors, numbers, group = self._bind(), self._numbers, self.param_groups[0]
        nowhere = vectors.zeros()
        here, returned, _ = self._evaluate(closure, nowhere)
        require_finite(here)
        numbers["func_evals"] += 1
        x, grad = vectors.full(vectors.weights()), vectors.full(here.grad)
        for _ in range(group["max_iter"]):
            if grad.abs().max() <= group["tolerance_grad"] or numbers["radius"] <= group["tolerance_change"]:
                break
            step = minimum_in_ball(self._hessian, grad, numbers["radius"])
            curved = self._hessian @ step
            predicted = -float(grad.dot(step) + 0.5 * step.dot(curved))
            vectors.assign(vectors.local(x + step))
            there = self._evaluate(closure, nowhere)[0]
            numbers["func_evals"] += 1
            change = vectors.full(there.grad) - grad
            ratio = (here.loss - there.loss) / predicted
            if ratio > ACCEPTED:
                x, grad, here = x + step, grad + change, there
            length = float(step.norm())
            if ratio > 0.75 and length > 0.8 * numbers["radius"]:
                numbers["radius"] *= 2
            elif not ratio >= 0.1:  # also where the loss is not a number
                numbers["radius"] /= 2
            left = change - curved
            if abs(left.dot(step)) > SKIPPED * length * left.norm():
                self._hessian.add_(torch.outer(left, left), alpha=float(1 / left.dot(step)))
        vectors.assign(vectors.local(x))
        return returned


def minimum_in_ball(hessian: Tensor, grad: Tensor, radius: float) -> Tensor:
    """The step within `radius` that minimizes g·s + ½ sᵀBs (Nocedal and Wright, theorem 4.1 and section 4.3): s =
    −(B + λI)⁻¹g for the least λ ≥ 0 that makes this positive definite and s short enough."""
    values, vectors = torch.linalg.eigh(hessian)
    along = vectors.T @ grad
    low = max(0.0, -float(values[0]))

    def step(shift: float) -> Tensor:
        return -along / (values + shift)

    if values[0] > 0 and step(0.0).norm() <= radius:
        return vectors @ step(0.0)
    high = low + float(grad.norm()) / radius
    while not step(high).norm() <= radius:
        high = 2 * high - low + torch.finfo(torch.float64).tiny
    for _ in range(200):
        middle = 0.5 * (low + high)
        if step(middle).norm() <= radius:
            high = middle
        else:
            low = middle
    found = step(high)
    short = radius**2 - float(found.square().sum())
    if values[0] < 0 and short > 1e-6 * radius**2:  # the hard case: nothing of the gradient lies along this direction
        found[0] += short**0.5
    return vectors @ found
