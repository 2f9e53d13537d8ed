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


@triton.jit
def decode_int4(code, scale):
    root = tl.div_rn((code.to(tl.int32) ^ 8).to(tl.float32) - 8.0, 7.0)
    return root * tl.abs(root) * scale


@triton.jit
def encode_int4(x, scale, noise):
    root = nearest(tl.sqrt_rn(tl.div_rn(tl.abs(x), scale)) * 7.0)
    return tl.where(x < 0, -root, root).to(tl.int32) & 15


@triton.jit
def decode_uint4(code, scale):
    root = tl.div_rn(code.to(tl.float32), 15.0)
    return root * root * scale


@triton.jit
def encode_uint4(x, scale, noise):
    code = nearest(tl.sqrt_rn(tl.div_rn(x, scale)) * 15.0)
    return tl.where(x > 0, tl.maximum(code, 1.0), 0.0).to(tl.int32)


@triton.jit
def _decode_float8(code, MANTISSA: tl.constexpr, BIAS: tl.constexpr):
    bits = code.to(tl.int32)
    magnitude = bits & 0x7F
    normal = ((magnitude << (23 - MANTISSA)) + ((127 - BIAS) << 23)).to(tl.float32, bitcast=True)
    below = magnitude.to(tl.float32) * (2.0 ** (1 - BIAS - MANTISSA))
    value = tl.where(magnitude >> MANTISSA == 0, below, normal)
    value = tl.where(magnitude == 0x7F, float("nan"), value)
    return tl.where(bits & 0x80 != 0, -value, value)


@triton.jit
def _encode_float8(x, MANTISSA: tl.constexpr, BIAS: tl.constexpr):
    """Of magnitudes up to the format's largest: integers, because sm_80 has no conversion."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    cut: tl.constexpr = 23 - MANTISSA
    odd = (magnitude >> cut) & 1
    normal = (magnitude - ((127 - BIAS) << 23) + ((1 << (cut - 1)) - 1) + odd) >> cut
    # Below the normal numbers all have the same distance: that of the fp32 numbers around this power of two.
    shift: tl.constexpr = 2.0 ** (23 + 1 - BIAS - MANTISSA)
    below = (tl.abs(x) + shift).to(tl.int32, bitcast=True) & 0x7FFFFF
    code = tl.where(magnitude >> 23 < 128 - BIAS, below, normal)
    code = tl.where(x == x, code, 0x7F)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def decode_e4m3(code, scale):
    return tl.div_rn(_decode_float8(code, 3, 7), 448.0) * scale


@triton.jit
def encode_e4m3(x, scale, noise):
    return _encode_float8(tl.div_rn(x, scale) * 448.0, 3, 7)


@triton.jit
def decode_e5m2(code, scale):
    return tl.div_rn(_decode_float8(code, 2, 15), 57344.0) * scale


@triton.jit
def encode_e5m2(x, scale, noise):
    share = tl.div_rn(x, scale) * 57344.0
    return _encode_float8(tl.where(x > 0, tl.maximum(share, 2.0**-16), share), 2, 15)


@dataclass(frozen=True)
class TritonCodec:
    """Functions and dtype of one codec; `packed`: two codes of 4 bits per byte."""

    dtype: Any
    decode: Any
    encode: Any
    scaled: bool = True
    stochastic: bool = False
    packed: bool = False


_FP32 = TritonCodec(tl.float32, decode_fp32, encode_fp32, scaled=False)
_BF16 = TritonCodec(tl.int16, decode_bf16, encode_bf16, scaled=False)
_BF16_SR = TritonCodec(tl.int16, decode_bf16, encode_bf16_sr, scaled=False, stochastic=True)
CODECS = {
    **{("FP32", signed): _FP32 for signed in (True, False)},
    **{("BF16", signed): _BF16 for signed in (True, False)},
    **{("BF16Stochastic", signed): _BF16_SR for signed in (True, False)},
    ("Int8", True): TritonCodec(tl.int8, decode_int8, encode_int8),
    ("Int8", False): TritonCodec(tl.uint8, decode_uint8, encode_uint8),
    ("Int4", True): TritonCodec(tl.uint8, decode_int4, encode_int4, packed=True),
    ("Int4", False): TritonCodec(tl.uint8, decode_uint4, encode_uint4, packed=True),
    ("Fp8", True): TritonCodec(tl.uint8, decode_e4m3, encode_e4m3),
    ("Fp8", False): TritonCodec(tl.uint8, decode_e5m2, encode_e5m2),
}
"""(class of the codec, signed) → its functions."""


@triton.jit
def join_fp32(param, rest):
    return param


@triton.jit
def split_fp32(x, REST: tl.constexpr):
    return x, x


@triton.jit
def join_bf16(param, rest):
    return widen(param)


@triton.jit
def split_bf16(x, REST: tl.constexpr):
    return narrow(x), x


@triton.jit
def join_copy(param, rest):
    return tl.where(narrow(rest) == param, rest, widen(param))


@triton.jit
def join_bits(param, rest):
    shift: tl.constexpr = 16 - rest.dtype.primitive_bitwidth
    upper = param.to(tl.int32)
    rest = tl.where((upper & 0x7FFF) == 0, 0, rest.to(tl.int32))
    return ((upper << 16) + (rest << shift)).to(tl.float32, bitcast=True)


@triton.jit
def split_bits(x, REST: tl.constexpr):
    shift: tl.constexpr = 16 - REST.primitive_bitwidth
    bits = x.to(tl.int32, bitcast=True)
    if shift > 0:
        bits = ((bits + (1 << (shift - 1))) >> shift) << shift
    upper = (bits + 0x8000) >> 16
    rest = (bits - (upper << 16)) >> shift
    return upper.to(tl.int16), tl.where((upper & 0x7FFF) == 0, 0, rest).to(REST)


@triton.jit
def join_fp16(param, rest):
    return param.to(tl.float32)


@triton.jit
def split_fp16(x, REST: tl.constexpr):
    return x.to(tl.float16), x


@triton.jit
def join_fp16_copy(param, rest):
    return tl.where(rest.to(tl.float16) == param, rest, param.to(tl.float32))


@triton.jit
def _ulp16(param):
    """As `state/master.py` has it, where that of zero is 2^-11."""
    bits = param.to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF
    exponent = tl.where(bits == 0, 0, tl.maximum(bits >> 10, 1) - 14)
    return ((exponent - 11 + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def join_error(param, rest):
    share: tl.constexpr = 1.0 / (1 << rest.dtype.primitive_bitwidth)
    return param.to(tl.float32) + rest.to(tl.float32) * (_ulp16(param) * share)


@triton.jit
def split_error(x, REST: tl.constexpr):
    param = tl.minimum(tl.maximum(x, -65504.0), 65504.0).to(tl.float16)
    whole: tl.constexpr = 1 << REST.primitive_bitwidth
    most: tl.constexpr = whole // 2 - max(1, whole >> 13)
    share = tl.div_rn(x - param.to(tl.float32), _ulp16(param)) * whole
    return param, nearest(tl.minimum(tl.maximum(share, -most), most)).to(REST)


@dataclass(frozen=True)
class TritonWeights:
    """How weights are stored: dtype of the parameter, of what it lacks of fp32 (None: nothing is kept), functions, of which
    `split` is told that."""

    dtype: Any
    rest: Any
    join: Any
    split: Any


WEIGHTS = {
    ("float32", None): TritonWeights(tl.float32, None, join_fp32, split_fp32),
    ("bfloat16", None): TritonWeights(tl.int16, None, join_bf16, split_bf16),
    ("bfloat16", "float32"): TritonWeights(tl.int16, tl.float32, join_copy, split_bf16),
    ("bfloat16", "int8"): TritonWeights(tl.int16, tl.int8, join_bits, split_bits),
    ("bfloat16", "int16"): TritonWeights(tl.int16, tl.int16, join_bits, split_bits),
    ("float16", None): TritonWeights(tl.float16, None, join_fp16, split_fp16),
    ("float16", "float32"): TritonWeights(tl.float16, tl.float32, join_fp16_copy, split_fp16),
    ("float16", "int8"): TritonWeights(tl.float16, tl.int8, join_error, split_error),
    ("float16", "int16"): TritonWeights(tl.float16, tl.int16, join_error, split_error),
}
"""(dtype of the parameter, of the rest) → its functions."""
