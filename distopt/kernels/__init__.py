"""Fused steps: the table (rule, storage) → kernel. What is not in the table runs the rule's own text.

A kernel steps lists of flat fp32 tensors in place: weights, gradients, states by name. torch's own fused CPU kernels
compute the last few elements of a tensor with other instructions than the rest, and so round them differently; callers
hand over lengths that are multiples of `LANES` where bits must not depend on where a tensor was cut.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from distopt.rule import Rule
from distopt.rules.adamw import AdamW
from distopt.rules.sgd import SGD

LANES = 16

Kernel = Callable[[Any, int, list[Tensor], list[Tensor], dict[str, list[Tensor]], Tensor | None], None]
"""Of a rule, a step, weights, gradients and states; with a flag (0-D, fp32) on the device, which leaves all of them alone where
it is 1."""


def fused_kernel(rule: Rule) -> Kernel | None:
    """The kernel for a rule with fp32 weights, gradients and states; None where the rule's own text is to run."""
    return KERNELS.get(type(rule))


def stretch_kernels(device: torch.device) -> Mapping[Any, Callable[..., Any]]:
    """Kernels for elementwise stretches of rules on this device, by the function of the rule's file."""
    if device.type != "cuda":
        return {}
    from distopt.kernels import triton_stretches  # importing Triton takes a second

    return triton_stretches.KERNELS


def state_kernels(device: torch.device) -> Any:
    """The module that reads and writes states on this device (`triton_states`), or None, as on a CPU, where the text does."""
    if device.type != "cuda":
        return None
    from distopt.kernels import triton_states  # see above

    return triton_states


def _adamw(
    rule: AdamW,
    step: int,
    weights: list[Tensor],
    grads: list[Tensor],
    states: dict[str, list[Tensor]],
    found_inf: Tensor | None,
) -> None:
    count = torch.full((), float(step), device=weights[0].device)
    torch._fused_adamw_(
        weights,
        grads,
        states["exp_avg"],
        states["exp_avg_sq"],
        states.get("max_exp_avg_sq", []),
        [count] * len(weights),
        lr=rule.lr,
        beta1=rule.betas[0],
        beta2=rule.betas[1],
        weight_decay=rule.weight_decay,
        eps=rule.eps,
        amsgrad=rule.amsgrad,
        maximize=False,
        found_inf=found_inf,
    )


def _sgd(
    rule: SGD,
    step: int,
    weights: list[Tensor],
    grads: list[Tensor],
    states: dict[str, list[Tensor]],
    found_inf: Tensor | None,
) -> None:
    torch._fused_sgd_(
        weights,
        grads,
        states.get("momentum_buffer", []),
        weight_decay=rule.weight_decay,
        momentum=rule.momentum,
        lr=rule.lr,
        dampening=rule.dampening,
        nesterov=rule.nesterov,
        maximize=False,
        is_first_step=step == 1,
        found_inf=found_inf,
    )


KERNELS: dict[type[Rule], Kernel] = {AdamW: _adamw, SGD: _sgd}
