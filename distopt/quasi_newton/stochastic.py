"""L-BFGS on mini-batches: online L-BFGS (Schraudolph, Yu and Günter, 2007) with a closure, mL-BFGS (Niu et al., 2023, arXiv
2307.13744) without one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from distopt.quasi_newton.driver import QuasiNewton, require_finite
from distopt.quasi_newton.memory import History
from distopt.quasi_newton.vectors import Vectors
from distopt.rule import require

LEAST_CURVATURE = 1e-8
"""Least s·y / s·s of a pair that is learned from."""


class _Stochastic(QuasiNewton):
    """What both keep: a history, and nothing of a line search."""

    searches: ClassVar[bool] = False

    def _slabs(self, vectors: Vectors) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        self._memory = History(vectors, self.param_groups[0]["history_size"])
        slabs: tuple[dict[str, Tensor], dict[str, Tensor]] = self._memory.slabs()
        return slabs


class StochasticLBFGS(_Stochastic):
    """Online L-BFGS (Schraudolph, Yu and Günter, 2007, "A Stochastic Quasi-Newton Method for Online Convex Optimization",
    algorithm 2): both gradients of a pair come from the same mini-batch.

    `step(closure)` calls the closure twice: at the weights and after the step; it must use the same mini-batch both times,
    and the next one in the next step. The inverse Hessian starts from the mean of s·y / y·y over the pairs kept. Deviations
    from the paper: pairs with s·y < 1e-8 s·s are left out (it assumes convexity), and the first step has length
    min(1, 1 / ‖g‖₁) in place of a constant.

    lr scales the quasi-Newton step, where 1 is the step to the minimum of the model: 0.01 … 0.5, decaying.

    Start: lr 0.1, history_size 10 (the defaults here; untuned).

    Args:
        params: of one group.
        lr: see above.
        history_size: pairs kept.
        damping: λ, added to the curvature: y = ∇f(w + s) − ∇f(w) + λ s.
        process_group: the ranks whose losses are averaged; replicas (DDP) must give it.

    Raises:
        TypeError: an option of the rules that has no meaning here.
        ValueError: several groups; a number out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.1,
        history_size: int = 10,
        damping: float = 0.0,
        *,
        process_group: dist.ProcessGroup | None = None,
        **options: Any,
    ) -> None:
        require(damping >= 0, f"damping must be ≥ 0, got {damping}")
        defaults = {"lr": lr, "history_size": history_size, "damping": damping}
        super().__init__(params, defaults, process_group, options)
        self._numbers = {"steps_taken": 0, "learned": 0.0}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step, two evaluations.

        Returns:
            What the closure returned at first.

        Raises:
            ValueError: no closure; no gradient; a loss that is not finite, before anything is changed.
        """
        closure = self._closure(closure)
        vectors, group, numbers = self._bind(), self.param_groups[0], self._numbers
        here, returned, magnitude = self._evaluate(closure, vectors.zeros())
        require_finite(here)
        direction = self._memory.direction(here.grad, bool(numbers["learned"]), average_scale=True)
        length = group["lr"] * (1.0 if self._memory.order else min(1.0, 1.0 / max(magnitude, 1e-30)))
        step = length * direction
        start = vectors.weights()
        vectors.assign(start + step)
        there = self._evaluate(closure, step)[0]
        change = (there.grad - here.grad).add_(step, alpha=group["damping"])
        products = vectors.reduce([vectors.products(step[None], torch.stack([step, change]))])[0][0][0].tolist()
        numbers["learned"] = float(products[1] > LEAST_CURVATURE * products[0])
        if numbers["learned"]:
            self._memory.learn(step, change)
        numbers["steps_taken"] += 1
        return returned


class MLBFGS(_Stochastic):
    """mL-BFGS (Niu et al., 2023, arXiv 2307.13744): pairs of slowly moving averages of weights and gradients, one pair
    every `update_frequency` steps, damped to stay within bounds of curvature.

    Takes the gradients there are, as other optimizers do. Averages: M ← β M + (1 − β) · (weights, gradient). A pair is
    their change over `update_frequency` steps; with μ = s·y / s·s its y becomes τ y + (1 − τ) s, where τ = τ₀ within the
    bounds (σ_low, σ_high), and less outside of them, so that μ comes to lie at the bound. Until the first pair the step is
    the gradient's. Deviation: one Hessian for all parameters in place of the paper's blocks of layers, which are there to
    spread the work: here every rank works on its part of each vector.

    lr multiplies the quasi-Newton direction, and the raw gradient before the first pair: an SGD learning rate (0.1).

    Start: SGD's lr, beta 0.9, a pair every 100 steps (the defaults of the authors' SlimQN class).

    Args:
        params: of one group.
        lr: see above.
        beta: of both averages.
        history_size: pairs kept.
        update_frequency: steps between pairs.
        damping: τ₀, in (0, 1].
        bounds: (σ_low, σ_high) of the curvature, σ_low < 1 < σ_high.
        process_group: as of the other quasi-Newton methods; has no meaning where no closure is given.

    Raises:
        TypeError: an option of the rules that has no meaning here.
        ValueError: several groups; a number out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.1,
        beta: float = 0.9,
        history_size: int = 10,
        update_frequency: int = 100,
        damping: float = 0.9,
        bounds: tuple[float, float] = (0.01, 1.5),
        *,
        process_group: dist.ProcessGroup | None = None,
        **options: Any,
    ) -> None:
        require(0 <= beta < 1, f"beta must lie in [0, 1), got {beta}")
        require(0 < damping <= 1, f"damping must lie in (0, 1], got {damping}")
        require(0 < bounds[0] < 1 < bounds[1], f"bounds must be (low, high) with 0 < low < 1 < high, got {bounds}")
        defaults = {
            "lr": lr, "beta": beta, "history_size": history_size, "update_frequency": update_frequency,
            "damping": damping, "bounds": bounds,
        }  # fmt: skip
        super().__init__(params, defaults, process_group, options)
        self._numbers = {"steps_taken": 0}

    def _slabs(self, vectors: Vectors) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        slabs, others = super()._slabs(vectors)
        names = ("mean_weight", "mean_gradient", "last_weight", "last_gradient")
        self._means = {name: vectors.zeros() for name in names}
        return {**slabs, **self._means}, others

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step with the gradients of this rank's parameters; the closure, if there is one, computes them.

        Returns:
            What the closure returned.

        Raises:
            ValueError: a gradient that is not finite, before anything is changed; no gradient.
        """
        vectors, group, numbers = self._bind(), self.param_groups[0], self._numbers
        returned = None
        if closure is not None:
            with torch.enable_grad():
                returned = closure()
        grad = self._current_gradient(vectors)
        numbers["steps_taken"] += 1
        means, count = self._means, numbers["steps_taken"]
        keep = group["beta"] if count > 1 else 0.0
        means["mean_weight"].lerp_(vectors.weights(), 1 - keep)
        means["mean_gradient"].lerp_(grad, 1 - keep)
        learned = False
        if count == 1 or count % group["update_frequency"] == 0:
            if count > 1:
                learned = self._learn(vectors, group["damping"], group["bounds"])
            means["last_weight"].copy_(means["mean_weight"])
            means["last_gradient"].copy_(means["mean_gradient"])
        direction = self._memory.direction(grad, learned)
        vectors.assign(vectors.weights().add_(direction, alpha=group["lr"]))
        return returned

    def _learn(self, vectors: Vectors, most: float, bounds: tuple[float, float]) -> bool:
        """Take in the damped change of the averages; False where nothing moved."""
        step = self._means["mean_weight"] - self._means["last_weight"]
        change = self._means["mean_gradient"] - self._means["last_gradient"]
        products = vectors.reduce([vectors.products(step[None], torch.stack([step, change]))])[0][0][0]
        square, along = products.tolist()
        if square == 0:
            return False
        curvature, (low, high) = along / square, bounds
        share = most
        if curvature <= low:
            share = min((1 - low) / (1 - curvature), most)
        elif curvature >= high:
            share = min((high - 1) / (curvature - 1), most)
        self._memory.learn(step, change.mul_(share).add_(step, alpha=1 - share))
        return True

    def _current_gradient(self, vectors: Vectors) -> Tensor:
        grad, present = vectors.gradient()
        there = torch.tensor([float(present)], dtype=torch.float64, device=vectors.device)
        (found,), (largest,), _ = vectors.reduce([there], [grad])
        require(found.item() > 0, "no parameter has a gradient; call backward() before step()")
        require(largest < float("inf"), "a gradient is not finite; nothing was changed")
        return grad
