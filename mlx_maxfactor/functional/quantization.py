"""Float32 to 8 or 4 bits and back, in groups with a scale each, rounded to nearest.

Rounding is deterministic: it needs no random key, and the same array gives the same codes on every
machine. A code is a sign and a magnitude, and 0 is one of the magnitudes: what is zero stays zero.
"""

import math
from itertools import pairwise
from typing import Literal

import mlx.core as mx

from .layouts import cut, filled
from .norms import hoist

GROUP = 64
"""Consecutive elements that share a scale in bf16: a quarter of a bit an element."""

Bits = Literal[4, 8]

LEVELS = (0.0, 0.2739, 0.5548, 0.8511, 1.1749, 1.5461, 2.0065, 2.6809)
"""Magnitudes of a 4-bit code over the RMS of its group: the best 15 levels for a unit normal.

The Lloyd–Max quantizer (Max 1960), mean squared error 0.0107; tests/reference.py derives it.
"""

THROUGH_LEVELS = (
    0.2767140476190476,
    -0.009856944444444444,
    0.010468055555555555,
    -0.004402777777777778,
    0.0011105555555555556,
    -0.00014027777777777777,
    7.3412698412698415e-06,
)
"""Coefficients of k, k², ... of the polynomial that gives ``LEVELS[k]``."""

HALF = GROUP // 2
LARGEST = 127
FALL = 1 + 1e-5
"""What was multiplied by ``decay`` is a little above it after rounding in float32."""


def quantize(x: mx.array, bits: Bits, decay: float = 0.0) -> tuple[mx.array, mx.array]:
    r"""Codes of an array, and the scale of each group of 64 of its elements.

    In 4 bits the scale is the RMS of the group, and the magnitudes are ``LEVELS`` of it. In 8 bits
    the scale is the largest magnitude of the group, and code ``c`` stands for :math:`(c/127)^2` of
    it, so that levels are finest near zero.

    A moving average must forget. Where an element stops getting a gradient, each step multiplies
    it by ``decay``, and to nearest it would come back to the same level for ever: 0.8 times 0.5548
    is nearer to 0.5548 than to 0.2739. So a magnitude of ``decay`` times a level or less takes the
    level below.

    Args:
        x: Float32, of any shape; groups follow its elements in order, the last filled with zeros.
        bits: 4 or 8.
        decay: What the array was multiplied by since it was last read, in [0, 1).

    Returns:
        Codes ``(groups, 32)``, uint8, two a byte (element i of a group below element i + 32), or
        ``(groups, 64)``, int8; and scales ``(groups,)``, bf16.
    """
    x = filled(x.reshape(-1), 0, GROUP).reshape(-1, GROUP)
    return _quantize_4(x, decay) if bits == 4 else _quantize_8(x, decay)


def dequantize(codes: mx.array, scale: mx.array, shape: tuple[int, ...]) -> mx.array:
    """The float32 array, of the given shape, that :func:`quantize` coded."""
    scale = hoist(scale.astype(mx.float32))
    x = _dequantize_4(codes, scale) if codes.dtype == mx.uint8 else _dequantize_8(codes, scale)
    return cut(x.reshape(-1), 0, math.prod(shape)).reshape(shape)


def groups_of(size: int) -> int:
    """Number of groups of that many elements."""
    return -(-size // GROUP)


def rows_of_groups(shape: tuple[int, ...]) -> int:
    """Rows (places of the first axis) after which an array can be cut between two groups."""
    return GROUP // math.gcd(GROUP, math.prod(shape[1:]))


def _quantize_4(x: mx.array, decay: float) -> tuple[mx.array, mx.array]:
    peak = mx.max(mx.abs(x), axis=-1, keepdims=True)  # the square of 1e-25 is not a float32
    peak = hoist(mx.where(peak > 0, peak, 1.0))
    rms = peak * mx.sqrt(mx.mean(mx.square(x / peak), axis=-1, keepdims=True))
    scale = rms.astype(mx.bfloat16)
    y = x / _divisor(scale)
    code = (y < 0).astype(mx.uint8) * 8
    for low, high in pairwise(LEVELS):
        threshold = max((low + high) / 2, decay * FALL * high)
        code = code + (mx.abs(y) >= threshold).astype(mx.uint8)
    halves = code.reshape(-1, 2, HALF)
    return halves[:, 0] + 16 * halves[:, 1], scale[:, 0]


def _dequantize_4(codes: mx.array, scale: mx.array) -> mx.array:
    code = mx.right_shift(codes[:, None], mx.array([[0], [4]], mx.uint8)) & 15
    k = (code & 7).astype(mx.float32)
    # A polynomial through the levels: a fused kernel reads no table.
    magnitude = 0.0
    for coefficient in reversed(THROUGH_LEVELS):
        magnitude = (magnitude + coefficient) * k
    sign = 1 - 2 * mx.right_shift(code, 3).astype(mx.float32)
    return sign * magnitude * scale[:, None, None]


def _quantize_8(x: mx.array, decay: float) -> tuple[mx.array, mx.array]:
    scale = mx.max(mx.abs(x), axis=-1, keepdims=True).astype(mx.bfloat16)
    root = LARGEST * mx.sqrt(mx.abs(x) / _divisor(scale))
    code = mx.minimum(LARGEST, mx.floor(root + 0.5))
    code = code - (root <= math.sqrt(decay) * FALL * code).astype(mx.float32)
    return (mx.sign(x) * mx.maximum(code, 0.0)).astype(mx.int8), scale[:, 0]


def _dequantize_8(codes: mx.array, scale: mx.array) -> mx.array:
    x = codes.astype(mx.float32) / LARGEST
    return x * mx.abs(x) * scale[:, None]


def _divisor(scale: mx.array) -> mx.array:
    """The scale as it will be read, and 1 where it is zero."""
    return hoist(mx.where(scale > 0, scale, 1.0).astype(mx.float32))
