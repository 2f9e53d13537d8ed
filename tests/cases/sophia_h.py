"""Sophia-H against pytorch_optimizer's and the naive reference."""

from typing import Any

import pytorch_optimizer
import torch
from torch import Tensor, nn

from tests.cases import Case, Oracle
from tests.cases.sophia_g import reference

AUTHORS: dict[str, Any] = {"lr": 1e-4, "betas": (0.96, 0.99), "rho": 0.01, "weight_decay": 0.1, "bs": 1}


def ours(weight: Tensor, grads: list[Tensor], **options: Any) -> Tensor:
    """The reference with this estimate's defaults."""
    return reference(weight, grads, squared=False, **{**AUTHORS, **options})


def package(weight: Tensor, grads: list[Tensor], observed: dict[int, Tensor] | None = None, **options: Any) -> Tensor:
    """It clips m / h at p, which is p times our step; and takes the estimate with the step."""
    chosen = {**AUTHORS, **options}
    rho = chosen["rho"] * chosen["bs"]
    param = nn.Parameter(weight.clone())
    optimizer = pytorch_optimizer.SophiaH(
        [param],
        lr=chosen["lr"] / rho,
        betas=chosen["betas"],
        weight_decay=chosen["weight_decay"] * rho,
        p=rho,
        eps=1e-15,
        update_period=10**9,
    )
    for step, grad in enumerate(grads):
        param.grad = grad.clone()
        # Without an estimate its first step would compute one; zero changes nothing then.
        shown = (observed or {}).get(step, torch.zeros_like(weight) if step == 0 else None)
        optimizer.step(hessian=None if shown is None else [shown])
    return param.detach()


CASE = Case(
    optimizer="SophiaH",
    ndims=frozenset({0, 1, 2, 3}),
    observes="hessian",
    variants={
        "mixed": {"lr": 0.01, "rho": 0.5, "betas": (0.9, 0.8)},
        "default": {"lr": 1e-3},
    },
    oracles=(
        Oracle(name="reference", run=ours, rel=2e-6, why="float32 rounding of the weights"),
        Oracle(name="pytorch_optimizer", run=package, dtype=torch.float32, rel=2e-6, why="order of operations"),
    ),
    sharded=0,
    sharded_stacks=0,
    sharded_why="elementwise",
)
