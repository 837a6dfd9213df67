"""Gradients of micro-batches, summed so that unequal ones weigh what they should."""

from typing import Any

import mlx.core as mx
from mlx.utils import tree_map


def accumulate_gradients(
    gradients: Any, weight: mx.array | float, total: dict[str, Any] | None = None
) -> dict[str, Any]:
    r"""Add the gradients of one micro-batch, times its weight, to a sum in float32.

    If each loss is a mean over :math:`n_i` tokens, the gradient of the mean over all of them is
    :math:`\sum_i n_i g_i / \sum_i n_i`; the plain mean of the :math:`g_i` is not.

    Args:
        gradients: Of the mean loss of the micro-batch.
        weight: What the mean was over, the number of tokens that counted.
        total: What this function returned for the micro-batch before; None for the first.

    Returns:
        The sum, a tree of arrays: a compiled step may take and return it.

    Example:
        >>> import mlx.core as mx
        >>> from mlx_maxfactor import accumulate_gradients, averaged_gradients
        >>> total = accumulate_gradients({"b": mx.array([1.0])}, 3)
        >>> total = accumulate_gradients({"b": mx.array([5.0])}, 1, total)
        >>> averaged_gradients(total)["b"]
        array([2], dtype=float32)
    """
    weight = mx.array(weight).astype(mx.float32)
    weighted = tree_map(lambda g: g.astype(mx.float32) * weight, gradients)
    if total is None:
        return {"gradients": weighted, "weight": weight}
    return {
        "gradients": tree_map(mx.add, weighted, total["gradients"]),
        "weight": total["weight"] + weight,
    }


def averaged_gradients(total: dict[str, Any]) -> Any:
    """The gradient of the mean over everything that was accumulated; zero if that is nothing."""
    weight = mx.maximum(total["weight"], 1e-30)
    return tree_map(lambda g: g / weight, total["gradients"])
