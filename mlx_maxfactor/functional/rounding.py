"""Rounding of float32 to 16-bit dtypes."""

import mlx.core as mx

BITS_DROPPED = {mx.bfloat16: 16, mx.float16: 13}
"""Mantissa bits that rounding from float32 to the dtype drops."""


def stochastic_round(x: mx.array, dtype: mx.Dtype, key: mx.array) -> mx.array:
    """Round float32 to bf16 or fp16, up or down at random, without bias.

    Random bits are added below the last bit kept, then all lower bits are cut off. The nearer value
    is the more likely one. Values beyond the dtype's range, inf and NaN are rounded to nearest.
    """
    dropped = BITS_DROPPED[dtype]
    noise = mx.random.randint(0, 1 << dropped, x.shape, mx.uint32, key)
    kept = 0xFFFFFFFF << dropped & 0xFFFFFFFF
    rounded = ((x.view(mx.uint32) + noise) & kept).view(mx.float32)
    if dtype == mx.float16:
        # Below 2^-14, fp16 values are evenly spaced by 2^-24; float32 values are not.
        least = 2.0**-24
        steps = mx.floor(x / least + noise.astype(mx.float32) / (1 << dropped))
        rounded = mx.where(mx.abs(x) < 2.0**-14, steps * least, rounded)
    inside = mx.abs(x) <= mx.finfo(dtype).max
    return mx.where(inside, rounded, x).astype(dtype)
