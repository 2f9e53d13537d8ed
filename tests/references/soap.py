"""SOAP: Vyas et al. 2024, algorithm 3 (arXiv 2409.11321), in the variant of https://github.com/nikhilvyas/SOAP."""

from collections.abc import Sequence

import torch
from torch import Tensor


def soap(
    weight: Tensor,
    grads: Sequence[Tensor],
    *,
    lr: float = 3e-3,
    betas: tuple[float, float] = (0.95, 0.95),
    shampoo_beta: float = -1,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    precondition_frequency: int = 10,
    max_precond_dim: int = 10000,
    synchronous: bool = True,
) -> Tensor:
    """Adam in the eigenbases of Shampoo's factors L = ⟨g gᵀ⟩ and R = ⟨gᵀ g⟩; on vectors, Adam.

    The variant: the first step only initializes the factors and their bases; weight decay comes after the update;
    the bases are refreshed after the step, by one power iteration and a QR decomposition, with their columns sorted by
    estimated eigenvalue; a side longer than `max_precond_dim` keeps the identity. `shampoo_beta=-1` is β₂.
    A 3-D weight is a stack of experts, each a matrix of its own. `synchronous`: a reference takes no turns.
    """
    if weight.ndim == 3:
        options = {name: value for name, value in locals().items() if name not in ("weight", "grads")}
        experts = [soap(w, [g[i] for g in grads], **options) for i, w in enumerate(weight)]
        return torch.stack(experts) if experts else weight
    beta1, beta2 = betas
    beta = beta2 if shampoo_beta < 0 else shampoo_beta
    vector = weight.ndim < 2
    shape = weight.shape
    weight = weight.reshape(1, -1) if vector else weight
    grads = [g.reshape(weight.shape) for g in grads]
    # Per side: the factor and its basis, or None where the side is not preconditioned.
    factors = [None if vector or size > max_precond_dim else weight.new_zeros(size, size) for size in weight.shape]
    bases = list(factors)
    m, v = torch.zeros_like(weight), torch.zeros_like(weight)

    for step, g in enumerate(grads):
        if step > 0:
            m = beta1 * m + (1 - beta1) * g
            v = beta2 * v + (1 - beta2) * rotate(g, bases).square()
            m_hat = m / (1 - beta1**step)
            direction = rotate(m_hat, bases) / ((v / (1 - beta2**step)).sqrt() + eps / (1 - beta2**step) ** 0.5)
            weight = weight - lr * rotate(direction, [None if q is None else q.T for q in bases])
            weight = (1 - lr * weight_decay) * weight
        products = (g @ g.T, g.T @ g)
        factors = [None if f is None else beta * f + (1 - beta) * p for f, p in zip(factors, products)]
        if step == 0:
            bases = [None if f is None else torch.linalg.eigh(f)[1].flip(1) for f in factors]
        elif step % precondition_frequency == 0:
            for side, (f, q) in enumerate(zip(factors, bases)):
                if f is not None and q is not None:
                    order = (q * (f @ q)).sum(dim=0).argsort(descending=True)
                    v = v.index_select(side, order)
                    bases[side] = torch.linalg.qr((f @ q)[:, order])[0]
    return weight.reshape(shape)


def rotate(x: Tensor, bases: Sequence[Tensor | None]) -> Tensor:
    """Qₗᵀ x Qᵣ, with the identity where a side has no basis."""
    left, right = bases
    x = x if left is None else left.T @ x
    return x if right is None else x @ right
