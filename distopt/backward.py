"""Stepping in the backward pass: each parameter is stepped when its gradient is complete, and the gradient is freed.

    stepper = distopt.step_in_backward(model, optimizer)        # after sharding, before learning-rate schedulers
    model(batch).loss.backward()                                # steps every parameter that gets a gradient
    optimizer.step()                                            # what is left, if anything

With a global norm to clip to, or a check for non-finite gradients, nothing may change before the last gradient is known. That
takes a second backward pass (`two_pass=True`), whose random numbers are those of the first:

    for _ in stepper.passes():                                  # first the norm, then the steps
        model(batch).loss.backward()
    optimizer.step()

Gradients are not held for that in place of the second pass: rounded to fewer bits they would be others, and whole ones are what
release is to save.

Gradient accumulation: `with stepper.accumulate(): …` around all micro-batches but the last one of a pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distopt.optimizer import Optimizer
from distopt.rule import require
from distopt.verdict import added, on_device, square_sum


class BackwardStepper:
    """What `step_in_backward` returns.

    Attributes:
        last_grad_norm: the global norm that the first of two passes found; None before.
        skipped_steps: how often `passes` left out the second pass, since a gradient was not finite.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, two_pass: bool) -> None:
        self.optimizer, self.two_pass = optimizer, two_pass
        self.last_grad_norm: float | None = None
        self.skipped_steps = 0
        self._accumulating = self._measuring = False
        self._squares: list[float | Tensor] = []
        self._scale: float | None = None if two_pass else 1.0
        trained = {param for group in optimizer.param_groups for param in group["params"]}
        lost = trained - set(model.parameters())
        require(not lost, f"{len(lost)} parameters of the optimizer are not the model's; shard the model before this")
        self._hooks = [param.register_post_accumulate_grad_hook(self._arrived) for param in trained]
        optimizer.stepper = self

    def remove(self) -> None:
        """Gradients stay from here on, and optimizer.step() does everything."""
        for hook in self._hooks:
            hook.remove()
        self.optimizer.stepper = None

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Within, gradients add up and nothing is stepped."""
        self._accumulating = True
        try:
            yield
        finally:
            self._accumulating = False

    def passes(self) -> Iterator[int]:
        """0, in which gradients are measured and freed, then 1, in which parameters are stepped. Random numbers are put
        back in between, so that both see the same gradients.

        Raises:
            ValueError: a gradient is not finite and `nonfinite="raise"`; nothing was changed. With "skip" there is no
                second pass.
        """
        require(
            self.two_pass, "passes() are of step_in_backward(…, two_pass=True); without it, run the backward pass once"
        )
        devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
        cpu, cuda = torch.get_rng_state(), [torch.cuda.get_rng_state(device) for device in devices]
        self._measuring, self._squares = True, []
        try:
            yield 0
        finally:
            self._measuring = False
        norm = self.optimizer.global_norm(added(self._squares))
        self.last_grad_norm = norm
        if not math.isfinite(norm) and self.optimizer.engine["nonfinite"] == "raise":
            raise ValueError("a gradient is not finite; nothing was changed. Pass nonfinite='skip' to skip such steps")
        if not math.isfinite(norm):
            self.skipped_steps += 1
            return
        limit = self.optimizer.engine["max_grad_norm"]
        self._scale = 1.0 if limit is None else min(1.0, limit / (norm + 1e-6))
        torch.set_rng_state(cpu)
        for device, state in zip(devices, cuda):
            torch.cuda.set_rng_state(state, device)
        try:
            yield 1
        finally:
            self._scale = None

    @torch.no_grad()
    def _arrived(self, param: Tensor) -> None:
        if self._accumulating:
            return
        if self._measuring:
            grad = param.grad
            assert grad is not None
            local = grad.to_local() if isinstance(grad, DTensor) else grad
            square = square_sum(local.reshape(-1)) if local.is_cpu else on_device([local])[0]
            self._squares.append(square * self.optimizer.share_of(param))
        else:
            require(self._scale is not None, "two_pass=True: run backward within `for _ in stepper.passes():`")
            self.optimizer.step_parameter(param, self._scale or 0.0)
        param.grad = None


def step_in_backward(model: nn.Module, optimizer: Optimizer, *, two_pass: bool = False) -> BackwardStepper:
    """Step parameters as their gradients arrive; see the module.

    The result is that of `optimizer.step()`, bit for bit, but for a global norm, which is summed in another order, and for
    stochastic rounding (`bf16_sr`), whose random bits count the elements of a group. Every parameter becomes a group of its
    own (with the same options): state dicts fit optimizers that step in backward too, and refreshes that take turns do so
    within each parameter (`synchronous=True` is the same either way). Any rule and codec in one process; on several ranks
    (FSDP2, tensor parallel) elementwise rules with uncoded states, since there nothing may depend on the order in which
    gradients arrive on different ranks.

    Args:
        model: already sharded.
        optimizer: over its parameters; without learning-rate scheduler yet.
        two_pass: measure all gradients in one backward pass, step in a second one.

    Raises:
        ValueError: what cannot be exact: a global norm or a check for non-finite gradients without `two_pass`, a rule
            that sums over all parameters, DDP (whose hooks see gradients before they are reduced), states partitioned over
            replicas, or a rule that needs other ranks in the middle of its mathematics.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"{type(optimizer).__name__} cannot step in backward: it needs a closure, or is not of this package; use one that "
            "distopt.create_optimizer makes of a rule"
        )
    engine = optimizer.engine
    require(
        two_pass or (engine["max_grad_norm"] is None and engine["nonfinite"] is None),
        "clipping by the global norm and looking for non-finite gradients need all gradients before the first change: pass "
        "two_pass=True, or max_grad_norm=None and nonfinite=None",
    )
    require(
        engine["process_group"] is None, "states partitioned over replicas (process_group=…) cannot step in backward"
    )
    ddp = isinstance(model, nn.parallel.DistributedDataParallel)
    require(not ddp, "under DDP gradients arrive before they are reduced; use FSDP2 (fully_shard), or step() as usual")
    require(
        not any("initial_lr" in group for group in optimizer.param_groups),
        "build learning-rate schedulers after step_in_backward, which makes every parameter a group of its own",
    )
    optimizer.split_groups()
    return BackwardStepper(model, optimizer, two_pass)
