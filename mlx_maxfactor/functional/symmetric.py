"""Symmetric matrices as their blocks on and below the diagonal: the others are never computed.

Of k × k blocks that is a share of (k + 1) / 2k of every product whose result is symmetric.
"""

from itertools import pairwise

import mlx.core as mx

Symmetric = list[list[mx.array]]
"""Row i holds blocks 0 to i; each may be a batch."""


def parts(x: mx.array, axis: int, count: int) -> list[mx.array]:
    """Cut an axis, -2 or -1, into ``count`` parts of about the same length."""
    if count == 1:
        return [x]
    axis, cuts = x.ndim + axis, [x.shape[axis] * i // count for i in range(count + 1)]
    # By a start that is an array: one that is a number cannot be compiled shapeless.
    return [
        mx.slice(x, mx.array([a]), [axis], [*x.shape[:axis], b - a, *x.shape[axis + 1 :]])
        for a, b in pairwise(cuts)
    ]


def gram_matrix(x: list[mx.array], axis: int) -> Symmetric:
    """Return XXᵀ of rows (``axis`` -2), or XᵀX of columns (-1)."""
    turned = [part.swapaxes(-1, -2) for part in x]
    left, right = (x, turned) if axis == -2 else (turned, x)
    return [[left[i] @ right[j] for j in range(i + 1)] for i in range(len(x))]


def quadratic(s: Symmetric, a: float, b: float, c: float) -> Symmetric:
    """Return aI + bS + cS²."""

    def block(i: int, j: int) -> mx.array:
        linear = b * s[i][j]
        if i == j:
            places = mx.arange(linear.shape[-1])  # mx.eye cannot be compiled shapeless
            linear = linear + mx.where(mx.expand_dims(places, -1) == places, a, 0.0)
        return _summed(_met(s, s, i, j), linear, c)

    return [[block(i, j) for j in range(i + 1)] for i in range(len(s))]


def product(s: Symmetric, t: Symmetric) -> Symmetric:
    """Return ST of two that commute: otherwise it is not symmetric."""
    return [[_summed(_met(s, t, i, j)) for j in range(i + 1)] for i in range(len(s))]


def applied(s: Symmetric, x: list[mx.array], axis: int) -> list[mx.array]:
    """Return SX of rows (``axis`` -2), or XS of columns (-1)."""
    if axis == -2:
        return [_summed([(_at(s, i, k), y) for k, y in enumerate(x)]) for i in range(len(x))]
    return [_summed([(y, _at(s, k, j)) for k, y in enumerate(x)]) for j in range(len(x))]


def _at(s: Symmetric, i: int, j: int) -> mx.array:
    return s[i][j] if i >= j else s[j][i].swapaxes(-1, -2)


def _met(s: Symmetric, t: Symmetric, i: int, j: int) -> list[tuple[mx.array, mx.array]]:
    """Row i of S beside column j of T."""
    return [(_at(s, i, k), _at(t, k, j)) for k in range(len(s))]


def _summed(
    pairs: list[tuple[mx.array, mx.array]], start: mx.array | None = None, alpha: float = 1.0
) -> mx.array:
    """Return start + α Σ ab, or Σ ab."""
    if start is None:
        (a, b), *pairs = pairs
        start = a @ b
    for a, b in pairs:
        start = mx.addmm(start, a, b, alpha)
    return start
