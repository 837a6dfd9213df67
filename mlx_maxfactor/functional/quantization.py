"""Float32 to 8 or 4 bits and back, in groups with a scale each, rounded to nearest.

Rounding is deterministic: it needs no random key, and the same array gives the same codes on every
machine. A code is a sign and a magnitude, and 0 is one of the magnitudes: what is zero stays zero.
"""

import math
from itertools import pairwise
from typing import Literal

import mlx.core as mx

from .layouts import cut, filled
from .norms import fusion_barrier

GROUP = 64
"""Consecutive elements that share a scale in bf16: a quarter of a bit an element."""

Bits = Literal[4, 8]

LEVELS = (0.0, 0.2739, 0.5548, 0.8511, 1.1749, 1.5461, 2.0065, 2.6809)
"""Magnitudes of a 4-bit code over the RMS of its group: the best 15 levels for a unit normal.

The Lloyd–Max quantizer (Max 1960), mean squared error 0.0107; reference.py derives it.
"""

UNIT = 1e-4
"""The levels are whole multiples of it: a fused kernel makes them of small integers, exactly."""

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
    """The float32 array, of the given shape, that :func:`quantize` coded.

    Raises:
        ValueError: There are more or fewer groups of codes than an array of this shape has.
    """
    size = math.prod(shape)
    if math.ceil(size / GROUP) != codes.shape[0]:
        raise ValueError(f"{codes.shape[0]} groups of {GROUP} codes are no array of shape {shape}")
    scale = fusion_barrier(scale.astype(mx.float32))
    x = _dequantize_4(codes, scale) if codes.dtype == mx.uint8 else _dequantize_8(codes, scale)
    return cut(x.reshape(-1), 0, size).reshape(shape)


def rows_of_groups(shape: tuple[int, ...]) -> int:
    """Rows (places of the first axis) after which an array can be cut between two groups."""
    return GROUP // math.gcd(GROUP, math.prod(shape[1:]))


def _quantize_4(x: mx.array, decay: float) -> tuple[mx.array, mx.array]:
    # Below 1e-19 squares vanish, and so does the momentum; the step is made of it unrounded.
    scale = mx.sqrt(mx.mean(mx.square(x), axis=-1, keepdims=True)).astype(mx.bfloat16)
    # A product by itself: fused with what follows, a broadcast keeps it from being vectorized.
    y = fusion_barrier(x * _inverse(scale))
    code = (y < 0).astype(mx.uint8) * 8
    for low, high in pairwise(LEVELS):
        threshold = max((low + high) / 2, decay * FALL * high)
        code = code + (mx.abs(y) >= threshold).astype(mx.uint8)
    return code[:, :HALF] + 16 * code[:, HALF:], scale.squeeze(1)


def _dequantize_4(codes: mx.array, scale: mx.array) -> mx.array:
    halves = [codes & 15, mx.right_shift(codes, mx.array(4, mx.uint8))]
    code = mx.concatenate(halves, axis=1).astype(mx.int16)
    bits = [mx.right_shift(code, place) & 1 for place in range(3)]
    units = [round(level / UNIT) for level in LEVELS]
    for bit in bits:  # the eight levels, then four, two, one of them, as each bit says
        units = [low + bit * (high - low) for low, high in zip(*[iter(units)] * 2, strict=True)]
    sign = 1 - 2 * mx.right_shift(code, 3)
    return fusion_barrier((sign * units[0]).astype(mx.float32)) * (UNIT * scale)[:, None]


def _quantize_8(x: mx.array, decay: float) -> tuple[mx.array, mx.array]:
    scale = mx.max(mx.abs(x), axis=-1, keepdims=True).astype(mx.bfloat16)
    root = LARGEST * mx.sqrt(mx.abs(fusion_barrier(x * _inverse(scale))))
    code = mx.minimum(LARGEST, mx.floor(root + 0.5))
    code = code - (root <= math.sqrt(decay) * FALL * code).astype(mx.float32)
    return (mx.sign(x) * mx.maximum(code, 0.0)).astype(mx.int8), scale.squeeze(1)


def _dequantize_8(codes: mx.array, scale: mx.array) -> mx.array:
    x = codes.astype(mx.float32) / LARGEST
    return fusion_barrier(x * mx.abs(x)) * scale[:, None]


def _inverse(scale: mx.array) -> mx.array:
    """One over the scale as it will be read, and 0 where that is zero."""
    scale = scale.astype(mx.float32)
    return fusion_barrier(mx.where(scale > 0, 1 / scale, 0.0))
