"""Second moments, full and factored."""

import math

import mlx.core as mx

from .norms import clamped_square, fusion_barrier, row_sum

SMALLEST_NORMAL = 2.0**-126
"""Smallest float32 with all its digits."""


def second_moment_weight(
    t: mx.array, exponent: float, bounds: tuple[float, float] = (0.0, 1.0)
) -> mx.array:
    """Weight of the newest squared gradient, ``b_t = clip(t^exponent, *bounds) = 1 - β₂(t)``."""
    return mx.clip(mx.power(t.astype(mx.float32), exponent), *bounds)


def factored_second_moment(
    gradient: mx.array, row: mx.array, column: mx.array, weight: mx.array, eps: float = 0.0
) -> tuple[mx.array, mx.array]:
    """Moving averages of the row and column means of ``g² + eps``.

    Args:
        gradient: ``(..., m, n)``.
        row: ``(..., m, 1)``, the row statistic ``R``.
        column: ``(..., 1, n)``, the column statistic ``C``.
        weight: ``b_t`` of the newest mean.
        eps: Added to each square.
    """
    square = clamped_square(gradient)
    row_mean = row_sum(square) / gradient.shape[-1] + eps
    column_mean = mx.mean(square, axis=-2, keepdims=True) + eps
    return row + weight * (row_mean - row), column + weight * (column_mean - column)


def factored_root(
    row: mx.array, column: mx.array, divisor: mx.array | float, floor: float
) -> tuple[mx.array, mx.array]:
    """``max(√V, floor)`` of the rank-one estimate ``V = (R / divisor) · C``, as two factors.

    The first factor is one number a row, the second is full-size. The roots stay separate because
    their product can leave the range of float32.

    Returns:
        ``(..., m, 1)`` and ``(..., m, n)``.
    """
    # Where all squares are below float32's range, a divisor of zero would make inf of a row.
    rows = mx.sqrt(row / mx.maximum(divisor, SMALLEST_NORMAL))
    rows = fusion_barrier(mx.where(rows > 0, rows, floor))
    return rows, mx.maximum(fusion_barrier(mx.sqrt(column)), fusion_barrier(floor / rows))


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
