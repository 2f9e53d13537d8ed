"""Elementwise stretches of rules that are not elementwise, in Triton: one launch per stretch and stack, which reads what the
stretch reads and writes what it returns, once. The functions of the rules' files are the reference, and run what is not served.

One driver for all: a stretch is a function that it is compiled with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from distopt.kernels.triton_codecs import narrow, widen
from distopt.rules import adafactor, muon

SERVED = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _lerp(a, b, share):
    return tl.where(share < 0.5, a + share * (b - a), b - (b - a) * (1.0 - share))


@triton.jit
def _clamp(x, least):
    return tl.maximum(x, least, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def muon_prepare(grad, momentum, c, d, fresh, share):
    momentum = _lerp(momentum, grad, fresh)
    return momentum, momentum, momentum


@triton.jit
def muon_prepare_nesterov(grad, momentum, c, d, fresh, share):
    momentum = _lerp(momentum, grad, fresh)
    return momentum, _lerp(grad, momentum, share), momentum


@triton.jit
def muon_apply(weight, direction, c, d, decay, factor):
    weight = weight * decay + direction * factor
    return weight, weight, weight


@triton.jit
def adafactor_precondition(grad, row, col, total, eps, floor):
    second = tl.div_rn(row * col, _clamp(total, eps))
    update = tl.rsqrt(_clamp(second, floor)) * grad
    return update, update * update, update


@triton.jit
def adafactor_average(grad, variance, c, d, fresh, floor):
    variance = _lerp(variance, grad * grad, fresh)
    update = tl.rsqrt(_clamp(variance, floor)) * grad
    return variance, update, update * update


@triton.jit
def adafactor_apply(weight, update, factor, d, decay, s1):
    weight = weight * decay - update * factor
    return weight, weight, weight


@triton.jit
def _load(x, place, mask):
    """fp32 of fp32, float16 or bfloat16, of which the interpreter knows the bits only."""
    if x.dtype.element_ty == tl.bfloat16:
        return widen(tl.load(x.to(tl.pointer_type(tl.int16), bitcast=True) + place, mask=mask, other=0))
    else:
        return tl.load(x + place, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(y, place, value, mask):
    if y.dtype.element_ty == tl.bfloat16:
        tl.store(y.to(tl.pointer_type(tl.int16), bitcast=True) + place, narrow(value), mask=mask)
    else:
        tl.store(y + place, value.to(y.dtype.element_ty), mask=mask)


@triton.jit
def stretch_kernel(x0, x1, x2, x3, y0, y1, y2, rows, cols, item0, row0, col0, item1, row1, col1,
                   item2, row2, col2, item3, row3, col3, s0, s1,
                   STRETCH: tl.constexpr, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr,
                   HIGH: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """A block of HIGH × WIDE elements of one item; `item0`, `row0` and `col0` are the strides of x0, that of a dim over which
    x0 is the same being 0."""
    program = tl.program_id(0).to(tl.int64)
    across, down = tl.cdiv(cols, WIDE), tl.cdiv(rows, HIGH)
    item, block = program // (across * down), program % (across * down)
    row = ((block // across) * HIGH + tl.arange(0, HIGH))[:, None]
    col = ((block % across) * WIDE + tl.arange(0, WIDE))[None, :]
    mask = (row < rows) & (col < cols)
    a = _load(x0, item * item0 + row * row0 + col * col0, mask)
    b = _load(x1, item * item1 + row * row1 + col * col1, mask)
    c, d = a, a
    if INPUTS > 2:
        c = _load(x2, item * item2 + row * row2 + col * col2, mask)
    if INPUTS > 3:
        d = _load(x3, item * item3 + row * row3 + col * col3, mask)
    first, second, third = STRETCH(a, b, c, d, s0, s1)
    place = (item * rows + row) * cols + col
    _store(y0, place, first, mask)
    if OUTPUTS > 1:
        _store(y1, place, second, mask)
    if OUTPUTS > 2:
        _store(y2, place, third, mask)


def launch(
    stretch: Any, inputs: Sequence[Tensor], dtypes: Sequence[torch.dtype], s0: float, s1: float = 0.0
) -> list[Tensor]:
    """What a stretch makes of 2 to 4 tensors that broadcast to the first one, (k, rows, cols): 1 to 3 tensors like that,
    contiguous."""
    whole = inputs[0].shape
    outputs = [torch.empty(whole, dtype=dtype, device=inputs[0].device) for dtype in dtypes]
    k, rows, cols = whole
    high, wide = 8, 128
    if all(x.shape == whole and x.is_contiguous() for x in inputs):
        k, rows, cols, high, wide = 1, 1, inputs[0].numel(), 1, 1024
    given = [x.expand(whole) for x in inputs]
    given += given[:1] * (4 - len(given))
    strides = [n for x in given for n in (x.stride() if high > 1 else (0, 0, 1))]
    stretch_kernel[(k * triton.cdiv(rows, high) * triton.cdiv(cols, wide),)](
        *given, *(outputs * 3)[:3], rows, cols, *strides, s0, s1,
        STRETCH=stretch, INPUTS=len(inputs), OUTPUTS=len(outputs), HIGH=high, WIDE=wide,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return outputs


def _prepare(
    grad: Tensor, momentum_buffer: Tensor, momentum: float, nesterov: bool, dtype: torch.dtype
) -> Sequence[Tensor]:
    if not nesterov and dtype == torch.float32:  # one pass, and one tensor
        return muon.prepare(grad, momentum_buffer, momentum, nesterov, dtype)
    stretch = muon_prepare_nesterov if nesterov else muon_prepare
    return launch(stretch, (grad, momentum_buffer), (torch.float32, dtype), 1 - momentum, momentum)


def _apply(weight: Tensor, direction: Tensor, decay: float, factor: float) -> Tensor:
    return launch(muon_apply, (weight, direction), (torch.float32,), decay, factor)[0]


def _precondition(grad: Tensor, row: Tensor, col: Tensor, total: Tensor, eps: float) -> list[Tensor]:
    return launch(adafactor_precondition, (grad, row, col, total), (torch.float32,) * 2, eps, eps * eps)


def _average(grad: Tensor, variance: Tensor, fresh: float, eps: float) -> list[Tensor]:
    return launch(adafactor_average, (grad, variance), (torch.float32,) * 3, fresh, eps * eps)


def _apply_factor(weight: Tensor, update: Tensor, factor: Tensor, decay: float) -> Tensor:
    return launch(adafactor_apply, (weight, update, factor), (torch.float32,), decay)[0]


def _served(text: Callable[..., Any], kernel: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        dtypes = {
            arg.dtype if isinstance(arg, Tensor) else arg for arg in args if isinstance(arg, Tensor | torch.dtype)
        }
        return kernel(*args) if dtypes.issubset(SERVED) and args[0].numel() else text(*args)

    return run


KERNELS: dict[Any, Callable[..., Any]] = {
    text: _served(text, kernel)
    for text, kernel in (
        (muon.prepare, _prepare),
        (muon.apply, _apply),
        (adafactor.precondition, _precondition),
        (adafactor.average, _average),
        (adafactor.apply, _apply_factor),
    )
}
"""By the function that each stands for."""
