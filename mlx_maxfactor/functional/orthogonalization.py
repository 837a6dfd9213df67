"""The nearest orthogonal matrix, by iterated polynomials."""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import mlx.core as mx
import numpy as np

from .layouts import crop, pad
from .statistics import SMALLEST_NORMAL, fusion_barrier, rms, unit_frobenius

Quintic = tuple[float, float, float]

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Keller Jordan's quintic: slope 3.4445 at zero, values in about [0.7, 1.2] for large inputs."""

# Minimax quintics for singular values in [1e-3, 1], each fitted to what the one before it leaves
# (Amsel et al. 2025, arXiv 2505.16932, Algorithm 1). tests/twins.py derives them.
POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)

POLAR_EXPRESS_SAFETY = 1.01
"""Shrinks the input of each step but the limit's: a rounded singular value must not pass 1."""

GRAM_ASPECT = 1.5
"""Ratio of the sides from which steps on a Gram matrix are cheaper, by their operations."""


def quintics(x: mx.array, table: Sequence[Quintic]) -> mx.array:
    """``A = XXᵀ``, then ``X ← aX + (bA + cA²)X``, once for each (a, b, c)."""
    for a, b, c in table:
        gram = x @ x.swapaxes(-1, -2)
        # Scaled within the products: aX by itself, rounded to bf16, costs four times the error.
        x = mx.addmm(x, mx.addmm(gram, gram, gram, alpha=c, beta=b), x, beta=a)
    return x


def newton_schulz(x: mx.array, steps: int = 5, dtype: mx.Dtype = mx.float32) -> mx.array:
    r"""Orthogonalize each matrix by Newton–Schulz iteration (Keller Jordan's quintic).

    With :math:`X_0 = G / \lVert G \rVert_F`, transposed if tall,

    .. math:: A = X X^\top, \qquad X \leftarrow aX + (bA + cA^2) X

    drives every singular value towards 1. It stops near, not at, 1: values land in about
    [0.7, 1.2].

    Args:
        x: ``(..., m, n)``, any float dtype; leading axes are a batch.
        steps: Number of iterations. Default 5.
        dtype: Dtype of the products; the norm is float32. Default float32; bfloat16 was not yet run
            on a GPU, where it would be faster.

    Returns:
        An array of the same shape and dtype; zero for a zero matrix.

    Raises:
        ValueError: ``x`` holds no float matrices, ``steps`` is below 1, or ``dtype`` is not a
            floating-point dtype.

    Example:
        >>> import mlx.core as mx
        >>> from mlx_maxfactor import newton_schulz
        >>> newton_schulz(mx.zeros((2, 3))).shape
        (2, 3)

    Reference:
        Keller Jordan et al., *Muon: An optimizer for hidden layers in neural networks*, 2024.
    """
    return _orthogonalized(x, "newton_schulz", steps, dtype)


def polar_express(x: mx.array, steps: int = 5, dtype: mx.Dtype = mx.float32) -> mx.array:
    r"""Orthogonalize each matrix by the Polar Express: the best quintic at every step.

    The iteration of :func:`newton_schulz` with coefficients that are minimax optimal for what the
    steps before have left of [1e-3, 1], so that five steps come closer to orthogonal.

    Args:
        x: ``(..., m, n)``, any float dtype; leading axes are a batch.
        steps: Number of iterations. Default 5.
        dtype: Dtype of the products, as for :func:`newton_schulz`.

    Returns:
        An array of the same shape and dtype; zero for a zero matrix.

    Raises:
        ValueError: ``x`` holds no float matrices, ``steps`` is below 1, or ``dtype`` is not a
            floating-point dtype.

    Example:
        >>> import mlx.core as mx
        >>> from mlx_maxfactor import polar_express
        >>> bool(mx.allclose(polar_express(mx.eye(3) * 5, steps=8), mx.eye(3), atol=1e-4))
        True

    Reference:
        Amsel, Persson, Musco and Gower, *The Polar Express*, 2025, arXiv 2505.16932.
    """
    return _orthogonalized(x, "polar_express", steps, dtype)


def _polar_express_table(steps: int) -> list[Quintic]:
    s = POLAR_EXPRESS_SAFETY
    slack = (s * s, *[s] * 6)  # the first shrinks X_0 as well
    rows = zip(POLAR_EXPRESS[:-1], slack, strict=True)
    table = [(a / t, b / t**3, c / t**5) for (a, b, c), t in rows]
    table += [POLAR_EXPRESS[-1]] * max(0, steps - len(table))
    return table[:steps]


Method = Literal["newton_schulz", "polar_express"]
METHODS: dict[str, Callable[[int], list[Quintic]]] = {
    "newton_schulz": lambda steps: [NEWTON_SCHULZ] * steps,
    "polar_express": _polar_express_table,
}
"""By name: from a number of steps to the quintic of each."""


def orthogonalize(
    x: mx.array,
    method: str | Callable[[mx.array], mx.array] = "newton_schulz",
    steps: int = 5,
    block: int | None = None,
) -> tuple[mx.array, mx.array]:
    """Orthogonalize each matrix, or each block of its rows by itself.

    Args:
        x: ``(..., m, n)``, float32, with squares that are float32 numbers. Zero stays zero.
        method: A name in ``METHODS``, or a function of a batch of matrices ``(..., m, n)``.
        steps: Its iterations.
        block: Rows of a block, along the shorter side (columns of a tall matrix), all blocks in
            one batched product; the last may be smaller. None: the whole matrix.

    Returns:
        The matrices, and the factor ``(..., 1, 1)`` that gives each an RMS of 1. What is not used
        is not computed.
    """
    shorter, longer = sorted(x.shape[-2:])
    block = min(block or shorter, shorter)
    axis = -1 if x.shape[-2] > x.shape[-1] else -2
    blocks = _cut(x, axis, block)
    if callable(method) or longer < GRAM_ASPECT * block:
        blocks = method(blocks) if callable(method) else _orthogonalized(blocks, method, steps)
        whole = _joined(blocks, axis, x.shape)
        return whole, _inverse_root(mx.square(rms(whole, (-2, -1))))
    blocks, square = _on_gram_matrices(blocks, METHODS[method](steps), axis)
    return _joined(blocks, axis, x.shape), _inverse_root(square / (shorter * longer))


def _cut(x: mx.array, axis: int, block: int) -> mx.array:
    """Cut matrices into blocks of rows (axis -2) or columns (-1), ``(..., blocks, m, n)``."""
    x = pad(x, axis, block)  # rows of zeros stay zero, and change nothing of the others
    *batch, rows, columns = x.shape
    if axis == -2:
        return x.reshape(*batch, -1, block, columns)
    # On a GPU, products take what lies in rows of a larger matrix.
    return fusion_barrier(x.reshape(*batch, rows, -1, block).swapaxes(-2, -3))


def _joined(blocks: mx.array, axis: int, shape: Sequence[int]) -> mx.array:
    """Undo :func:`_cut`: the matrices of this shape."""
    if axis == -1:
        blocks = blocks.swapaxes(-2, -3)
        return crop(blocks.reshape(*blocks.shape[:-2], -1), -1, shape[-1])
    return crop(blocks.reshape(*blocks.shape[:-3], -1, shape[-1]), -2, shape[-2])


def orthogonalization_flops(shape: tuple[int, ...], block: int | None = None) -> float:
    """About how many operations five steps take on matrices ``(..., m, n)``: those of products."""
    shorter, longer = sorted(shape[-2:])
    rows = shorter if block is None else min(block, shorter)
    # A product of the matrix is 2·rows an element. A step has two, and one of its Gram matrix. On
    # Gram matrices, two groups of steps have two each, and the rest is 15 of the Gram matrix.
    whole, small = (10, 5) if longer < GRAM_ASPECT * rows else (4, 15)
    return math.prod(shape) * (whole * 2 * rows + small * 2 * rows * rows / longer)


def _check(x: mx.array, steps: int, dtype: mx.Dtype) -> None:
    if not isinstance(x, mx.array):
        raise ValueError(f"x must be an array of MLX, got {type(x).__name__}")
    if x.ndim < 2 or x.size == 0 or not mx.issubdtype(x.dtype, mx.floating):
        raise ValueError(f"x must hold float matrices, got {x.dtype} of shape {x.shape}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not mx.issubdtype(dtype, mx.floating):
        raise ValueError(f"dtype must be a floating-point dtype, got {dtype}")


def _orthogonalized(x: mx.array, method: str, steps: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    """The iteration as it is published, for wide and tall matrices."""
    _check(x, steps, dtype)
    unit = unit_frobenius(x.astype(mx.float32)).astype(dtype)
    tall = x.shape[-2] > x.shape[-1]
    unit = quintics(unit.swapaxes(-1, -2) if tall else unit, METHODS[method](steps))
    return (unit.swapaxes(-1, -2) if tall else unit).astype(x.dtype)


# The same with few passes over the matrix: several steps on its small Gram matrix.


def _on_gram_matrices(x: mx.array, table: list[Quintic], axis: int) -> tuple[mx.array, mx.array]:
    """Orthogonalize blocks that are long beside ``axis``, by polynomials of ``A = XXᵀ``.

    A group of steps is one product ``QX``. The norm of X is the root of A's trace.

    Returns:
        The blocks, and the sum of the squares of all blocks of a matrix: ``‖QX‖² = tr(QAQ)``.
    """
    gram = q = x
    for i, group in enumerate(_groups(table)):
        gram = x @ x.swapaxes(-1, -2) if axis == -2 else x.swapaxes(-1, -2) @ x
        unit, scale = gram, mx.array(1.0)
        if i == 0:
            n = gram.shape[-1]
            diagonal = gram.reshape(*gram.shape[:-2], n * n)[..., :: n + 1]
            scale = _inverse_root(mx.sum(diagonal, axis=-1)[..., None, None])
            unit = gram * mx.square(scale)
        q = _product_of_steps(unit, group, scale)
        x = q @ x if axis == -2 else x @ q
    q, gram = (a.reshape(*a.shape[:-3], 1, -1) for a in (q, gram @ q))
    return x, q @ gram.swapaxes(-1, -2)


def _groups(table: list[Quintic]) -> list[list[Quintic]]:
    """Steps for which one Gram matrix serves: the first two, then three at a time.

    Rounding leaves eigenvalues below zero, and each step multiplies them by a². After two steps
    the singular values are near enough to one another for three.
    """
    return [table[:2], *(table[i : i + 3] for i in range(2, len(table), 3))]


def _inverse_root(x: mx.array) -> mx.array:
    """``1 / √x``, and 1 where x is not a normal number: the matrix is zero then, or nearly."""
    return mx.rsqrt(mx.where(x >= SMALLEST_NORMAL, x, 1.0))


def _product_of_steps(gram: mx.array, group: list[Quintic], scale: mx.array) -> mx.array:
    """``scale`` times the product of the steps' ``P = aI + B``, ``B = bA + cA²``.

    All commute; A becomes PAP.
    """
    # Not an identity: mx.eye takes four kernels, and a compiled step keeps every constant.
    index = mx.array(np.arange(gram.shape[-1]))
    q = gram
    for i, (a, b, c) in enumerate(group):
        step = mx.addmm(gram, gram, gram, alpha=c, beta=b)
        if i == 0:
            q = scale * mx.where(index[:, None] == index, step + a, step)
        else:
            q = mx.addmm(q, step, q, beta=a)
        if i < len(group) - 1:
            gram = mx.addmm(gram, step, gram, beta=a)
            gram = mx.addmm(gram, step, gram, beta=a)
    return q


def muon_scale(rows: int, columns: int, scale: str | None) -> float:
    """Factor on an orthogonalized ``(rows, columns)`` matrix.

    ``None`` 1; ``"spectral"`` √max(1, rows/columns) (Keller Jordan); ``"rms"``
    0.2·√max(rows, columns), an RMS of 0.2 per update, about AdamW's (Moonshot, arXiv 2502.16982).
    """
    if scale == "spectral":
        return math.sqrt(max(1.0, rows / columns))
    if scale == "rms":
        return 0.2 * math.sqrt(max(rows, columns))
    return 1.0
