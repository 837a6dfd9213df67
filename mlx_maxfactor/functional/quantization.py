"""Float32 to 8 bits and back, in blocks with a scale each."""

import math

import mlx.core as mx

from .layouts import cut, filled
from .rounding import Part, drawn

BLOCK = 256
"""Elements that share a scale, 4 bytes: together 1.016 bytes an element."""

LEVELS = 127


def quantize(x: mx.array, key: mx.array, part: Part | None = None) -> tuple[mx.array, mx.array]:
    """Codes of 8 bits and the largest magnitude of each block of 256 elements.

    A code ``c`` stands for ``sign(c) (c / 127)²`` of its block's largest magnitude: spacing is
    finest at zero, where most of a gradient is. Each element becomes one of its two neighbours, by
    chance and by nearness, so that rounding is unbiased.

    Args:
        x: Float32, of any shape; blocks follow its elements in order.
        key: Of the random numbers.
        part: Where ``x`` stands in an array that is cut between two blocks. None: it is whole.

    Returns:
        int8 codes of the same shape; float32 scales ``(blocks,)``.
    """
    blocks = _in_blocks(x)
    scale = mx.max(mx.abs(blocks), axis=-1, keepdims=True)
    square = mx.abs(blocks) / mx.where(scale > 0, scale, 1.0) * LEVELS**2
    low = mx.floor(mx.sqrt(square))
    if part is not None:
        part = Part(part.start, scales(part.whole) * BLOCK)
    chance = drawn(lambda shape: mx.random.uniform(shape=shape, key=key), low.shape, part)
    up = chance < (square - low * low) / (2 * low + 1)
    # On a GPU a quotient may round above 1: the minimum keeps the largest code.
    codes = mx.sign(blocks) * mx.minimum(LEVELS, low + up.astype(mx.float32))
    codes = cut(codes.astype(mx.int8).reshape(-1), 0, x.size)
    return codes.reshape(x.shape), scale.reshape(-1)


def dequantize(codes: mx.array, scale: mx.array) -> mx.array:
    """The float32 array that :func:`quantize` coded."""
    blocks = _in_blocks(codes.astype(mx.float32)) / LEVELS
    x = blocks * mx.abs(blocks) * scale[:, None]
    return cut(x.reshape(-1), 0, codes.size).reshape(codes.shape)


def scales(size: int) -> int:
    """Number of scales of that many elements."""
    return -(-size // BLOCK)


def rows_of_blocks(shape: tuple[int, ...]) -> int:
    """Rows (places of the first axis) after which an array can be cut between two blocks."""
    return BLOCK // math.gcd(BLOCK, math.prod(shape[1:]))


def _in_blocks(x: mx.array) -> mx.array:
    return filled(x.reshape(-1), 0, BLOCK).reshape(-1, BLOCK)
