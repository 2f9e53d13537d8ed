"""What quasi-Newton methods remember of the curvature: the last pairs of (step, change of the gradient), or a matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from distopt.quasi_newton.vectors import Vectors

MAX_DENSE = 2048
"""Parameters that a matrix in fp64 may be kept for: 32 MiB of it, on every rank."""


class History:
    """L-BFGS's memory: the inverse Hessian that the last pairs imply, never formed (Nocedal and Wright, algorithm 7.4).

    The two-loop recursion runs on coefficients: the products of all pairs with each other are kept, so that an iteration
    needs new ones with the newest pair and the gradient only, all in one round, whatever the length of the history (Chen
    et al., 2014, "Large-scale L-BFGS using MapReduce").

    Attributes:
        steps, changes: (size, local elements), one pair a row; `order` has the rows in use, oldest first.
        step_change, change_change: products sᵢ·yⱼ and yᵢ·yⱼ, (size, size) in fp64.
        scale: of the inverse Hessian that the recursion starts from.
    """

    def __init__(self, vectors: Vectors, size: int) -> None:
        self.vectors, self.size = vectors, size
        self.steps, self.changes = vectors.zeros(size), vectors.zeros(size)
        self.step_change, self.change_change = (torch.zeros((size, size), dtype=torch.float64) for _ in range(2))
        self.order: list[int] = []
        self.scale = 1.0

    def slabs(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What a state dict holds: (vectors, others)."""
        others = {"step_change": self.step_change, "change_change": self.change_change}
        return {"steps": self.steps, "changes": self.changes}, others

    def numbers(self) -> dict[str, float]:
        """And these. Rows are filled from 0 up and then in turns, so that the newest one tells the order."""
        return {"count": len(self.order), "newest": self.order[-1] if self.order else 0, "scale": self.scale}

    def restore(self, numbers: dict[str, float]) -> None:
        """Take the numbers back; the slabs are written in place."""
        count, newest, self.scale = int(numbers["count"]), int(numbers["newest"]), numbers["scale"]
        self.order = [(newest + 1 + i) % count for i in range(count)]

    def learn(self, step: Tensor, change: Tensor) -> None:
        """Take a pair in, in place of the oldest one if there are `size`."""
        row = len(self.order) if len(self.order) < self.size else self.order.pop(0)
        self.order.append(row)
        self.steps[row], self.changes[row] = step, change

    def direction(self, grad: Tensor, learned: bool = True, average_scale: bool = False) -> Tensor:
        """Minus the inverse Hessian times the gradient; collective, one round.

        Args:
            grad: local, (local elements,).
            learned: whether a pair was taken in since the last call.
            average_scale: start from the mean of sᵢ·yᵢ / yᵢ·yᵢ over all pairs, not from the newest pair's.
        """
        if not self.order:
            return -grad
        used, newest = len(self.order), self.order[-1]
        steps, changes = self.steps[:used], self.changes[:used]
        right = torch.stack([self.steps[newest], self.changes[newest], grad])
        (with_steps, with_changes), _, _ = self.vectors.reduce(
            [self.vectors.products(steps, right), self.vectors.products(changes, right)]
        )
        sy, yy = self.step_change, self.change_change
        if learned:
            sy[:used, newest], sy[newest, :used] = with_steps[:, 1], with_changes[:, 0]
            yy[:used, newest] = yy[newest, :used] = with_changes[:, 1]
            self.scale = float(sy[newest, newest] / yy[newest, newest])
        scale = float((sy.diagonal()[:used] / yy.diagonal()[:used]).mean()) if average_scale else self.scale

        # q = −g − Σ αⱼ yⱼ from the newest pair to the oldest, then r = scale · q + Σ (αⱼ − βⱼ) sⱼ back again.
        of_changes, of_steps = torch.zeros(used, dtype=torch.float64), torch.zeros(used, dtype=torch.float64)
        for i in reversed(self.order):
            of_changes[i] = (-with_steps[i, 2] - sy[i, :used].dot(of_changes)) / sy[i, i]
        for i in self.order:
            along = scale * (-with_changes[i, 2] - yy[i, :used].dot(of_changes)) + sy[:used, i].dot(of_steps)
            of_steps[i] = of_changes[i] - along / sy[i, i]
        towards = of_steps.to(grad) @ steps
        return towards.sub_(of_changes.to(grad) @ changes + grad, alpha=scale)


class Matrix:
    """BFGS's memory: the inverse Hessian itself, whole on every rank (Nocedal and Wright, eq. 6.17 and 6.20).

    Attributes:
        inverse: (numel, numel) in fp64 on the CPU.
        fresh: nothing was learned yet: the first pair sets the scale.
    """

    def __init__(self, vectors: Vectors) -> None:
        self.vectors = vectors
        self.inverse = torch.eye(vectors.numel, dtype=torch.float64)
        self.fresh = True

    def slabs(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What a state dict holds: (vectors, others)."""
        return {}, {"inverse_hessian": self.inverse}

    def numbers(self) -> dict[str, float]:
        """And this."""
        return {"fresh": float(self.fresh)}

    def restore(self, numbers: dict[str, float]) -> None:
        """Take it back; the matrix is written in place."""
        self.fresh = bool(numbers["fresh"])

    def learn(self, step: Tensor, change: Tensor) -> None:
        """Update with a pair of local vectors; collective."""
        s, y = self.vectors.full(step), self.vectors.full(change)
        if self.fresh:
            self.inverse.mul_(s.dot(y) / y.dot(y))
            self.fresh = False
        rho, smoothed = 1 / s.dot(y), self.inverse @ y
        self.inverse.add_(torch.outer(s, s), alpha=float(rho * (1 + rho * y.dot(smoothed))))
        self.inverse.sub_(torch.outer(smoothed, s) + torch.outer(s, smoothed), alpha=float(rho))

    def direction(self, grad: Tensor, learned: bool = True) -> Tensor:
        """Minus the inverse Hessian times the gradient, local; collective."""
        return self.vectors.local(-(self.inverse @ self.vectors.full(grad)))
