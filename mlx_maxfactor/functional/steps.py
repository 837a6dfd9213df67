"""From an update to a step: MaxFactor's normalizations, row maxima, caution."""

import mlx.core as mx

from .norms import fusion_barrier, rms

ROOT_FLOOR = 1e-20
"""Least divisor of an update: a gradient at the limit divided by it, 1e35, is still finite."""

LEAST_SHARE = 1e-3
"""Least share of kept elements that a cautious step divides by (as its authors' code does)."""


def unit_rms(x: mx.array) -> mx.array:
    """Divide each matrix by its root mean square; a zero matrix stays zero."""
    size = rms(x, (-2, -1))
    return x / fusion_barrier(mx.where(size > 0, size, 1.0))


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


def agreement(momentum: mx.array, gradient: mx.array) -> mx.array:
    """1 where a momentum agrees in sign with the gradient, else 0, in a byte an element."""
    # The sign of one: a product of two small numbers may be zero. No boolean: C++ compilers make
    # a branch of one where it is read, which goes the wrong way half of the time.
    return (mx.sign(momentum) * gradient > 0).astype(mx.uint8)


def cautious_scale(agrees: mx.array, axes: tuple[int, ...] | None = None) -> mx.array:
    """The factor on a cautious step: one over the share of the elements that were kept.

    Liang et al. 2024, arXiv 2411.16085. The share counts as at least 1e-3.
    """
    rows = mx.sum(agrees, axis=-2, keepdims=True) if agrees.ndim > 1 else agrees
    total = mx.sum(rows.astype(mx.float32), axis=axes, keepdims=True)
    return 1 / mx.maximum(total * (total.size / agrees.size), LEAST_SHARE)
