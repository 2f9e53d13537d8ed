"""LOMO: SGD without momentum, exactly, and pytorch_optimizer's."""

import pytorch_optimizer
import torch
from torch import Tensor, nn

from tests.cases import Case, Oracle, public
from tests.references import sgd


def backward(cls: type, weight: Tensor, grads: list[Tensor], **options: object) -> Tensor:
    """Its optimizers step in the backward pass of a model."""
    model = nn.ParameterList([nn.Parameter(weight.clone())])
    optimizer = cls(model, **options)
    for grad in grads:
        optimizer.fused_backward((model[0] * grad).sum(), lr=options["lr"])
    return model[0].detach()


CASE = Case(
    optimizer="LOMO",
    ndims=frozenset({0, 1, 2, 3}),
    variants={"default": {}, "large": {"lr": 0.1}},
    oracles=(
        Oracle(name="reference", run=sgd, rel=1e-6, why="float32 rounding of the weights"),
        Oracle(name="torch", run=public(torch.optim.SGD), dtype=torch.float32, rel=0, why="the same operation"),
        Oracle(
            name="pytorch_optimizer",
            run=lambda weight, grads, **options: backward(
                pytorch_optimizer.LOMO, weight, grads, **{"lr": 1e-3, **options}
            ),
            dtype=torch.float32,
            rel=1e-6,
            why="float32 rounding of the weights",
        ),
    ),
    sharded=0,
    sharded_stacks=0,
    sharded_why="elementwise",
)
