"""Estimates of the Hessian's diagonal, left in `.grad` for `optimizer.observe("hessian")` (Liu et al. 2023, Sophia)."""

from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate

Gradient = Callable[..., object]
"""Adds to `.grad` the gradient of one batch; with sampled=True against labels drawn from the model's predictions."""

EPSILON = 1e-4
"""Of the difference quotient: a few thousandths of the weights, and far above the rounding of fp32 gradients."""


def sampled_gradient(gradient: Gradient, model: nn.Module, seed: int) -> None:
    """Gauss–Newton–Bartlett: the gradient against sampled labels, which the rule squares."""
    gradient(sampled=True)


@torch.no_grad()
def hutchinson_product(gradient: Gradient, model: nn.Module, seed: int) -> None:
    """u ⊙ (∇²L u) with random signs u, by the gradients at W ± EPSILON u: two passes more, on any layout, where a second
    backward pass through the first would need kernels and wrappers that have one. In fp32 only."""
    params = [param for param in model.parameters() if param.requires_grad]
    weights = [param.clone() for param in params]
    signs = [_signs(param, seed + number) for number, param in enumerate(params)]
    found: list[list[torch.Tensor]] = []
    for side in (EPSILON, -EPSILON):
        for param, weight, sign in zip(params, weights, signs):
            param.copy_(weight + side * sign)
        with torch.enable_grad():
            gradient()
        found.append([param.grad if param.grad is not None else torch.zeros_like(param) for param in params])
        for param in params:
            param.grad = None
    for param, weight, sign, up, down in zip(params, weights, signs, *found):
        param.copy_(weight)
        param.grad = sign * (up - down) / (2 * EPSILON)


def _signs(param: torch.Tensor, seed: int) -> torch.Tensor:
    """±1 per weight, drawn for the whole parameter, so that copies agree and shards do not repeat each other."""
    generator = torch.Generator().manual_seed(seed)
    whole = (torch.randint(0, 2, param.shape, generator=generator) * 2 - 1).to(param.device, param.dtype)
    if not isinstance(param, DTensor):
        return whole
    everywhere = [Replicate()] * param.device_mesh.ndim
    return DTensor.from_local(whole, param.device_mesh, everywhere, run_check=False).redistribute(
        placements=param.placements
    )


ESTIMATES = {"sophia_g": sampled_gradient, "sophia_h": hutchinson_product}
"""By the name of the rule that observes it."""
