"""Symmetric products on a GPU, one triangle computed and mirrored: α X Y + β A where the result is known to be symmetric,
in Triton: X Xᵀ, and products of symmetric matrices that commute. `newton_schulz._symmetric_product` is the reference."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SIZES = {torch.float32: (64, 32), torch.bfloat16: (128, 64), torch.float16: (128, 64)}
"""Side of the blocks of the result, and their depth."""


@triton.jit
def product_kernel(x, y, add, out, size, depth, alpha, beta,
                   x_batch, x_row, x_col, y_batch, y_row, y_col, add_batch, add_row, out_batch, out_row,
                   ADDS: tl.constexpr, SIDE: tl.constexpr, DEPTH: tl.constexpr, WIDEN: tl.constexpr):  # fmt: skip
    """A block of the lower triangle, and its mirror image. Program t of a matrix has block (i, j), i ≥ j, t = i(i+1)/2 + j."""
    number = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    i = ((tl.sqrt(8.0 * number + 1.0) - 1.0) * 0.5).to(tl.int32)
    i = tl.where(i * (i + 1) // 2 > number, i - 1, i)
    i = tl.where((i + 1) * (i + 2) // 2 <= number, i + 1, i)
    j = number - i * (i + 1) // 2
    rows = (i * SIDE + tl.arange(0, SIDE)).to(tl.int64)
    cols = (j * SIDE + tl.arange(0, SIDE)).to(tl.int64)
    inner = tl.arange(0, DEPTH).to(tl.int64)
    left = x + batch * x_batch + rows[:, None] * x_row + inner[None, :] * x_col
    right = y + batch * y_batch + inner[:, None] * y_row + cols[None, :] * y_col
    total = tl.zeros((SIDE, SIDE), dtype=tl.float32)
    for start in range(0, depth, DEPTH):
        a = tl.load(left, mask=(rows[:, None] < size) & (inner[None, :] + start < depth), other=0.0)
        b = tl.load(right, mask=(cols[None, :] < size) & (inner[:, None] + start < depth), other=0.0)
        if WIDEN:  # the interpreter multiplies bfloat16 as if its bits were integers
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision="ieee")
        left += DEPTH * x_col
        right += DEPTH * y_row
    total *= alpha
    inside = (rows[:, None] < size) & (cols[None, :] < size)
    if ADDS:
        old = tl.load(add + batch * add_batch + rows[:, None] * add_row + cols[None, :], mask=inside, other=0.0)
        total += beta * old.to(tl.float32)
    result = total.to(out.dtype.element_ty)
    out += batch * out_batch
    tl.store(out + rows[:, None] * out_row + cols[None, :], result, mask=inside)
    if i > j:
        mirrored = (rows[None, :] < size) & (cols[:, None] < size)
        tl.store(out + cols[:, None] * out_row + rows[None, :], tl.trans(result), mask=mirrored)


def symmetric_product(
    x: Tensor,
    y: Tensor,
    *,
    add: Tensor | None = None,
    beta: float = 1.0,
    alpha: float = 1.0,
    out: Tensor | None = None,
    widen: bool = False,
) -> Tensor:
    """alpha · x y + beta · add, symmetric: half of its blocks are computed.

    Args:
        x, y: (k, n, m) and (k, m, n), or without k, on a GPU, float32 (multiplied in full precision), bfloat16 or
            float16, any strides.
        add: (…, n, n), symmetric.
        out: where the result goes, contiguous; None: a new tensor.
        widen: multiply in float32.
    """
    left, right = (x, y) if x.ndim == 3 else (x.unsqueeze(0), y.unsqueeze(0))
    k, size, depth = left.shape
    if out is None:
        out = x.new_empty((*x.shape[:-1], size))
    target = out.view((k, size, size))
    base = target if add is None else add.contiguous().view(target.shape)
    side, inner = SIZES[x.dtype]
    blocks = -(-size // side)
    product_kernel[(blocks * (blocks + 1) // 2, k)](
        left, right, base, target, size, depth, float(alpha), float(beta),
        *left.stride(), *right.stride(), base.stride(0), base.stride(1),
        target.stride(0), target.stride(1),
        ADDS=add is not None, SIDE=side, DEPTH=inner, WIDEN=widen, num_warps=8 if side > 64 else 4,
    )  # fmt: skip
    return out
