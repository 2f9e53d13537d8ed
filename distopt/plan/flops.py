"""FLOPs of the operations that cost cubic work, from shapes. Multiply and add are 2.

Matrix products are counted as torch.utils.flop_counter does. Factorizations have the leading terms of Golub and Van Loan,
Matrix Computations (4th ed.) and of LAPACK Working Note 41, for the textbook algorithm; a library may do more or less,
and `distopt calibrate` measures rates with the same formulas, so that seconds come out right all the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten


def eigh_flops(x: Tensor, *args: Any, compute_v: bool = True, **_: Any) -> int:
    """Symmetric eigendecomposition, (…, n, n): 9 n³ with eigenvectors (§8.3.3), 4/3 n³ without. torch asks for them
    whenever a dispatch mode is watching, so that eigvalsh counts as eigh."""
    with_vectors = args[1] if len(args) > 1 else compute_v
    return _matrices(x) * (9 * x.shape[-1] ** 3 if with_vectors else 4 * x.shape[-1] ** 3 // 3)


def qr_flops(x: Tensor, mode: str = "reduced", **_: Any) -> int:
    """Householder QR, (…, m, n), k = min(m, n): 4mnk − 2(m + n)k² + 4/3 k³, and the same with the number of its columns
    for n to form Q (m of them for "complete", k for "reduced", none for "r")."""
    m, n = x.shape[-2:]
    k = min(m, n)
    columns = {"r": [n], "reduced": [n, k], "complete": [n, m]}[mode]
    return _matrices(x) * sum(4 * m * c * k - 2 * (m + c) * k**2 + 4 * k**3 // 3 for c in columns)


def svd_flops(x: Tensor, full_matrices: bool = False, compute_uv: bool = True, **_: Any) -> int:
    """SVD through QR, (…, m, n) with m ≥ n or transposed (§8.6): 6mn² + 20n³, 4m²n + 22n³ with all of U, 2mn² + 2n³ for
    the singular values alone."""
    n, m = sorted(x.shape[-2:])
    if not compute_uv:
        return _matrices(x) * (2 * m * n**2 + 2 * n**3)
    return _matrices(x) * (4 * m**2 * n + 22 * n**3 if full_matrices else 6 * m * n**2 + 20 * n**3)


def cholesky_flops(x: Tensor, *_: Any, **__: Any) -> int:
    """Cholesky factor, (…, n, n): n³/3."""
    return _matrices(x) * x.shape[-1] ** 3 // 3


def lu_flops(x: Tensor, *_: Any, **__: Any) -> int:
    """LU factors with pivoting, (…, m, n), k = min(m, n): 2mnk − (m + n)k² + 2/3 k³, of which 2/3 n³ remain for a square."""
    m, n = x.shape[-2:]
    k = min(m, n)
    return _matrices(x) * (2 * m * n * k - (m + n) * k**2 + 2 * k**3 // 3)


def solve_flops(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    """A X = B by LU, A (…, n, n), B (…, n, k) or (…, n): 2/3 n³ + 2 n² k."""
    return lu_flops(a) + 2 * a.shape[-1] * b.numel()


def inverse_flops(x: Tensor, *_: Any, **__: Any) -> int:
    """Inverse by LU, (…, n, n): 2 n³."""
    return _matrices(x) * 2 * x.shape[-1] ** 3


def triangular_flops(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    """Triangular solve with b.numel() / n right-hand sides: n² each."""
    return a.shape[-1] * b.numel()


def cholesky_solve_flops(b: Tensor, factor: Tensor, *_: Any, **__: Any) -> int:
    """Two triangular solves."""
    return 2 * factor.shape[-1] * b.numel()


def cholesky_inverse_flops(x: Tensor, *_: Any, **__: Any) -> int:
    """Inverse from a Cholesky factor, (…, n, n): 2/3 n³."""
    return _matrices(x) * 2 * x.shape[-1] ** 3 // 3


FACTORIZATIONS: dict[Any, tuple[str, Callable[..., int]]] = {
    aten._linalg_eigh: ("eigh", eigh_flops),
    aten.linalg_qr: ("qr", qr_flops),
    aten._linalg_svd: ("svd", svd_flops),
    aten.linalg_cholesky_ex: ("cholesky", cholesky_flops),
    aten.cholesky: ("cholesky", cholesky_flops),
    aten.cholesky_inverse: ("cholesky", cholesky_inverse_flops),
    aten.cholesky_solve: ("solve", cholesky_solve_flops),
    aten.linalg_lu_factor_ex: ("solve", lu_flops),
    aten.linalg_lu: ("solve", lu_flops),
    aten._linalg_solve_ex: ("solve", solve_flops),
    aten.linalg_inv_ex: ("solve", inverse_flops),
    aten.linalg_solve_triangular: ("solve", triangular_flops),
}


def flops_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> tuple[str, int] | None:
    """(kind of work, FLOPs) of one dispatched operation; None where nothing is counted. The kind of a matrix product is
    its dtype, see `cost.WORK`."""
    packet = func._overloadpacket
    if packet in FACTORIZATIONS:
        kind, formula = FACTORIZATIONS[packet]
        return kind, formula(*args, **kwargs)
    if packet in flop_registry:
        dtype = next(arg.dtype for arg in args if isinstance(arg, Tensor))
        return str(dtype).removeprefix("torch."), flop_registry[packet](*args, **kwargs, out_val=out)
    return None


def _matrices(x: Tensor) -> int:
    return int(x.shape[:-2].numel())
