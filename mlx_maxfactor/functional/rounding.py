"""Float32 to fewer bits."""

import math
from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx

BITS_DROPPED = {mx.bfloat16: 16, mx.float16: 13}
"""Mantissa bits of float32 that the dtype lacks."""


class ElementRange(NamedTuple):
    """Where the elements of an array stand in a whole one that is cut: first of them, and of all.

    A part draws what the whole would have drawn there.
    """

    start: int
    whole: int


def drawn(
    draw: Callable[[tuple[int, ...]], mx.array], shape: tuple[int, ...], part: ElementRange | None
) -> mx.array:
    """Random numbers of a shape; of a part, those that the whole array has at its place."""
    if part is None:
        return draw(shape)
    stop = part.start + math.prod(shape)
    return draw((part.whole,))[part.start : stop].reshape(shape)


def stochastic_round(
    x: mx.array, dtype: mx.Dtype, key: mx.array, part: ElementRange | None = None
) -> mx.array:
    """Round float32 to bf16 or fp16, up or down with probability by nearness: unbiased.

    Random bits are added below the last bit that stays, and what is below it is cut off. Beyond the
    range of the dtype, and for inf and NaN, rounding is to nearest.
    """
    dropped = BITS_DROPPED[dtype]
    noise = drawn(
        lambda shape: mx.random.randint(0, 1 << dropped, shape, mx.uint32, key), x.shape, part
    )
    kept = 0xFFFFFFFF << dropped & 0xFFFFFFFF
    rounded = ((x.view(mx.uint32) + noise) & kept).view(mx.float32)
    if dtype == mx.float16:
        # Below 2^-14 fp16 has one spacing, 2^-24, and float32 many.
        least = 2.0**-24
        steps = mx.floor(x / least + noise.astype(mx.float32) / (1 << dropped))
        rounded = mx.where(mx.abs(x) < 2.0**-14, steps * least, rounded)
    inside = mx.abs(x) <= mx.finfo(dtype).max
    return mx.where(inside, rounded, x).astype(dtype)
