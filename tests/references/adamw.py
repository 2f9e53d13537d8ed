"""AdamW: Loshchilov and Hutter 2019, algorithm 2 (arXiv 1711.05101); AMSGrad as in Reddi et al. 2018."""

from collections.abc import Sequence

import torch
from torch import Tensor


def adamw(
    weight: Tensor,
    grads: Sequence[Tensor],
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    amsgrad: bool = False,
    maximize: bool = False,
    cautious: bool = False,
) -> Tensor:
    """w ← (1 − lr λ) w − lr m̂ / (√v̂ + ε). AMSGrad takes the maximum of v before the bias correction, as torch does.
    Cautious: u ← u · [u g > 0] · numel / (number of those + 1)."""
    beta1, beta2 = betas
    m, v, v_max = (torch.zeros_like(weight) for _ in range(3))
    for t, grad in enumerate(grads, start=1):
        g = -grad if maximize else grad
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        v_max = torch.maximum(v_max, v)
        m_hat = m / (1 - beta1**t)
        v_hat = (v_max if amsgrad else v) / (1 - beta2**t)
        u = m_hat / (v_hat.sqrt() + eps)
        if cautious:
            u = u * (u * g > 0) * u.numel() / (int((u * g > 0).sum()) + 1)
        weight = (1 - lr * weight_decay) * weight - lr * u
    return weight
