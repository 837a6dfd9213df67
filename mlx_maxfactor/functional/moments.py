"""Second moments, full and factored."""

import math
from collections.abc import Mapping

import mlx.core as mx

from .norms import GRADIENT_LIMIT, fusion_barrier, row_squares

SMALLEST_NORMAL = 2.0**-126
"""Smallest float32 with all its digits."""

ROOT_FLOOR = 1e-20
"""Smallest divisor of an update: the largest gradient divided by it, 1e35, is still finite."""


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
) -> tuple[mx.array, mx.array]:
    """Moving averages of the row and column means of ``g² + eps``.

    Args:
        gradient: ``(..., m, n)``. A mean above 1e30 counts as 1e30.
        row: ``(..., m, 1)``, the row statistic ``R``.
        column: ``(..., 1, n)``, the column statistic ``C``.
        weight: ``b_t`` of the newest mean.
        eps: Added to each square.
        is_view: Whether it is a transposed view, as a Linear's gradient is: its columns are rows in
            memory.
    """
    m, n = gradient.shape[-2:]
    if is_view:
        columns = row_squares(gradient.swapaxes(-1, -2)).swapaxes(-1, -2)
        gradient = mx.contiguous(gradient)
    else:
        columns = mx.sum(mx.square(gradient), axis=-2, keepdims=True)
    row_mean = mx.minimum(GRADIENT_LIMIT**2, row_squares(gradient) / n) + eps
    column_mean = mx.minimum(GRADIENT_LIMIT**2, columns / m) + eps
    return row + weight * (row_mean - row), column + weight * (column_mean - column)


def factored_root(
    row: mx.array, column: mx.array, divisor: mx.array | float, floor: float
) -> mx.array:
    """``max(√V, floor)`` of the rank-one estimate ``V = (R / divisor) · C``, ``(..., m, n)``.

    A product of roots: the product of R and C can leave the range of float32.
    """
    # Where all squares are below float32's range, a divisor of zero would make inf of a row.
    rows = fusion_barrier(mx.sqrt(row / mx.maximum(divisor, SMALLEST_NORMAL)))
    return mx.maximum(floor, rows * fusion_barrier(mx.sqrt(column)))


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
