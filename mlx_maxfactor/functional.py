"""Every formula of the suite, as a pure function of float32 arrays.

Notation: ``g`` gradient, ``p`` parameter, ``R`` and ``C`` row and column statistics, ``V`` second
moment, ``u`` update. Nothing here changes an array it was given, and nothing here knows a class.
"""

import math

import mlx.core as mx

GRADIENT_LIMIT = 1e15
"""Largest magnitude a gradient keeps: its square, 1e30, can still be summed in float32."""

ROOT_FLOOR = 1e-20
"""Least divisor of an update: a gradient at the limit divided by it, 1e35, is still finite."""

LEAST_SHARE = 1e-3
"""Least share of kept elements that a cautious step divides by (as its authors' code does)."""


# Arrays as matrices

LAYOUTS = ("batched", "experts", "conv")
"""How an array of more than two axes holds matrices. An array alone cannot say which it is.

- ``batched``: the last two axes are matrices; norms span the whole array.
- ``experts``: the same matrices, each with norms of its own.
- ``conv``: ``(out, k..., in)``, one matrix ``(out, k... * in)``.

The router also uses ``transposed``: a matrix stored as ``(in, out)``, as LoRALinear stores its two.
"""


def as_matrices(x: mx.array, layout: str) -> mx.array:
    """View an array as the matrices it holds. Arrays without matrices come back as they are."""
    if layout == "conv" and x.ndim > 2:
        return x.reshape(x.shape[0], -1)
    if layout == "transposed" and x.ndim > 1:
        return x.swapaxes(-1, -2)
    return x


def from_matrices(x: mx.array, shape: tuple[int, ...], layout: str) -> mx.array:
    """Undo :func:`as_matrices`: the array of the given shape that ``x`` was a view of."""
    return x.swapaxes(-1, -2) if layout == "transposed" and x.ndim > 1 else x.reshape(shape)


def norm_axes(ndim: int, layout: str) -> tuple[int, int] | None:
    """The axes that a norm spans: each matrix by itself for experts, else the whole array."""
    return (-2, -1) if layout == "experts" and ndim > 2 else None


def hoist(x: mx.array) -> mx.array:
    """Compute a number, or one number a row, apart from the full-size array it will meet.

    ``mx.compile`` fuses through broadcasts and would compute it again for every element; it does
    not fuse a copy.
    """
    return mx.contiguous(x)


# Rounding

BITS_DROPPED = {mx.bfloat16: 16, mx.float16: 13}
"""Mantissa bits of float32 that the dtype lacks."""


def stochastic_round(x: mx.array, dtype: mx.Dtype, key: mx.array) -> mx.array:
    """Round float32 to bf16 or fp16, up or down with probability by nearness: unbiased.

    Random bits are added below the last bit that stays, and what is below it is cut off. Beyond the
    range of the dtype, and for inf and NaN, rounding is to nearest.
    """
    dropped = BITS_DROPPED[dtype]
    noise = mx.random.randint(0, 1 << dropped, x.shape, mx.uint32, key)
    kept = 0xFFFFFFFF << dropped & 0xFFFFFFFF
    rounded = ((x.view(mx.uint32) + noise) & kept).view(mx.float32)
    if dtype == mx.float16:
        # Below 2^-14 fp16 has one spacing, 2^-24, and float32 many.
        least = 2.0**-24
        steps = mx.floor(x / least + noise.astype(mx.float32) / (1 << dropped))
        rounded = mx.where(mx.abs(x) < 2.0**-14, steps * least, rounded)
    inside = mx.abs(x) <= mx.finfo(dtype).max
    return mx.where(inside, rounded, x).astype(dtype)


# Norms


def clamp_gradient(gradient: mx.array) -> mx.array:
    """Clamp to ±1e15, so that the square of any finite gradient is finite in float32."""
    return mx.clip(gradient, -GRADIENT_LIMIT, GRADIENT_LIMIT)


def rms(x: mx.array, axes: tuple[int, ...] | None = None) -> mx.array:
    """Root mean square ``‖x‖₂ / √size`` over the axes, which are kept with length one."""
    return mx.sqrt(mx.mean(mx.square(x), axis=axes, keepdims=True))


def unit_frobenius(x: mx.array) -> mx.array:
    """Divide each matrix by its Frobenius norm; a zero matrix stays zero."""
    # Scaled by its largest magnitude first: the square of 1e25 or 1e-25 is not a float32.
    peak = mx.max(mx.abs(x), axis=(-2, -1), keepdims=True)
    x = x / mx.where(peak > 0, peak, 1.0)
    norm = mx.sqrt(mx.sum(mx.square(x), axis=(-2, -1), keepdims=True))
    return x / mx.where(norm > 0, norm, 1.0)


def scaled_global_norm(arrays: list[mx.array]) -> tuple[mx.array, mx.array]:
    """The norm of all arrays as a product of two numbers, largest magnitude and what remains.

    The norm of finite gradients may itself be beyond float32; the second number never is, unless
    an element is not finite.
    """
    arrays = [x.astype(mx.float32) for x in arrays if x.size]
    peaks = [mx.max(mx.abs(x)) for x in arrays]
    peak = mx.max(mx.stack(peaks)) if peaks else mx.array(1.0)
    peak = hoist(mx.where((peak > 0) & mx.isfinite(peak), peak, 1.0))
    squares = [mx.sum(mx.square(x / peak)) for x in arrays]
    return peak, mx.sqrt(mx.sum(mx.stack(squares))) if squares else mx.array(0.0)


# Second moments


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
    square = mx.square(gradient)
    row_mean = mx.mean(square, axis=-1, keepdims=True) + eps
    column_mean = mx.mean(square, axis=-2, keepdims=True) + eps
    return row + weight * (row_mean - row), column + weight * (column_mean - column)


def factored_root(row: mx.array, column: mx.array, divisor: mx.array | float) -> mx.array:
    """``√V`` of the rank-one estimate ``V = (R / divisor) · C``.

    A product of two roots, because the product itself can leave the range of float32.
    """
    return hoist(mx.sqrt(row / divisor)) * hoist(mx.sqrt(column))


def gathered_weight(beta: float, t: mx.array) -> mx.array:
    """``1 - β^t``, the weight that a moving average started at zero has gathered."""
    # Through expm1: in float32 the difference 1 - 0.999 is off by 6e-5 of itself.
    return -mx.expm1(t * math.log(beta)) if beta else mx.ones_like(t)


# Steps


def row_max(u: mx.array) -> mx.array:
    """Largest magnitude in each row (last axis), kept as an axis of length one."""
    return mx.max(mx.abs(u), axis=-1, keepdims=True) if u.ndim else mx.abs(u)


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


def cautious(step: mx.array, gradient: mx.array, axes: tuple[int, ...] | None = None) -> mx.array:
    """Keep the elements of a step that agree in sign with the gradient, over the share kept.

    Liang et al. 2024, arXiv 2411.16085. The share is at least 1e-3.
    """
    agrees = (mx.sign(step) * mx.sign(gradient) > 0).astype(step.dtype)
    share = mx.mean(agrees, axis=axes, keepdims=True)
    return step * agrees / mx.maximum(share, LEAST_SHARE)


# Orthogonalization

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
