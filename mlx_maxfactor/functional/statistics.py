"""Norms, and second moments, full and factored; numbers whose squares could overflow are scaled."""

import math
from collections.abc import Sequence

import mlx.core as mx

GRADIENT_LIMIT = 1e15
"""Largest magnitude a gradient keeps: its square, 1e30, can still be summed in float32."""

SMALLEST_NORMAL = 2.0**-126
"""Smallest float32 with all its digits."""

ROOT_FLOOR = 1e-20
"""Smallest divisor of an update: the largest gradient divided by it, 1e35, is still finite."""


def fusion_barrier(x: mx.array) -> mx.array:
    """End the fused kernel of a number, or of one number a row, before it meets a full-size array.

    ``mx.compile`` fuses through broadcasts, and would compute the number again for every element,
    which only a GPU does for nothing. It does not fuse a copy.
    """
    return mx.contiguous(x) if on_cpu() else x


def on_cpu() -> bool:
    """Whether arrays are computed on a CPU."""
    return mx.default_device() == mx.cpu


def clamp(x: mx.array, limit: float = GRADIENT_LIMIT) -> mx.array:
    """Clamp to ±limit; a NaN stays one.

    The number comes first: MLX's fused kernels ask whether the first operand is a NaN, and where
    that is an array the compiler vectorizes nothing of the kernel.
    """
    return mx.maximum(-limit, mx.minimum(limit, x))


def as_gradient(x: mx.array, gain: float = 1.0) -> mx.array:
    """A gradient in float32, clamped so that its square can be summed, times ``gain`` above 0."""
    # The product comes first: g++ vectorizes no product with what was clamped.
    x = x.astype(mx.float32)
    return clamp(x if gain == 1 else gain * x, gain * GRADIENT_LIMIT)


def row_squares(x: mx.array) -> mx.array:
    """Sum of the squares of each row (last axis), kept as an axis of length one.

    As a product of each row with itself: one kernel, and no array of squares is written. The sums
    of a bf16 array are rounded to bf16, to 0.4 %, and are to be cast after the last view: MLX fuses
    nothing through a view. Other arrays are cast to float32 first.
    """
    x = x if x.dtype == mx.bfloat16 else x.astype(mx.float32)
    return (mx.expand_dims(x, -2) @ mx.expand_dims(x, -1)).squeeze(-1)


def rms(x: mx.array, axes: tuple[int, ...] | None = None) -> mx.array:
    """Root mean square ``‖x‖₂ / √size`` over the axes, which are kept with length one."""
    squares = row_squares(x).astype(mx.float32) if x.ndim > 1 else mx.square(x)
    total = mx.sum(squares, axis=axes, keepdims=True)
    return mx.sqrt(total * (total.size / x.size))


def each(x: mx.array) -> tuple[int, ...]:
    """The axes of each of the arrays that the first axis counts."""
    return tuple(range(-x.ndim + 1, 0))


def unit_peak(x: mx.array) -> mx.array:
    """Divide each matrix by its largest magnitude: the square of 1e25 or 1e-25 is not a float32."""
    peak = mx.maximum(
        mx.max(x, axis=(-2, -1), keepdims=True), -mx.min(x, axis=(-2, -1), keepdims=True)
    )
    return x / fusion_barrier(mx.where(peak > 0, peak, 1.0))


def unit_frobenius(x: mx.array) -> mx.array:
    """Divide each matrix by its Frobenius norm; a zero matrix stays zero."""
    x = unit_peak(x)
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


def second_moment_weight(
    t: mx.array, exponent: float, bounds: tuple[float, float] = (0.0, 1.0)
) -> mx.array:
    """Weight of the newest squared gradient, ``b_t = clip(t^exponent, *bounds) = 1 - β₂(t)``."""
    return mx.clip(mx.power(t.astype(mx.float32), exponent), *bounds)


def factored_second_moment(
    gradient: mx.array,
    row: mx.array,
    column: mx.array,
    weight: mx.array | float,
    eps: float = 0.0,
    *,
    is_view: bool = False,
) -> tuple[mx.array, mx.array, mx.array]:
    """Moving averages of the row and column means of ``g² + eps``, and the largest row's new sum.

    Args:
        gradient: ``(..., m, n)``. A mean above 1e30 counts as 1e30.
        row: ``(..., m, 1)``, the row statistic ``R``.
        column: ``(..., 1, n)``, the column statistic ``C``.
        weight: ``b_t`` of the newest mean.
        eps: Added to each square.
        is_view: Whether it may be a transposed view, as a Linear's gradient is: its columns are
            rows in memory.
    """
    m, n = gradient.shape[-2:]
    if is_view:
        columns = row_squares(gradient.swapaxes(-1, -2)).swapaxes(-1, -2)
        gradient = mx.contiguous(gradient)
    else:
        columns = mx.sum(mx.square(gradient), axis=-2, keepdims=True)
    rows = row_squares(gradient)
    row_mean = mx.minimum(GRADIENT_LIMIT**2, rows.astype(mx.float32) / n) + eps
    column_mean = mx.minimum(GRADIENT_LIMIT**2, columns.astype(mx.float32) / m) + eps
    row, column = row + weight * (row_mean - row), column + weight * (column_mean - column)
    return row, column, mx.max(rows, axis=-2, keepdims=True)


def factored_root(
    row: mx.array, column: mx.array, divisor: mx.array | float, floor: float
) -> mx.array:
    """``max(√V, floor)`` of the rank-one estimate ``V = (R / divisor) · C``, ``(..., m, n)``.

    A product of roots: the product of R and C can leave the range of float32.
    """
    # Where all squares are below float32's range, a divisor of zero would make inf of a row.
    rows = fusion_barrier(mx.sqrt(row / mx.maximum(divisor, SMALLEST_NORMAL)))
    return mx.maximum(floor, rows * fusion_barrier(mx.sqrt(column)))


def bias_correction(beta: float, t: mx.array) -> mx.array:
    """``1 - β^t``, the weight that a moving average started at zero has gathered."""
    # Through expm1: in float32 the difference 1 - 0.999 is off by 6e-5 of itself.
    return -mx.expm1(t * math.log(beta)) if beta else mx.ones_like(t)


def largest_moment(beta1: float, beta2: float, t: mx.array) -> mx.array:
    r"""Largest :math:`|m| / \sqrt v` that ``t`` gradients of any sizes can give in Adam.

    By Cauchy and Schwarz it is :math:`\tfrac{1-\beta_1}{\sqrt{1-\beta_2}}
    \sqrt{\sum_{i<t} \rho^i}` with :math:`\rho = \beta_1^2 / \beta_2`.
    """
    rho = beta1**2 / max(beta2, 1e-30)
    powers = mx.expm1(t * math.log(rho)) / (rho - 1) if rho not in (0.0, 1.0) else t
    powers = mx.minimum(powers, 1e30)  # where ρ > 1 it grows without end, and inf times 0 is a NaN
    total = mx.ones_like(t) if rho == 0 else powers
    return (1 - beta1) / math.sqrt(1 - beta2) * mx.sqrt(total)


def zero_statistics(shape: tuple[int, ...]) -> dict[str, mx.array]:
    """Zero row and column statistics for matrices of this shape."""
    return {
        "row": mx.zeros((*shape[:-1], 1)),
        "column": mx.zeros((*shape[:-2], 1, shape[-1])),
    }


def zero_count(shape: tuple[int, ...]) -> dict[str, mx.array]:
    """A count of each array's own updates, for bias correction."""
    return {"count": mx.zeros((shape[0],) + (1,) * (len(shape) - 1))}
