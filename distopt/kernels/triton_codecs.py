"""Codecs, master weights and random bits in Triton; the text of `state/codecs`, `state/master.py` and `state/noise.py` is the
reference. bfloat16 is handled as its bits, because the interpreter cuts where hardware rounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

FLOOR = tl.constexpr(2.0**-90)
_ROUND = tl.constexpr(12582912.0)  # 1.5 · 2^23: adding it rounds to the nearest integer, ties to even
_GOLDEN, _FIRST, _SECOND = (tl.constexpr(x) for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


@triton.jit
def nearest(x):
    """The nearest integer, of |x| below 2^22."""
    return (x + _ROUND) - _ROUND


@triton.jit
def widen(bits):
    """fp32 of the bits of bfloat16."""
    return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def narrow(x):
    """The bits of bfloat16 nearest to fp32."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(x == x, rounded, 0x7FC0).to(tl.int16)


@triton.jit
def random_bits(elements, key):
    """16 random bits per element number; see `state/noise.py`."""
    x = elements.to(tl.uint64) * _GOLDEN + key.to(tl.uint64)
    x = (x ^ (x >> 30)) * _FIRST
    x = (x ^ (x >> 27)) * _SECOND
    return (x >> 48).to(tl.int32)


@triton.jit
def decode_fp32(code, scale):
    return code


@triton.jit
def encode_fp32(x, scale, noise):
    return x


@triton.jit
def decode_bf16(code, scale):
    return widen(code)


@triton.jit
def encode_bf16(x, scale, noise):
    return narrow(x)


@triton.jit
def encode_bf16_sr(x, scale, noise):
    bits = x.to(tl.int32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    return tl.where(finite, (bits + noise) >> 16, narrow(x).to(tl.int32)).to(tl.int16)


@triton.jit
def decode_int8(code, scale):
    root = tl.div_rn(code.to(tl.float32), 127.0)
    return root * tl.abs(root) * scale


@triton.jit
def encode_int8(x, scale, noise):
    root = nearest(tl.sqrt_rn(tl.div_rn(tl.abs(x), scale)) * 127.0)
    return tl.where(x < 0, -root, root).to(tl.int8)


@triton.jit
def decode_uint8(code, scale):
    root = tl.div_rn(code.to(tl.float32), 255.0)
    square = root * root
    return square * square * scale


@triton.jit
def encode_uint8(x, scale, noise):
    code = nearest(tl.sqrt_rn(tl.sqrt_rn(tl.div_rn(x, scale))) * 255.0)
    return tl.where(x > 0, tl.maximum(code, 1.0), 0.0).to(tl.uint8)


@dataclass(frozen=True)
class TritonCodec:
    """Functions and dtype of one codec."""

    dtype: Any
    decode: Any
    encode: Any
    scaled: bool = False
    stochastic: bool = False


_FP32 = TritonCodec(tl.float32, decode_fp32, encode_fp32)
_BF16 = TritonCodec(tl.int16, decode_bf16, encode_bf16)
_BF16_SR = TritonCodec(tl.int16, decode_bf16, encode_bf16_sr, stochastic=True)
CODECS = {
    **{("FP32", signed): _FP32 for signed in (True, False)},
    **{("BF16", signed): _BF16 for signed in (True, False)},
    **{("BF16Stochastic", signed): _BF16_SR for signed in (True, False)},
    ("Int8", True): TritonCodec(tl.int8, decode_int8, encode_int8, scaled=True),
    ("Int8", False): TritonCodec(tl.uint8, decode_uint8, encode_uint8, scaled=True),
}
"""(class of the codec, signed) → its functions. int4, whose halves lie apart, and fp8, which needs sm_89, run as text."""


@triton.jit
def join_fp32(param, rest):
    return param


@triton.jit
def split_fp32(x):
    return x, x


@triton.jit
def join_bf16(param, rest):
    return widen(param)


@triton.jit
def split_bf16(x):
    return narrow(x), x


@triton.jit
def join_copy(param, rest):
    return tl.where(narrow(rest) == param, rest, widen(param))


@triton.jit
def _join_bits(param, rest, SHIFT: tl.constexpr):
    upper = param.to(tl.int32)
    rest = tl.where((upper & 0x7FFF) == 0, 0, rest.to(tl.int32))
    return ((upper << 16) + (rest << SHIFT)).to(tl.float32, bitcast=True)


@triton.jit
def _split_bits(x, SHIFT: tl.constexpr):
    bits = x.to(tl.int32, bitcast=True)
    if SHIFT > 0:
        bits = ((bits + (1 << (SHIFT - 1))) >> SHIFT) << SHIFT
    upper = (bits + 0x8000) >> 16
    rest = (bits - (upper << 16)) >> SHIFT
    return upper.to(tl.int16), tl.where((upper & 0x7FFF) == 0, 0, rest)


@triton.jit
def join_bits8(param, rest):
    return _join_bits(param, rest, 8)


@triton.jit
def split_bits8(x):
    return _split_bits(x, 8)


@triton.jit
def join_bits16(param, rest):
    return _join_bits(param, rest, 0)


@triton.jit
def split_bits16(x):
    return _split_bits(x, 0)


@dataclass(frozen=True)
class TritonWeights:
    """How weights are stored: dtype of the parameter, of what it lacks of fp32 (None: nothing is kept), functions."""

    dtype: Any
    rest: Any
    join: Any
    split: Any


WEIGHTS = {
    ("float32", None): TritonWeights(tl.float32, None, join_fp32, split_fp32),
    ("bfloat16", None): TritonWeights(tl.int16, None, join_bf16, split_bf16),
    ("bfloat16", "float32"): TritonWeights(tl.int16, tl.float32, join_copy, split_bf16),
    ("bfloat16", "int8"): TritonWeights(tl.int16, tl.int8, join_bits8, split_bits8),
    ("bfloat16", "int16"): TritonWeights(tl.int16, tl.int16, join_bits16, split_bits16),
}
"""(dtype of the parameter, of the rest) → its functions. float16 runs as text."""
