"""Elementwise rules in Triton: new weight and states from weight, gradient, states and the scalars of `elementwise.py`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def adamw(w, g, m, v, s0, s1, s2, s3, s4, s5, s6):
    m += s0 * (g - m)
    v = v * s1 + s2 * g * g
    denominator = tl.div_rn(tl.sqrt_rn(v), s3) + s4
    return w * s5 + tl.div_rn(s6 * m, denominator), m, v


@triton.jit
def lion(w, g, m, v, s0, s1, s2, s3, s4, s5, s6):
    mixed = m * s0 + g * s1
    sign = (mixed > 0).to(tl.float32) - (mixed < 0).to(tl.float32)
    return w * s4 + sign * s5, m * s2 + g * s3, v


@triton.jit
def sgd(w, g, m, v, s0, s1, s2, s3, s4, s5, s6):
    m = m * s1 + (g + w * s0) * s2
    return w + m * s3, m, v


@triton.jit
def sgd_nesterov(w, g, m, v, s0, s1, s2, s3, s4, s5, s6):
    g += w * s0
    m = m * s1 + g * s2
    return w + (g + m * s4) * s3, m, v


RULES = {"AdamW": adamw, "Lion": lion, "SGD": sgd, "SGDNesterov": sgd_nesterov}
"""By the name that `elementwise.py` gives."""
