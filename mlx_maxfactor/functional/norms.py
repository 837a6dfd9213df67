"""Norms that neither overflow nor underflow."""

from collections.abc import Callable, Sequence

import mlx.core as mx

GRADIENT_LIMIT = 1e15
"""Largest magnitude a gradient keeps: its square, 1e30, can still be summed in float32."""


def fusion_barrier(x: mx.array) -> mx.array:
    """End the fused kernel of a number, or of one number a row, before it meets a full-size array.

    ``mx.compile`` fuses through broadcasts, and would compute the number again for every element.
    It does not fuse a copy.
    """
    return mx.contiguous(x)


def clamp(x: mx.array, limit: float) -> mx.array:
    """Clamp to ±limit; a NaN stays one.

    The number comes first: MLX's fused kernels ask whether the first operand is a NaN, and where
    that is an array the compiler vectorizes nothing of the kernel.
    """
    return mx.maximum(-limit, mx.minimum(limit, x))


def clamp_gradient(gradient: mx.array) -> mx.array:
    """Clamp to ±1e15, so that the square of any finite gradient is finite in float32."""
    return clamp(gradient, GRADIENT_LIMIT)


def clamped_square(gradient: mx.array) -> mx.array:
    """The square of the clamped gradient, in one operation more than the square."""
    return mx.minimum(GRADIENT_LIMIT**2, mx.square(gradient))


def clamped_magnitude(gradient: mx.array) -> mx.array:
    """The magnitude of the clamped gradient."""
    return mx.minimum(GRADIENT_LIMIT, mx.abs(gradient))


def row_sum(x: mx.array) -> mx.array:
    """Sum of each row (last axis), kept as an axis of length one."""
    return mx.sum(_halfway(x, mx.sum), axis=-1, keepdims=True)


def row_max(x: mx.array) -> mx.array:
    """Largest number of each row (last axis), kept as an axis of length one."""
    return mx.max(_halfway(x, mx.max), axis=-1, keepdims=True) if x.ndim else x


def _halfway(x: mx.array, reduce: Callable[..., mx.array]) -> mx.array:
    """Reduce each row to 64 numbers or a few more, across the row.

    A reduction of neighbours waits for each of its operations; one across them does not, and
    MLX's on a CPU takes a quarter of the time.
    """
    columns = x.shape[-1] if x.ndim else 1
    parts = next((n for n in range(64, 129) if columns % n == 0), columns)
    if columns < 256 or parts == columns:
        return x
    return reduce(x.reshape(*x.shape[:-1], columns // parts, parts), axis=-2)


def rms(x: mx.array, axes: tuple[int, ...] | None = None) -> mx.array:
    """Root mean square ``‖x‖₂ / √size`` over the axes, which are kept with length one."""
    square = mx.square(x)
    if axes is None or axes == (-2, -1):
        square = mx.sum(square, axis=-2, keepdims=True) if x.ndim > 1 else square
    total = mx.sum(square, axis=axes, keepdims=True)
    return mx.sqrt(total * (total.size / x.size))


def unit_frobenius(x: mx.array) -> mx.array:
    """Divide each matrix by its Frobenius norm; a zero matrix stays zero."""
    # Scaled by its largest magnitude first: the square of 1e25 or 1e-25 is not a float32.
    peak = mx.max(mx.abs(x), axis=(-2, -1), keepdims=True)
    x = x / mx.where(peak > 0, peak, 1.0)
    norm = mx.sqrt(mx.sum(mx.square(x), axis=(-2, -1), keepdims=True))
    return x / mx.where(norm > 0, norm, 1.0)


def scaled_global_norm(arrays: Sequence[mx.array]) -> tuple[mx.array, mx.array]:
    """The norm of all arrays as a product of two numbers, largest magnitude and what remains.

    The norm of finite gradients may itself be beyond float32; the second number never is, unless
    an element is not finite. A complex number counts by both its parts. One array after the other,
    so that a float32 copy of one is alive; the last one first, as a backward pass makes them.
    """
    peaks, squares = [], []
    for x in reversed([part for array in arrays for part in _real_parts(array)]):
        if x.size:
            # A transposed view, as of a Linear's gradient, is slow, and sums in another order.
            x = fusion_barrier(mx.depends(x, squares[-1]) if squares else x)
            peaks.append(mx.maximum(mx.max(x), -mx.min(x)).astype(mx.float32))
            scaled = x.astype(mx.float32) / _divisor(peaks[-1])
            squares.append(mx.sum(mx.square(scaled)))
    if not peaks:
        return mx.array(1.0), mx.array(0.0)
    each = mx.stack(peaks[::-1])
    peak = _divisor(mx.max(each))
    return peak, mx.sqrt(mx.sum(mx.stack(squares[::-1]) * mx.square(_divisor(each) / peak)))


def _real_parts(x: mx.array) -> list[mx.array]:
    if mx.issubdtype(x.dtype, mx.complexfloating):
        return [mx.real(x), mx.imag(x)]
    return [x] if mx.issubdtype(x.dtype, mx.floating) else []


def _divisor(peak: mx.array) -> mx.array:
    """A largest magnitude as a divisor: 1 instead of zero, inf and NaN."""
    return fusion_barrier(mx.where((peak > 0) & mx.isfinite(peak), peak, 1.0))
