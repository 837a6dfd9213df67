"""Symmetric matrices, stored as their blocks on and below the diagonal.

The blocks above it are never computed. With k × k blocks, a product with a symmetric result costs
(k + 1) / 2k of the full product.
"""

from itertools import pairwise

import mlx.core as mx

Symmetric = list[list[mx.array]]
"""Row i holds blocks 0 to i; each may be a batch."""


def parts(x: mx.array, axis: int, count: int) -> list[mx.array]:
    """Cut an axis, -2 or -1, into ``count`` parts of about the same length."""
    if count == 1:
        return [x]
    cuts = [x.shape[axis] * i // count for i in range(count + 1)]
    if axis == -2:
        return [x[..., a:b, :] for a, b in pairwise(cuts)]
    # Copied: products with a view of some columns take an eighth longer.
    return [mx.contiguous(x[..., a:b]) for a, b in pairwise(cuts)]


def gram_matrix(x: list[mx.array], axis: int) -> Symmetric:
    """Return XXᵀ for X cut into rows (``axis`` -2), or XᵀX for X cut into columns (-1)."""
    turned = [part.swapaxes(-1, -2) for part in x]
    left, right = (x, turned) if axis == -2 else (turned, x)
    return [[left[i] @ right[j] for j in range(i + 1)] for i in range(len(x))]


def quadratic(s: Symmetric, a: float, b: float, c: float) -> Symmetric:
    """Return aI + bS + cS²."""

    def block(i: int, j: int) -> mx.array:
        linear = b * s[i][j]
        if i == j:
            # Not mx.eye, which fills and scatters: this is fused with the sum.
            places = mx.arange(linear.shape[-1])
            linear = linear + mx.where(mx.expand_dims(places, -1) == places, a, 0.0)
        return _summed(_met(s, s, i, j), linear, c)

    return [[block(i, j) for j in range(i + 1)] for i in range(len(s))]


def product(s: Symmetric, t: Symmetric) -> Symmetric:
    """Return ST. S and T must commute: otherwise ST is not symmetric."""
    return [[_summed(_met(s, t, i, j)) for j in range(i + 1)] for i in range(len(s))]


def applied(s: Symmetric, x: list[mx.array], axis: int) -> list[mx.array]:
    """Return SX for X cut into rows (``axis`` -2), or XS for X cut into columns (-1)."""
    if axis == -2:
        return [_summed([(_at(s, i, k), y) for k, y in enumerate(x)]) for i in range(len(x))]
    return [_summed([(y, _at(s, k, j)) for k, y in enumerate(x)]) for j in range(len(x))]


def _at(s: Symmetric, i: int, j: int) -> mx.array:
    return s[i][j] if i >= j else s[j][i].swapaxes(-1, -2)


def _met(s: Symmetric, t: Symmetric, i: int, j: int) -> list[tuple[mx.array, mx.array]]:
    """The pairs of blocks whose products sum to block (i, j) of ST."""
    return [(_at(s, i, k), _at(t, k, j)) for k in range(len(s))]


def _summed(
    pairs: list[tuple[mx.array, mx.array]], start: mx.array | None = None, alpha: float = 1.0
) -> mx.array:
    """Return start + α Σ ab, or Σ ab without a start."""
    if start is None:
        (a, b), *pairs = pairs
        start = a @ b
    for a, b in pairs:
        start = mx.addmm(start, a, b, alpha)
    return start
