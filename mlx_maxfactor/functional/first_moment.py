"""Momentum, in float32, bfloat16, or 8 or 4 bits: groups of elements that share a scale.

Rounding to few bits is to nearest and deterministic: it needs no random key, and the same array
gives the same codes on every machine. Zero has a code: what is zero stays zero.
"""

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Literal

import mlx.core as mx

from .layouts import crop, pad
from .statistics import as_gradient, fusion_barrier, on_cpu

Bits = Literal[4, 8]
StateDtype = Literal["float32", "bfloat16", "int8", "int4"] | mx.Dtype
"""Type of the option ``state_dtype``: a name, or the MLX dtype of that name."""

STATE_DTYPES = ("float32", "bfloat16", "int8", "int4")
BITS: dict[str, Bits] = {"int8": 8, "int4": 4}

GROUPS: dict[Bits, int] = {4: 32, 8: 64}
"""Consecutive elements that share a scale: a power of two in 4 bits, a bf16 number in 8."""

LEVELS = (0, 0.5, 1, 1.5, 2, 3, 4, 6)
"""Magnitudes of a code in 4 bits, in units of its group's scale."""

LARGEST = 127

FORGOTTEN = 0.25
"""Factor on a moment that is read where the gradient is exactly zero.

To nearest, 0.8 times a low level is rounded back to it, and a weight without gradient would keep
its momentum for ever.
"""


def packed(state: dict[str, mx.array], dtype: str) -> dict[str, mx.array]:
    """A rule's state as it is kept: ``m`` in its dtype."""
    kept = dict(state)
    if "m" in kept:
        if dtype in BITS:
            kept["m"], kept["m_scale"] = quantize(kept["m"], BITS[dtype])
        else:
            kept["m"] = kept["m"].astype(getattr(mx, dtype))
    return kept


def unpacked(state: Mapping[str, mx.array], g: mx.array) -> dict[str, mx.array]:
    """The state that a rule is given, in float32. ``g``: the gradients, for the shape of ``m``."""
    read = {key: x for key, x in state.items() if key != "m_scale"}
    if "m" in read:
        read["m"] = _read(*_kept(state, g), g)
    return read


def momentum(
    g: mx.array, state: Mapping[str, mx.array], beta: float, gain: float, nesterov: bool
) -> tuple[mx.array, dict[str, mx.array]]:
    r"""``m ← βm + gain·g``, for a rule that takes its arguments as they are kept.

    Returns:
        m, or with Nesterov ``βm + gain·g`` of the new m; and what to keep. With β = 0 it is g.
    """
    g = mx.contiguous(g)  # a Linear's gradient is a transposed view, over which passes are slow
    if not beta:
        return as_gradient(g), {}
    # Two formulas of the old m, and of two views: each kernel reads g and m as they are kept, and
    # writes one array. MLX would merge equal views, and write float32 copies of both.
    m, in_few_bits = _kept(state, g)
    a, b = (beta**2, gain * (1 + beta)) if nesterov else (beta, gain)
    h = a * _read(m, in_few_bits, g) + as_gradient(g, b)
    m, g_flat = (x.reshape(len(g), -1) for x in (m, g))
    m = beta * _read(m, in_few_bits, g_flat) + as_gradient(g_flat, gain)
    return h, {"m": m.reshape(g.shape)}


def _kept(state: Mapping[str, mx.array], g: mx.array) -> tuple[mx.array, bool]:
    """The momentum in the dtype in which it is kept, or coded, and whether it has few bits."""
    scale = state.get("m_scale")
    m = state["m"] if scale is None else dequantize(state["m"], scale, g.shape)
    return m, scale is not None


def _read(m: mx.array, in_few_bits: bool, g: mx.array) -> mx.array:
    m = m.astype(mx.float32)
    return mx.where(g == 0, FORGOTTEN * m, m) if in_few_bits else m


def averaging_momentum(
    g: mx.array, state: Mapping[str, mx.array], decay: float, nesterov: bool
) -> tuple[mx.array, dict[str, mx.array]]:
    """``m ← βm + (1-β)g``. With a decay β of 0 there is no ``m``.

    Returns:
        m, or ``βm + (1-β)g`` of the new m (Nesterov); and what to keep.
    """
    if not decay:
        return g, {}
    # As differences: a common (1-β)g would be written to memory.
    m = state["m"] + (1 - decay) * (g - state["m"])
    return g + decay * (m - g) if nesterov else m, {"m": m}


def quantize(x: mx.array, bits: Bits) -> tuple[mx.array, mx.array]:
    r"""Codes of arrays, and the scale of each group of their elements.

    4 bits: MXFP4, with the levels 0, 0.5, 1, 1.5, 2, 3, 4 and 6 times a power of two, for each 32
    elements. 8 bits: code ``c`` is :math:`\mathrm{sign}(c) (c/127)^2` of the largest magnitude of
    64 elements, so that levels are finest near zero.

    Args:
        x: Float32, ``(k, ...)``: k arrays. The last group of each is filled with zeros.
        bits: 4 or 8.

    Returns:
        Codes and scales, each ``(k, ...)``.
    """
    x = pad(x.reshape(x.shape[0], -1), -1, GROUPS[bits])
    if bits == 4:
        return _encode_mxfp4(x)
    x = x.reshape(x.shape[0], -1, GROUPS[8])
    scale = mx.max(mx.abs(x), axis=-1, keepdims=True).astype(mx.bfloat16)
    unit = x * fusion_barrier(mx.where(scale > 0, 1 / scale.astype(mx.float32), 0.0))
    code = mx.minimum(LARGEST, mx.floor(LARGEST * mx.sqrt(mx.abs(unit)) + 0.5))
    return (mx.sign(x) * code).astype(mx.int8), scale.squeeze(-1)


def dequantize(codes: mx.array, scale: mx.array, shape: tuple[int, ...]) -> mx.array:
    """The arrays, of the given shape ``(k, ...)``, that :func:`quantize` coded.

    On a GPU those of 4 bits are bf16, which is exact: a level has two binary digits.

    Raises:
        ValueError: There are more or fewer codes than arrays of this shape have.
    """
    size, bits = math.prod(shape[1:]), 8 if codes.dtype == mx.int8 else 4
    if (shape[0], math.ceil(size / GROUPS[bits])) != scale.shape[:2]:
        raise ValueError(f"codes with scales {scale.shape} do not match shape {shape}")
    if bits == 4:
        x = _decode_mxfp4(codes, scale)
    else:
        x = codes.astype(mx.float32) / LARGEST
        x = fusion_barrier(x * mx.abs(x)) * scale.astype(mx.float32)[..., None]
    return crop(x.reshape(shape[0], -1), -1, size).reshape(shape)


def _encode_mxfp4(x: mx.array) -> tuple[mx.array, mx.array]:
    """One kernel on a GPU. MLX's code for CPUs takes 20 times as long as the operations below."""
    if not on_cpu():
        codes, scale, *_ = mx.quantize(x, group_size=GROUPS[4], bits=4, mode="mxfp4")
        return codes, scale
    groups = x.reshape(-1, GROUPS[4])
    peak = mx.max(mx.abs(groups), axis=-1, keepdims=True)
    # The exponent of float32 bits, rounded up: 2^(exponent - 127) is at least peak / 6.
    exponent = mx.right_shift((peak / 6).view(mx.uint32) + 0x7FFFFF, 23)
    inverse = fusion_barrier(mx.left_shift(254 - exponent, 23).view(mx.float32))
    y = fusion_barrier(groups * inverse)
    code = (y < 0).astype(mx.uint8) * 8
    for low, high in pairwise(LEVELS):
        code = code + (mx.abs(y) > (low + high) / 2).astype(mx.uint8)
    pair = fusion_barrier(code.reshape(-1)).view(mx.uint16)
    codes = (pair | mx.right_shift(pair, mx.array(4, mx.uint16))).astype(mx.uint8)
    scale = mx.where(peak > 0, exponent, 127).astype(mx.uint8)
    return codes.view(mx.uint32).reshape(len(x), -1), scale.reshape(len(x), -1)


def _decode_mxfp4(codes: mx.array, scale: mx.array) -> mx.array:
    if not on_cpu():
        return mx.dequantize(codes, scale, group_size=GROUPS[4], bits=4, mode="mxfp4")
    byte = codes.view(mx.uint8).astype(mx.uint16)
    pair = (byte & 15) | mx.left_shift(byte & 240, mx.array(4, mx.uint16))
    code = fusion_barrier(pair).view(mx.uint8).astype(mx.int16)
    bits = [mx.right_shift(code, place) & 1 for place in range(3)]
    halves = [round(2 * level) for level in LEVELS]
    for bit in bits:  # the eight levels, then four, two, one of them, as each bit says
        halves = [a + bit * (b - a) for a, b in zip(*[iter(halves)] * 2, strict=True)]
    x = fusion_barrier(((1 - 2 * mx.right_shift(code, 3)) * halves[0]).astype(mx.float32))
    unit = mx.left_shift(scale.reshape(-1, 1).astype(mx.uint32), 23).view(mx.float32) * 0.5
    return (x.reshape(-1, GROUPS[4]) * fusion_barrier(unit)).reshape(len(codes), -1)
