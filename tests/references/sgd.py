"""SGD with momentum, in the form of Sutskever et al. 2013 that torch.optim.SGD documents."""

from collections.abc import Sequence

from torch import Tensor


def sgd(
    weight: Tensor,
    grads: Sequence[Tensor],
    *,
    lr: float = 1e-3,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
) -> Tensor:
    """b ← μ b + (1 − dampening) g, with b = g on the first step; w ← w − lr b, or w − lr (g + μ b) with Nesterov."""
    buffer = None
    for grad in grads:
        g = (-grad if maximize else grad) + weight_decay * weight
        if momentum:
            buffer = g if buffer is None else momentum * buffer + (1 - dampening) * g
            g = g + momentum * buffer if nesterov else buffer
        weight = weight - lr * g
    return weight
