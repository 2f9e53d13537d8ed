"""Eigenbases of Gram matrices, as SOAP keeps them (Vyas et al. 2024, arXiv 2409.11321, Algorithm 4).

Everything here goes matrix by matrix: LAPACK's and cuSOLVER's batched routines give other bits than single ones, and a
result must not depend on which other matrices happen to be computed beside it. Bases are computed in float32, or in
float64 for float64 input, whatever the dtype of the Gram matrix.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Basis(NamedTuple):
    """An orthonormal basis per matrix.

    Attributes:
        q: (k, n, n), basis vectors in columns.
        order: (k, n), int64: new column j came from old column `order[j]`; see `reorder`.
        ok: (k,), bool: False where there was nothing to compute from and `q` is the previous basis.
    """

    q: Tensor
    order: Tensor
    ok: Tensor


@torch.no_grad()
def eigenbasis(gram: Tensor, previous: Tensor | None = None) -> Basis:
    """Eigenvectors of symmetric matrices, by descending eigenvalue.

    Args:
        gram: (k, n, n), symmetric positive semi-definite up to rounding; k may be 0. Rank-deficient and zero matrices
            are fine: their basis is orthonormal, though arbitrary within an eigenspace.
        previous: (k, n, n), kept where `gram` has a NaN or Inf or where the solver fails in float32 and in float64.
            None keeps the identity.

    Returns:
        The basis, in the dtype of `gram`; `order` counts from 0 to n - 1.
    """
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    q = identity.expand_as(gram).clone() if previous is None else previous.to(gram.dtype, copy=True)
    ok = gram.isfinite().flatten(1).all(1)
    # A solver may hang, raise or answer with garbage on a NaN: it never sees one.
    safe = torch.where(ok[:, None, None], gram, identity)
    for i, matrix in enumerate(safe.unbind()):
        pair = eigh(matrix)
        if pair is None:
            ok[i] = False
        else:
            q[i] = torch.where(ok[i], pair[1].flip(-1).to(gram.dtype), q[i])
    return Basis(q, _identity_order(gram), ok)


@torch.no_grad()
def refresh(gram: Tensor, q: Tensor) -> Basis:
    """One step of orthogonal iteration from a basis that is nearly right, with the columns sorted first.

    Columns are ordered by their Rayleigh quotients diag(Qᵀ G Q), descending, then Q ← QR(G Q). This is SOAP's cheap
    refresh, in the order of operations of the official implementation (https://github.com/nikhilvyas/SOAP). Nothing
    here waits for the host.

    Args:
        gram: (k, n, n), as for `eigenbasis`.
        q: (k, n, n), orthonormal columns; not modified.

    Returns:
        The new basis in the dtype of `q`. A second moment kept in the old basis belongs to the new one after
        `reorder`. Where `gram` has a NaN or Inf, or overflows against `q`, the old basis is kept, in its old order.
    """
    out, order = torch.empty_like(q), _identity_order(q)
    for i, (matrix, basis) in enumerate(zip(gram.unbind(), q.unbind())):
        product = matrix.to(q.dtype) @ basis
        quotients = (basis * product).sum(0)
        order[i] = quotients.argsort(descending=True, stable=True)
        power = product.index_select(1, order[i])
        out[i] = torch.linalg.qr(power.to(_precision(q.dtype)))[0]
    ok = (gram.isfinite() & out.isfinite()).flatten(1).all(1)
    return Basis(torch.where(ok[:, None, None], out, q), torch.where(ok[:, None], order, _identity_order(q)), ok)


def reorder(x: Tensor, order: Tensor, dim: int) -> Tensor:
    """Moves the rows (dim=-2) or columns (dim=-1) of (k, rows, cols) to where `refresh` has put their basis vectors."""
    return x.take_along_dim(order.unsqueeze(-1 if dim == -2 else -2), dim)


def counted(failures: Tensor, ok: Tensor) -> Tensor:
    """How many times in a row something failed, (k, 1, 1): one more where not `ok` (k,), else none."""
    return torch.where(ok[:, None, None], 0.0, failures + 1)


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor] | None:
    """Eigenvalues, ascending, and eigenvectors of one symmetric (n, n) matrix; None if no precision converges.

    A diagonal of 1e-30, as in the official SOAP, tells rows that never had a gradient from rounding noise.
    """
    matrix = matrix.to(_precision(matrix.dtype), copy=True)
    matrix.diagonal().add_(1e-30)
    for dtype in (matrix.dtype, torch.float64):
        try:
            values, vectors = torch.linalg.eigh(matrix.to(dtype))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # LAPACK says LinAlgError; cuSOLVER, on ill-conditioned matrices, only a status
            continue
        return values.to(matrix.dtype), vectors.to(matrix.dtype)
    return None


def _precision(dtype: torch.dtype) -> torch.dtype:
    """What LAPACK and cuSOLVER can compute in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _identity_order(stack: Tensor) -> Tensor:
    return torch.arange(stack.shape[-1], device=stack.device).expand(stack.shape[0], -1).clone()
