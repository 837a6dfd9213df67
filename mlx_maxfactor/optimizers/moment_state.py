"""Moments in an optimizer's state: factored statistics, and momentum in 4 to 32 bits."""

from collections.abc import Mapping
from typing import Any, Literal

import mlx.core as mx

from .. import functional as f
from .._validate import check_choice

StateDtype = Literal["float32", "bfloat16", "int8", "int4"] | mx.Dtype
"""Type of the option ``state_dtype``: a name, or the MLX dtype of that name."""

STATE_DTYPES = ("float32", "bfloat16", "int8", "int4")
BITS: dict[str, f.Bits] = {"int8": 8, "int4": 4}


def check_state_dtype(state_dtype: Any) -> str:
    """Return the dtype's name. Raise if a buffer cannot have it."""
    if isinstance(state_dtype, mx.Dtype):
        state_dtype = str(state_dtype).rpartition(".")[2]
    return check_choice("state_dtype", state_dtype, STATE_DTYPES)


def packed(state: dict[str, mx.array], dtype: str) -> dict[str, mx.array]:
    """A rule's state as it is kept: ``m`` in its dtype."""
    kept = dict(state)
    if "m" in kept:
        if dtype in BITS:
            kept["m"], kept["m_scale"] = f.quantize(kept["m"], BITS[dtype])
        else:
            kept["m"] = kept["m"].astype(getattr(mx, dtype))
    return kept


def unpacked(state: Mapping[str, mx.array], g: mx.array) -> dict[str, mx.array]:
    """The state that a rule is given, in float32. ``g``: the gradients, for the shape of ``m``."""
    read = {key: x for key, x in state.items() if key != "m_scale"}
    if "m" in read:
        read["m"] = _read(*_kept(state, g), g)
    return read


def momentum(
    g: mx.array, state: Mapping[str, mx.array], beta: float, gain: float, nesterov: bool
) -> tuple[mx.array, dict[str, mx.array]]:
    r"""``m ← βm + gain·g``, for a rule that takes its arguments as they are kept.

    Returns:
        m, or with Nesterov ``βm + gain·g`` of the new m; and what to keep. With β = 0 it is g.
    """
    g = mx.contiguous(g)  # a Linear's gradient is a transposed view, over which passes are slow
    if not beta:
        return f.as_gradient(g), {}
    # Two formulas of the old m, and of two views: each kernel reads g and m as they are kept, and
    # writes one array. MLX would merge equal views, and write float32 copies of both.
    m, in_few_bits = _kept(state, g)
    a, b = (beta**2, gain * (1 + beta)) if nesterov else (beta, gain)
    h = a * _read(m, in_few_bits, g) + b * f.as_gradient(g)
    m, g_flat = (x.reshape(len(g), -1) for x in (m, g))
    m = beta * _read(m, in_few_bits, g_flat) + gain * f.as_gradient(g_flat)
    return h, {"m": m.reshape(g.shape)}


def _kept(state: Mapping[str, mx.array], g: mx.array) -> tuple[mx.array, bool]:
    """The momentum in the dtype in which it is kept, or coded, and whether it has few bits."""
    scale = state.get("m_scale")
    m = state["m"] if scale is None else f.dequantize(state["m"], scale, g.shape)
    return m, scale is not None


def _read(m: mx.array, in_few_bits: bool, g: mx.array) -> mx.array:
    m = m.astype(mx.float32)
    return mx.where(g == 0, f.FORGOTTEN * m, m) if in_few_bits else m


def of_one(state: Mapping[str, mx.array], stack: bool) -> Mapping[str, mx.array]:
    """The state of one parameter: without the first axis, unless this counts its own matrices."""
    return state if stack else {key: x.squeeze(0) for key, x in state.items()}


def statistics(shape: tuple[int, ...]) -> dict[str, mx.array]:
    """Zero row and column statistics for matrices of this shape."""
    return {
        "row": mx.zeros((*shape[:-1], 1)),
        "column": mx.zeros((*shape[:-2], 1, shape[-1])),
    }


def count(shape: tuple[int, ...]) -> dict[str, mx.array]:
    """A count of each array's own updates, for bias correction."""
    return {"count": mx.zeros((shape[0],) + (1,) * (len(shape) - 1))}
