"""Symmetric matrices in half the space, as one rectangle, so that packing is copies of blocks and needs no index.

Of an (n, n) matrix the lower half of the rows is kept. What lies above the diagonal there is known from below it; the
triangle of the upper half, which is no larger, takes its place.
"""

from __future__ import annotations

from torch import Tensor


def packed_rows(n: int) -> int:
    """Rows of the packed form (rows, n) of an (n, n) matrix: n/2 rounded up, one more where n is even."""
    return n - (n - 1) // 2


def pack(matrix: Tensor) -> Tensor:
    """A symmetric (k, n, n) as (k, packed_rows(n), n); a new tensor."""
    n = matrix.shape[-1]
    first = n - packed_rows(n)
    packed = matrix[..., first:, :].clone()
    corner = packed[..., :first, first + 1 : 2 * first + 1]
    corner.copy_(corner.tril(-1) + matrix[..., :first, :first].triu())
    return packed


def unpack(packed: Tensor) -> Tensor:
    """The symmetric (k, n, n) of which `pack` made this."""
    n = packed.shape[-1]
    first = n - packed_rows(n)
    matrix = packed.new_empty((*packed.shape[:-2], n, n))
    matrix[..., first:, :] = packed
    matrix[..., :first, first:] = packed[..., :, :first].mT
    for block, triangle in (
        (matrix[..., first:, first:], packed[..., :, first:].tril()),
        (matrix[..., :first, :first], packed[..., :first, first + 1 : 2 * first + 1].triu()),
    ):
        block.copy_(triangle + triangle.mT)
        block.diagonal(dim1=-2, dim2=-1).copy_(triangle.diagonal(dim1=-2, dim2=-1))
    return matrix
