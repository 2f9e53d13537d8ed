"""L-BFGS (Liu and Nocedal, 1989) and BFGS, driven by closures, with a line search for the strong Wolfe conditions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distopt.quasi_newton.driver import QuasiNewton, require_finite, require_small
from distopt.quasi_newton.line_search import Trial, strong_wolfe
from distopt.quasi_newton.memory import History, Matrix
from distopt.quasi_newton.vectors import Vectors
from distopt.rule import require

LEAST_CURVATURE = 1e-10
"""Pairs with a smaller s·y say nothing of a convex neighbourhood, and are not learned from (torch.optim.LBFGS)."""


class LBFGS(QuasiNewton):
    """L-BFGS with torch.optim.LBFGS's constructor, stopping conditions and iterates, on any layout.

    `step(closure)` makes up to `max_iter` iterations. For full batches: the closure must return the same loss for the same
    weights (no dropout), or the line search has nothing to compare. An iteration costs two small all-reduces and one per
    evaluation of the closure, whatever `history_size` is.

    It pays on smooth problems with full batches: heads on frozen features, regressions, fits. On mini-batches a line search
    compares noise, and a rule such as AdamW is the better choice.

    lr is the first length tried along the direction, where 1 is the step to the minimum of the model; without a line
    search it is the length taken. Memory: 2 · history_size + 2 vectors in the parameters' dtype.

    Start: lr 1, history_size 10 to 20, "strong_wolfe" (Nocedal and Wright, 2006, section 7.2, who find 3 to 20 pairs enough).

    Args:
        params: of one group.
        lr: see above; on the first iteration times min(1, 1 / ‖g‖₁).
        max_iter: iterations per step.
        max_eval: evaluations per step; None: 1.25 · max_iter.
        tolerance_grad: stop when no coordinate of the gradient is larger.
        tolerance_change: stop when neither loss nor any weight changes by more.
        history_size: pairs kept.
        line_search_fn: "strong_wolfe", or None for steps of lr.
        process_group: the ranks whose losses are averaged; replicas (DDP) must give it.

    Raises:
        TypeError: an option of the rules that has no meaning here.
        ValueError: several groups; a number out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1,
        max_iter: int = 20,
        max_eval: int | None = None,
        tolerance_grad: float = 1e-7,
        tolerance_change: float = 1e-9,
        history_size: int = 100,
        line_search_fn: str | None = None,
        *,
        process_group: dist.ProcessGroup | None = None,
        **options: Any,
    ) -> None:
        max_eval = max_iter * 5 // 4 if max_eval is None else max_eval
        require(
            line_search_fn in (None, "strong_wolfe"), f"line_search_fn: 'strong_wolfe' or None, got {line_search_fn!r}"
        )
        defaults = {
            "lr": lr, "max_iter": max_iter, "max_eval": max_eval, "tolerance_grad": tolerance_grad,
            "tolerance_change": tolerance_change, "history_size": history_size, "line_search_fn": line_search_fn,
        }  # fmt: skip
        super().__init__(params, defaults, process_group, options)
        self._numbers = {"n_iter": 0, "func_evals": 0, "t": 0.0, "slope": 0.0}

    def _remember(self, vectors: Vectors) -> Any:
        return History(vectors, self.param_groups[0]["history_size"])

    def _slabs(self, vectors: Vectors) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        self._direction, self._gradient = vectors.zeros(), vectors.zeros()
        self._memory = self._remember(vectors)
        slabs, others = self._memory.slabs()
        return {"direction": self._direction, "gradient": self._gradient, **slabs}, others

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Up to `max_iter` iterations.

        Returns:
            What the closure returned at first.

        Raises:
            ValueError: no closure; no gradient; a loss that is not finite, before anything is changed.
        """
        closure = self._closure(closure)
        vectors, numbers, group = self._bind(), self._numbers, self.param_groups[0]
        here, returned, magnitude = self._evaluate(closure, self._direction)
        require_finite(here)
        evals = 1
        numbers["func_evals"] += 1
        if here.largest <= group["tolerance_grad"]:
            return returned
        for iteration in range(1, group["max_iter"] + 1):
            numbers["n_iter"] += 1
            first = numbers["n_iter"] == 1
            if first:
                self._direction.copy_(-here.grad)
            else:
                # s·y = t · (change of the slope along the direction of the last iteration)
                learned = numbers["t"] * (here.slope - numbers["slope"]) > LEAST_CURVATURE
                if learned:
                    self._memory.learn(numbers["t"] * self._direction, here.grad - self._gradient)
                self._direction.copy_(self._memory.direction(here.grad, learned))
            self._gradient.copy_(here.grad)
            (products,), (extent,), _ = vectors.reduce(
                [vectors.products(here.grad[None], self._direction[None])], [self._direction]
            )
            numbers["slope"] = slope = products.item()
            numbers["t"] = t = min(1.0, 1.0 / magnitude) * group["lr"] if first else group["lr"]
            if slope > -group["tolerance_change"]:
                break

            before, made = here, 0
            start = vectors.weights()
            if group["line_search_fn"] is None:
                vectors.assign(start + t * self._direction)
                if iteration < group["max_iter"]:  # the next step begins with it otherwise
                    here, made = self._evaluate(closure, self._direction)[0], 1
            else:

                def evaluate(t: float, start: Tensor = start) -> Trial:
                    vectors.assign(start + t * self._direction)
                    return self._evaluate(closure, self._direction, t)[0]

                begin = Trial(0.0, here.loss, slope, here.grad, here.largest)
                here, made = strong_wolfe(
                    evaluate,
                    begin,
                    t,
                    extent=extent,
                    tolerance=1e-9,
                    max_evals=group["max_eval"] - evals,
                )
                numbers["t"] = here.t
                vectors.assign(start + here.t * self._direction)
            evals += made
            numbers["func_evals"] += made
            if evals >= group["max_eval"] or here.largest <= group["tolerance_grad"]:
                break
            if numbers["t"] * extent <= group["tolerance_change"]:
                break
            if abs(here.loss - before.loss) < group["tolerance_change"]:
                break
        return returned


class BFGS(LBFGS):
    """BFGS: LBFGS's iterations with the inverse Hessian as a dense matrix, for up to 2,048 parameters.

    Every pair since the beginning counts. The matrix is in fp64, whole on every rank, and starts as the identity, scaled
    by the first pair (Nocedal and Wright, eq. 6.20). Arguments as of `LBFGS`, without `history_size`.

    lr is the first length tried along the direction, where 1 is the step to the minimum of the model.

    Start: lr 1, "strong_wolfe" (Nocedal and Wright, 2006, section 6.1).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1,
        max_iter: int = 20,
        max_eval: int | None = None,
        tolerance_grad: float = 1e-7,
        tolerance_change: float = 1e-9,
        line_search_fn: str | None = "strong_wolfe",
        *,
        process_group: dist.ProcessGroup | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            params,
            lr,
            max_iter,
            max_eval,
            tolerance_grad,
            tolerance_change,
            line_search_fn=line_search_fn,
            process_group=process_group,
            **options,
        )
        del self.param_groups[0]["history_size"], self.defaults["history_size"]

    def _remember(self, vectors: Vectors) -> Any:
        require_small(vectors, "BFGS")
        return Matrix(vectors)
