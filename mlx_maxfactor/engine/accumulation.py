"""Gradients of micro-batches of unequal size, averaged with the right weights."""

from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

from .._validate import check_number, got


def accumulate_gradients(
    gradients: Any, weight: mx.array | float, total: dict[str, Any] | None = None
) -> dict[str, Any]:
    r"""Add the gradients of one micro-batch, times its weight, to a sum in float32.

    If each loss is a mean over :math:`n_i` tokens, the gradient of the mean over all of them is
    :math:`\sum_i n_i g_i / \sum_i n_i`; the plain mean of the :math:`g_i` is not.

    Args:
        gradients: Gradients of the mean loss of the micro-batch. A gradient that is missing in one
            micro-batch counts as zero.
        weight: Number of tokens in that mean. Weight 0 adds nothing, even if the gradients are NaN,
            as those of a mean over nothing are.
        total: The result for the micro-batch before. None for the first one.

    Returns:
        The sum, a tree of arrays: a compiled step may take and return it.

    Raises:
        ValueError: ``weight`` is not one number, or a Python number below 0 or not finite.

    Example:
        >>> import mlx.core as mx
        >>> from mlx_maxfactor import accumulate_gradients, averaged_gradients
        >>> total = accumulate_gradients({"b": mx.array([1.0])}, 3)
        >>> total = accumulate_gradients({"b": mx.array([5.0])}, 1, total)
        >>> averaged_gradients(total)["b"]
        array([2], dtype=float32)
    """
    if not hasattr(weight, "shape"):
        weight = check_number("weight", weight, 0.0)
    weight = mx.array(weight).astype(mx.float32)
    if weight.size != 1:
        raise ValueError(f"weight must be one number, got an array of shape {weight.shape}")
    weight = weight.reshape(())
    weighted = tree_map(
        lambda g: mx.where(weight > 0, g.astype(mx.float32) * weight, 0.0), gradients
    )
    added = {"gradients": weighted, "weight": weight}
    return added if total is None else _sum(added, total)


def _sum(a: Any, b: Any) -> Any:
    """The sum of two trees, with every leaf that either has."""
    if isinstance(a, dict) and isinstance(b, dict):
        return {k: _sum(a[k], b[k]) if k in a and k in b else a.get(k, b.get(k)) for k in a | b}
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        short, long = sorted((list(a), list(b)), key=len)
        return [*map(_sum, short, long), *long[len(short) :]]
    return a + b


def averaged_gradients(total: dict[str, Any]) -> Any:
    """The gradient of the mean over all accumulated tokens. Zero if there are none.

    Raises:
        ValueError: ``total`` is not what :func:`accumulate_gradients` returns.
    """
    if not isinstance(total, dict) or total.keys() != {"gradients", "weight"}:
        raise ValueError(f"total must be what accumulate_gradients returned, {got(total, ())}")
    weight = mx.maximum(total["weight"], 1e-30)
    return tree_map(lambda g: g / weight, total["gradients"])
