"""The nearest orthogonal matrix, by iterated polynomials."""

import math
from collections.abc import Callable
from typing import Literal

import mlx.core as mx

from .layouts import cut, filled
from .norms import fusion_barrier, unit_frobenius
from .symmetric import Symmetric, applied, gram_matrix, parts, product, quadratic

Quintic = tuple[float, float, float]

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Keller Jordan's quintic: slope 3.4445 at zero, values in about [0.7, 1.2] for large inputs."""

# Minimax quintics for singular values in [1e-3, 1], each fitted to what the one before it leaves
# (Amsel et al. 2025, arXiv 2505.16932, Algorithm 1). mlx_maxfactor/reference.py derives them.
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

LONG = 1.5
"""Sides' ratio above which steps are cheaper on the Gram matrix than on the matrix, by count."""

LEAST_GRAM = 64
"""Shorter side from which products cost more than operations, and the Gram matrix is carried on."""

BLOCK = 256
"""Least side of a block of a symmetric product: smaller ones cost more than they save."""

MOST_BLOCKS = 4
"""Along a side: they save 3/8 of a symmetric product; more, in more operations, save little."""


def newton_schulz(x: mx.array, steps: int = 5, dtype: mx.Dtype = mx.float32) -> mx.array:
    r"""Orthogonalize each matrix by Newton–Schulz iteration (Keller Jordan's quintic).

    With :math:`X_0 = G / \lVert G \rVert_F`, transposed if tall,

    .. math:: A = X X^\top, \qquad X \leftarrow aX + (bA + cA^2) X

    drives every singular value towards 1. It stops near, not at, 1: values land in about
    [0.7, 1.2]. In float32, with one side over 1.5 times the other, two or three steps at a time are
    taken on :math:`A` alone.

    Args:
        x: ``(..., m, n)``, any float dtype; leading axes are a batch.
        steps: Number of iterations. Default 5.
        dtype: Of the products; the norm is float32. Default float32; bfloat16 was not yet run on a
            GPU, where it would be faster.

    Returns:
        An array of the same shape and dtype; zero for a zero matrix.

    Raises:
        ValueError: ``x`` holds no float matrices, ``steps`` is below 1, or ``dtype`` is no float's.

    Example:
        >>> import mlx.core as mx
        >>> from mlx_maxfactor import newton_schulz
        >>> newton_schulz(mx.zeros((2, 3))).shape
        (2, 3)

    Reference:
        Keller Jordan et al., *Muon: An optimizer for hidden layers in neural networks*, 2024.
    """
    return _iterate_quintics(x, "newton_schulz", steps, dtype)


def polar_express(x: mx.array, steps: int = 5, dtype: mx.Dtype = mx.float32) -> mx.array:
    r"""Orthogonalize each matrix by the Polar Express: the best quintic at every step.

    The iteration of :func:`newton_schulz` with coefficients that are minimax optimal for what the
    steps before have left of [1e-3, 1], so that five steps come closer to orthogonal.

    Args:
        x: ``(..., m, n)``, any float dtype; leading axes are a batch.
        steps: Number of iterations. Default 5.
        dtype: Of the products, as for :func:`newton_schulz`.

    Returns:
        An array of the same shape and dtype; zero for a zero matrix.

    Raises:
        ValueError: ``x`` holds no float matrices, ``steps`` is below 1, or ``dtype`` is no float's.

    Example:
        >>> import mlx.core as mx
        >>> from mlx_maxfactor import polar_express
        >>> bool(mx.allclose(polar_express(mx.eye(3) * 5, steps=8), mx.eye(3), atol=1e-4))
        True

    Reference:
        Amsel, Persson, Musco and Gower, *The Polar Express*, 2025, arXiv 2505.16932.
    """
    return _iterate_quintics(x, "polar_express", steps, dtype)


def _newton_schulz_table(steps: int) -> list[Quintic]:
    return [NEWTON_SCHULZ] * steps


def _polar_express_table(steps: int) -> list[Quintic]:
    s = POLAR_EXPRESS_SAFETY
    slack = (s * s, *[s] * 6)  # the first shrinks X_0 as well
    rows = zip(POLAR_EXPRESS[:-1], slack, strict=True)
    table = [(a / t, b / t**3, c / t**5) for (a, b, c), t in rows]
    table += [POLAR_EXPRESS[-1]] * max(0, steps - len(table))
    return table[:steps]


Method = Literal["newton_schulz", "polar_express"]
METHODS = {"newton_schulz": _newton_schulz_table, "polar_express": _polar_express_table}
"""By name: from a number of steps to the quintic of each."""


def orthogonalize(
    x: mx.array,
    method: str | Callable[[mx.array], mx.array] = "newton_schulz",
    steps: int = 5,
    block: int | None = None,
) -> mx.array:
    """Orthogonalize each matrix, or each block of its rows by itself.

    Args:
        x: ``(..., m, n)``.
        method: A name in ``METHODS``, or a function of a batch of matrices ``(..., m, n)``.
        steps: Its iterations.
        block: Rows of a block, along the shorter side (columns of a tall matrix), all blocks in
            one batched product; the last may be smaller. None: the whole matrix.
    """
    if block is None or block >= min(x.shape[-2:]):
        return method(x) if callable(method) else _iterate_quintics(x, method, steps, mx.float32)
    tall = x.shape[-2] > x.shape[-1]
    axis = -1 if tall else -2
    # Rows of zeros fill the last block: they stay zero, and change nothing of the others.
    whole = filled(x.astype(mx.float32), axis, block)
    *batch, rows, columns = whole.shape
    if tall:
        blocks = mx.contiguous(whole.reshape(*batch, rows, -1, block).swapaxes(-2, -3))
    else:
        blocks = whole.reshape(*batch, -1, block, columns)
    if callable(method):
        blocks = method(blocks)
    else:
        blocks = _by_gram_matrices(blocks, METHODS[method](steps), axis)
    blocks = blocks.swapaxes(-2, -3) if tall else blocks
    return cut(blocks.reshape(whole.shape), axis, x.shape[axis]).astype(x.dtype)


def rows_apart(shape: tuple[int, ...], block: int | None = None) -> int:
    """Of how many places of the first axis a multiple is orthogonalized by itself.

    Those of a stack, or the rows of a block; 0: the whole alone, as where blocks are of columns.
    """
    rows, columns = shape[-2:]
    if len(shape) > 2:
        return 1
    return block if block is not None and block < rows <= columns else 0


def orthogonalization_flops(shape: tuple[int, ...], block: int | None = None) -> float:
    """About how many operations five steps take on matrices ``(..., m, n)``: those of products."""
    shorter, longer = sorted(shape[-2:])
    rows = shorter if block is None else min(block, shorter)
    # A step is two products of the matrix, 2·rows an element each, and one of its Gram matrix.
    return math.prod(shape) * 5 * (4 * rows + 2 * rows * rows / longer)


def _check(x: mx.array, steps: int, dtype: mx.Dtype) -> None:
    if not isinstance(x, mx.array):
        raise ValueError(f"x must be an array of MLX, got {type(x).__name__}")
    if x.ndim < 2 or x.size == 0 or not mx.issubdtype(x.dtype, mx.floating):
        raise ValueError(f"x must hold float matrices, got {x.dtype} of shape {x.shape}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not mx.issubdtype(dtype, mx.floating):
        raise ValueError(f"dtype must be a float's, got {dtype}")


def _iterate_quintics(x: mx.array, method: str, steps: int, dtype: mx.Dtype) -> mx.array:
    _check(x, steps, dtype)
    table = METHODS[method](steps)
    unit = unit_frobenius(x.astype(mx.float32)).astype(dtype)
    shorter, longer = sorted(x.shape[-2:])
    long = shorter >= LEAST_GRAM and longer > LONG * shorter
    # In bf16 no Gram matrix can be carried on: its rounding is 2^-9 of the largest eigenvalue.
    blocks = min(max(shorter // BLOCK, 1), MOST_BLOCKS) if _on_cpu() else 1
    if dtype == mx.float32 and (long or blocks > 1):
        groups = _grouped(table) if long else [[row] for row in table]
        return _by_symmetric_products(unit, groups, blocks).astype(x.dtype)

    tall = x.shape[-2] > x.shape[-1]
    unit = unit.swapaxes(-1, -2) if tall else unit
    for a, b, c in table:
        # Scaled within the products: aX by itself, rounded to bf16, costs four times the error.
        gram = unit @ unit.swapaxes(-1, -2)
        unit = mx.addmm(unit, mx.addmm(gram, gram, gram, alpha=c, beta=b), unit, beta=a)
    return (unit.swapaxes(-1, -2) if tall else unit).astype(x.dtype)


def _on_cpu() -> bool:
    # Small products fill a CPU; whether they fill a GPU was not measured.
    return mx.default_device() == mx.cpu


def _by_symmetric_products(x: mx.array, groups: list[list[Quintic]], blocks: int) -> mx.array:
    """The same, half of each symmetric product left out, a group of steps on a Gram matrix."""
    axis = -1 if x.shape[-2] > x.shape[-1] else -2
    slices = parts(x, axis, blocks)
    for group in groups:
        slices = applied(_multiplied_out(gram_matrix(slices, axis), group), slices, axis)
    return mx.concatenate(slices, axis) if len(slices) > 1 else slices[0]


def _grouped(table: list[Quintic]) -> list[list[Quintic]]:
    """Steps between which the Gram matrix is made anew: the first two, then three at a time.

    Rounding leaves eigenvalues below zero, and each step multiplies them by a², without end. After
    two steps the singular values are near enough to one another for three.
    """
    return [table[:2], *(table[i : i + 3] for i in range(2, len(table), 3))]


def _multiplied_out(gram: Symmetric, group: list[Quintic]) -> Symmetric:
    """The product of the steps' P = aI + bA + cA². All commute, so the next A is P²A."""
    result = step = quadratic(gram, *group[0])
    for coefficients in group[1:]:
        gram = product(step, product(step, gram))
        step = quadratic(gram, *coefficients)
        result = product(step, result)
    return result


def _by_gram_matrices(x: mx.array, table: list[Quintic], axis: int) -> mx.array:
    """Orthogonalize matrices that are long beside ``axis``: steps on small Gram matrices alone.

    ``P X`` with ``P`` a polynomial of ``A = X Xᵀ``: two products with X in place of two a step. The
    norm of X is the root of A's trace, and dividing by it is left to P.
    """
    x = x / _peak(x)  # the square of 1e25 or 1e-25 is not a float32
    norm = None
    for group in _carried(table):
        gram = x @ x.swapaxes(-1, -2) if axis == -2 else x.swapaxes(-1, -2) @ x
        if norm is None:
            norm = mx.sum(mx.diagonal(gram, axis1=-2, axis2=-1), axis=-1)[..., None, None]
            norm = mx.where(norm > 0, norm, 1.0)
            p = _polynomial(gram / norm, group) * mx.rsqrt(norm)
        else:
            p = _polynomial(gram, group)
        x = p @ x if axis == -2 else x @ p
    return x


def _peak(x: mx.array) -> mx.array:
    peak = mx.maximum(
        mx.max(x, axis=(-2, -1), keepdims=True), -mx.min(x, axis=(-2, -1), keepdims=True)
    )
    return fusion_barrier(mx.where(peak > 0, peak, 1.0))


def _carried(table: list[Quintic]) -> list[list[Quintic]]:
    """Steps for which one Gram matrix serves.

    Rounding leaves eigenvalues below zero, and each step multiplies them by a². Newton–Schulz's
    11.9 leaves five steps within 4e-5 of float64 at any condition number, in true float32; a GPU
    may multiply in fewer bits.
    """
    whole = _on_cpu() and len(table) <= 5 and all(row == NEWTON_SCHULZ for row in table)
    return [table] if whole else _grouped(table)


def _polynomial(gram: mx.array, group: list[Quintic]) -> mx.array:
    """The product of the steps' P = aI + bA + cA². All commute, so the next A is P²A."""
    return _multiplied_out([[gram]], group)[0][0]


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
