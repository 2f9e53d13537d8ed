"""Projections of matrices into few dims: principal subspaces (Zhao et al. 2024, arXiv 2403.03507) and random ones.

A projection acts on the shorter side of a matrix: x is (k, short, long), a basis (k, short, rank), and basisᵀ x is
(k, rank, long). Callers transpose tall matrices.
"""

import torch
from torch import Tensor


@torch.no_grad()
def principal_basis(x: Tensor, rank: int, previous: Tensor) -> Tensor:
    """The left singular vectors of the largest singular values, matrix by matrix.

    Which of ±u a solver answers with differs between solvers and precisions. Here the entry of u that is largest in
    absolute value is positive, so that what is kept in a basis means the same wherever the next one is computed.

    Args:
        x: (k, short, long); k may be 0. Rank-deficient and zero matrices are fine.
        rank: at most `short`.
        previous: (k, short, rank), the answer where x has a NaN or Inf or where no solver converges.

    Returns:
        (k, short, rank), orthonormal columns, in the dtype of x.
    """
    ok = x.isfinite().flatten(1).all(1)[:, None, None]
    vectors = _left_vectors(torch.where(ok, x, torch.zeros_like(x)))
    if vectors is None:
        return previous
    vectors = vectors[..., :rank]
    largest = vectors.abs().argmax(-2, keepdim=True)
    return torch.where(ok, vectors * vectors.gather(-2, largest).sign(), previous)


def _left_vectors(x: Tensor) -> Tensor | None:
    for dtype in (x.dtype, torch.float64):
        try:
            return torch.linalg.svd(x.to(dtype), full_matrices=False)[0].to(x.dtype)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # LAPACK says LinAlgError; cuSOLVER, on ill-conditioned matrices, only a status
            continue
    return None


def gaussian(rows: int, cols: int, seed: int, device: torch.device) -> Tensor:
    """Standard normal numbers (rows, cols), fp32, that depend on the shape, the seed and the kind of device alone."""
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)
    return torch.randn(rows, cols, generator=generator, device=device)
