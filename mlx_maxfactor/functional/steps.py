"""Scale an update into a step, and the cautious step."""

import mlx.core as mx

from .norms import fusion_barrier, rms

ROOT_FLOOR = 1e-20
"""Smallest divisor of an update: the largest gradient divided by it, 1e35, is still finite."""

LEAST_SHARE = 1e-3
"""A cautious step divides by at least this share of kept elements, as its authors' code does."""


def stepped(p: mx.array, decay: mx.array, step: mx.array) -> mx.array:
    """``p (1 - decay) - step``."""
    return p * fusion_barrier(1 - decay) - step


def unit_rms(x: mx.array) -> mx.array:
    """Divide each matrix by its root mean square; a zero matrix stays zero."""
    size = rms(x, (-2, -1))
    return x / fusion_barrier(mx.where(size > 0, size, 1.0))


def agreement(momentum: mx.array, gradient: mx.array) -> mx.array:
    """1 where momentum and gradient have the same sign, else 0; one byte per element."""
    # mx.sign, because the product of two small numbers may underflow to zero. Not a boolean: C++
    # compilers turn one into a branch, which is mispredicted half of the time.
    return (mx.sign(momentum) * gradient > 0).astype(mx.uint8)


def cautious_scale(agrees: mx.array, axes: tuple[int, ...] | None = None) -> mx.array:
    """The factor on a cautious step: one over the share of kept elements.

    Liang et al. 2024, arXiv 2411.16085. The share is taken as at least 1e-3.
    """
    rows = mx.sum(agrees, axis=-2, keepdims=True) if agrees.ndim > 2 else agrees
    total = mx.sum(rows.astype(mx.float32), axis=axes, keepdims=True)
    return 1 / mx.maximum(total * (total.size / agrees.size), LEAST_SHARE)
