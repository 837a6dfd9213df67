"""From an update to a step: MaxFactor's normalizations, row maxima, caution."""

import mlx.core as mx

from .norms import hoist, rms

ROOT_FLOOR = 1e-20
"""Least divisor of an update: a gradient at the limit divided by it, 1e35, is still finite."""

LEAST_SHARE = 1e-3
"""Least share of kept elements that a cautious step divides by (as its authors' code does)."""


def unit_rms(x: mx.array) -> mx.array:
    """Divide each matrix by its root mean square; a zero matrix stays zero."""
    size = rms(x, (-2, -1))
    return x / hoist(mx.where(size > 0, size, 1.0))


def update_scale(
    u: mx.array,
    peak: mx.array,
    *,
    eps: float,
    clip_threshold: float | None,
    d: float,
    axes: tuple[int, ...] | None = None,
) -> mx.array:
    """The factor that MaxFactor's three normalizations put on ``u``, one number per norm.

    ``u / max(‖u‖_∞, eps)``, then ``min(1, clip_threshold / ‖u‖₂)`` where one is given, then
    ``1 / max(1, RMS(u) / d)``. ``peak`` is ``‖u‖_∞``. The row-max step is homogeneous in ``u``, so
    one factor at the end serves it as well.
    """
    scale = 1.0 / mx.maximum(peak, eps)
    if clip_threshold is not None:
        norm = mx.sqrt(mx.sum(mx.square(u * scale), axis=axes, keepdims=True))
        scale = scale * mx.minimum(1.0, clip_threshold / mx.maximum(norm, ROOT_FLOOR))
    if d < 1:  # an update whose largest element is at most 1 has RMS at most 1
        scale = scale / mx.maximum(1.0, rms(u * scale, axes) / d)
    return scale


def agreement(step: mx.array, gradient: mx.array) -> mx.array:
    """1 where a step agrees in sign with the gradient, else 0."""
    return mx.maximum(mx.sign(step) * mx.sign(gradient), 0.0)


def agreeing_share(
    step: mx.array, gradient: mx.array, axes: tuple[int, ...] | None = None
) -> mx.array:
    """Share of the elements of a step that agree in sign with the gradient."""
    agrees = agreement(step, gradient)
    rows = mx.sum(agrees, axis=-2, keepdims=True) if agrees.ndim > 1 else agrees
    share = mx.sum(rows, axis=axes, keepdims=True)
    return share * (share.size / agrees.size)


def cautious(step: mx.array, gradient: mx.array, share: mx.array) -> mx.array:
    """Keep the elements of a step that agree in sign with the gradient, over their share.

    Liang et al. 2024, arXiv 2411.16085. The share counts as at least 1e-3.
    """
    return step * agreement(step, gradient) * hoist(1 / mx.maximum(share, LEAST_SHARE))
