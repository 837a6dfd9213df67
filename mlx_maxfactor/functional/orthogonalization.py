"""The nearest orthogonal matrix, by iterated polynomials."""

import math

import mlx.core as mx

from .layouts import cut, filled
from .norms import unit_frobenius

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Keller Jordan's quintic: slope 3.4445 at zero, values in about [0.7, 1.2] for large inputs."""

# Minimax quintics for singular values in [1e-3, 1], each fitted to what the one before it leaves
# (Amsel et al. 2025, arXiv 2505.16932, Algorithm 1). tests/reference.py derives them.
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


def newton_schulz(x: mx.array, steps: int = 5) -> mx.array:
    r"""Orthogonalize each matrix by Newton–Schulz iteration (Keller Jordan's quintic).

    With :math:`X_0 = G / \lVert G \rVert_F`, transposed if tall,

    .. math:: A = X X^\top, \qquad X \leftarrow aX + (bA + cA^2) X

    drives every singular value towards 1. It stops near, not at, 1: values land in about
    [0.7, 1.2].

    Args:
        x: ``(..., m, n)``, any float dtype; leading axes are a batch.
        steps: Number of iterations. Default 5.

    Returns:
        An array of the same shape and dtype; zero for a zero matrix.

    Raises:
        ValueError: ``x`` holds no float matrices, or ``steps`` is below 1.

    Example:
        >>> import mlx.core as mx
        >>> from mlx_maxfactor import newton_schulz
        >>> newton_schulz(mx.zeros((2, 3))).shape
        (2, 3)

    Reference:
        Keller Jordan et al., *Muon: An optimizer for hidden layers in neural networks*, 2024.
    """
    _check_matrices(x, steps)
    unit = unit_frobenius(x.astype(mx.float32))
    return _iterate_quintics(unit, [NEWTON_SCHULZ] * steps).astype(x.dtype)


def polar_express(x: mx.array, steps: int = 5) -> mx.array:
    r"""Orthogonalize each matrix by the Polar Express: the best quintic at every step.

    The iteration of :func:`newton_schulz` with coefficients that are minimax optimal for what the
    steps before have left of [1e-3, 1], so that five steps come closer to orthogonal.

    Args:
        x: ``(..., m, n)``, any float dtype; leading axes are a batch.
        steps: Number of iterations. Default 5.

    Returns:
        An array of the same shape and dtype; zero for a zero matrix.

    Raises:
        ValueError: ``x`` holds no float matrices, or ``steps`` is below 1.

    Example:
        >>> import mlx.core as mx
        >>> from mlx_maxfactor import polar_express
        >>> bool(mx.allclose(polar_express(mx.eye(3) * 5, steps=8), mx.eye(3), atol=1e-4))
        True

    Reference:
        Amsel, Persson, Musco and Gower, *The Polar Express*, 2025, arXiv 2505.16932.
    """
    _check_matrices(x, steps)
    s = POLAR_EXPRESS_SAFETY
    table = [(a / s, b / s**3, c / s**5) for a, b, c in POLAR_EXPRESS[:-1]]
    table += [POLAR_EXPRESS[-1]] * max(0, steps - len(table))
    unit = unit_frobenius(x.astype(mx.float32)) / s
    return _iterate_quintics(unit, table[:steps]).astype(x.dtype)


METHODS = {"newton_schulz": newton_schulz, "polar_express": polar_express}
"""What orthogonalizes, by name."""


def orthogonalize(
    x: mx.array, method: str = "newton_schulz", steps: int = 5, block: int | None = None
) -> mx.array:
    """Orthogonalize each matrix, or each block of its rows by itself.

    Args:
        x: ``(..., m, n)``.
        method: A name in ``METHODS``.
        steps: Its iterations.
        block: Rows of a block, along the shorter side (columns of a tall matrix), all blocks in
            one batched product; the last may be smaller. None: the whole matrix.
    """
    if block is None or block >= min(x.shape[-2:]):
        return METHODS[method](x, steps)
    tall = x.shape[-2] > x.shape[-1]
    wide = x.swapaxes(-1, -2) if tall else x
    *batch, rows, columns = wide.shape
    # Rows of zeros fill the last block: they stay zero, and change nothing of the others.
    whole = filled(wide, -2, block)
    blocks = METHODS[method](whole.reshape(*batch, -1, block, columns), steps)
    wide = cut(blocks.reshape(whole.shape), -2, rows)
    return wide.swapaxes(-1, -2) if tall else wide


def _check_matrices(x: mx.array, steps: int) -> None:
    if x.ndim < 2 or x.size == 0 or not mx.issubdtype(x.dtype, mx.floating):
        raise ValueError(f"x must hold float matrices, got {x.dtype} of shape {x.shape}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")


def _iterate_quintics(x: mx.array, table: list[tuple[float, float, float]]) -> mx.array:
    tall = x.shape[-2] > x.shape[-1]
    x = x.swapaxes(-1, -2) if tall else x
    for a, b, c in table:
        gram = x @ x.swapaxes(-1, -2)
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.swapaxes(-1, -2) if tall else x


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
