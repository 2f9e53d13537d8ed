"""A^(-1/p) of symmetric positive semi-definite matrices, for Shampoo and its kin.

Conventions are those of Meta's Distributed Shampoo (Shi et al. 2023, arXiv 2309.06497): `eps` is absolute and added to
the diagonal before the decomposition, and a spectrum whose smallest eigenvalue still falls below `eps` is shifted up
until it does not. Matrices go one by one (see eigenbasis.py for why) and are computed in float32, or in float64 for
float64 input.

* `eigh`: eigendecomposition, retried in float64 where the solver fails.
* `newton`: coupled inverse Newton (Guo and Higham 2006; Anil et al. 2020, arXiv 2002.09018), matrix products only.
* `qr`: one step of orthogonal iteration from the last basis, the root taken on its Rayleigh quotients.
"""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from distopt.matrix.eigenbasis import eigh, refresh

RootMethod = Literal["eigh", "newton", "qr"]

# Coupled Newton multiplies the smallest eigenvalue of M by (1 + 1/p)^p a step: 16 steps for p = 4 at the largest
# condition number that the ridge below allows, then a few that converge quadratically.
_NEWTON_STEPS = 60
_NEWTON_STEPS_TRACED = 20
_NEWTON_TOLERANCE = 1e-6
_NEWTON_ACCEPTED = 1e-2
# Eigenvalues below this share of ‖A‖_F are rounding noise in float32, of either sign, and a negative one diverges.
_NEWTON_RIDGE = 1e-6


class InverseRoot(NamedTuple):
    """Roots of a stack.

    Attributes:
        root: (k, n, n), symmetric up to rounding, in float32 (float64 for float64 input).
        basis: (k, n, n), eigenvectors by descending eigenvalue for "eigh" and "qr", to be handed to the next "qr";
            None for "newton".
        ok: (k,), bool: False where no root was found and `root` and `basis` are the previous ones.
    """

    root: Tensor
    basis: Tensor | None
    ok: Tensor


@torch.no_grad()
def inverse_root(
    a: Tensor,
    p: int,
    *,
    method: RootMethod = "eigh",
    eps: float = 1e-12,
    previous: Tensor | None = None,
    basis: Tensor | None = None,
) -> InverseRoot:
    """(A + eps I)^(-1/p) of each matrix, kept finite for singular, zero and badly scaled ones.

    Args:
        a: (k, n, n), symmetric positive semi-definite up to rounding, floating point; not modified. k may be 0.
        p: the root, at least 1; Shampoo of a matrix takes 4 for each side.
        method: see the module's docstring. "newton" raises `eps` to 1e-6 ‖A‖_F where it is smaller.
        eps: added to the diagonal, in the units of `a`; above 0.
        previous: (k, n, n), roots to keep where `a` has a NaN or Inf or no method converges; None keeps the identity.
        basis: (k, n, n), eigenvectors that are nearly right, for "qr"; None takes "eigh" in its place.

    Raises:
        ValueError: for an unknown method, p below 1 or eps not above 0.
    """
    if method not in get_args(RootMethod):
        raise ValueError(f"method={method!r} is unknown; choose one of {', '.join(get_args(RootMethod))}")
    if p < 1:
        raise ValueError(f"p={p} must be at least 1")
    if not eps > 0:
        raise ValueError(f"eps={eps} must be above 0: the root of a singular matrix has no bound without it")
    dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
    identity = torch.eye(a.shape[-1], dtype=dtype, device=a.device)
    finite = a.isfinite().flatten(1).all(1)
    safe = torch.where(finite[:, None, None], a.to(dtype), identity)

    root = identity.expand_as(safe).clone() if previous is None else previous.to(dtype, copy=True)
    vectors = identity.expand_as(safe).clone() if basis is None else basis.to(dtype, copy=True)
    ok = finite.clone()
    for i, matrix in enumerate(safe.unbind()):
        found: tuple[Tensor, Tensor | None] | None
        if method == "newton":
            found = _newton(matrix, p, eps)
        elif method == "qr" and basis is not None:
            found = _by_basis(matrix, p, eps, vectors[i])
        else:
            found = _by_eigh(matrix, p, eps)
        if found is None:
            ok[i] = False
            continue
        new_root, new_vectors = found
        ok[i] &= new_root.isfinite().all()
        root[i] = torch.where(ok[i], new_root, root[i])
        if new_vectors is not None:
            vectors[i] = torch.where(ok[i], new_vectors, vectors[i])
    return InverseRoot(root, None if method == "newton" else vectors, ok)


def _by_eigh(a: Tensor, p: int, eps: float) -> tuple[Tensor, Tensor] | None:
    ridged = a.clone()
    ridged.diagonal().add_(eps)
    pair = eigh(ridged)
    if pair is None:
        return None
    values, vectors = (x.flip(-1) for x in pair)
    return _from_spectrum(values, vectors, p, eps), vectors


def _by_basis(a: Tensor, p: int, eps: float, basis: Tensor) -> tuple[Tensor, Tensor]:
    ridged = a.clone()
    ridged.diagonal().add_(eps)
    vectors = refresh(ridged.unsqueeze(0), basis.unsqueeze(0)).q[0]
    values = (vectors * (ridged @ vectors)).sum(0)
    return _from_spectrum(values, vectors, p, eps), vectors


def _from_spectrum(values: Tensor, vectors: Tensor, p: int, eps: float) -> Tensor:
    lowest = values.amin()
    # `eps` is absorbed by large eigenvalues, and rounding leaves the smallest ones anywhere around 0.
    values = torch.where(lowest < eps, values - lowest + eps, values)
    return (vectors * values.pow(-1 / p)) @ vectors.mT


def _newton(a: Tensor, p: int, eps: float) -> tuple[Tensor, None] | None:
    """Coupled inverse Newton, in the dtype of `a` and once more in float64 if that does not converge.

    X → A^(-1/p) and M → I, with M = Xᵖ A throughout:  T = ((p + 1) I - M) / p,  X ← X T,  M ← Tᵖ M.
    """
    for dtype in (a.dtype, torch.float64):
        identity = torch.eye(a.shape[-1], dtype=dtype, device=a.device)
        unit = a.abs().amax().to(dtype).clamp(min=eps)  # no square over- or underflows in this unit
        ridged = a.to(dtype) / unit
        ridged.diagonal().add_((torch.linalg.matrix_norm(ridged) * _NEWTON_RIDGE).maximum(eps / unit))
        z = (p + 1) / (2 * torch.linalg.matrix_norm(ridged))
        x, m = identity * z.pow(1 / p), ridged * z
        best, least = x, float("inf")
        for _ in range(_NEWTON_STEPS_TRACED if a.is_meta else _NEWTON_STEPS):
            t = ((p + 1) * identity - m) / p
            x, m = x @ t, torch.linalg.matrix_power(t, p) @ m
            if a.is_meta:  # only shapes and costs are asked for
                continue
            error = float(torch.dist(m, identity, p=torch.inf))
            if error < least:
                best, least = x, error
            elif least < _NEWTON_ACCEPTED or error != error:  # down to rounding, or diverged
                break
            if error <= _NEWTON_TOLERANCE:
                break
        if a.is_meta or least < _NEWTON_ACCEPTED:
            return (best * unit.pow(-1 / p)).to(a.dtype), None
    return None
