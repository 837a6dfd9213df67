"""Moments in an optimizer's state: factored statistics, and momentum in 4 to 32 bits."""

import math
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


def init_second_moment(state: dict, shape: tuple[int, ...], *, factored: bool) -> None:
    """Add zero row and column statistics for matrices of this shape, or else a full ``v``."""
    if factored:
        state["row"] = mx.zeros((*shape[:-1], 1))
        state["column"] = mx.zeros((*shape[:-2], 1, shape[-1]))
    else:
        state["v"] = mx.zeros(shape)


def update_statistics(
    g: mx.array, state: dict, weight: mx.array, eps: float = 0.0
) -> tuple[mx.array, mx.array]:
    """Mix a gradient into the row and column statistics with this weight. Return both."""
    row, column = f.factored_second_moment(g, state["row"], state["column"], weight, eps)
    state["row"], state["column"] = row, column
    return row, column


def init_momentum(state: dict, shape: tuple[int, ...], dtype: str) -> None:
    """Add a buffer of zeros ``m``, and ``m_scale`` for "int8" and "int4"."""
    if dtype in BITS:
        state["m"], state["m_scale"] = f.quantize(mx.zeros(shape), BITS[dtype])
    else:
        state["m"] = mx.zeros(shape, getattr(mx, dtype))


def aligned_to_groups(rows: int, shape: tuple[int, ...], dtype: str) -> int:
    """The row granularity, raised if needed so that cuts fall between groups of the buffer."""
    return math.lcm(rows, f.rows_of_groups(shape)) if dtype in BITS else rows


def read_momentum(state: dict, shape: tuple[int, ...]) -> mx.array:
    """Return the buffer in float32."""
    if "m_scale" in state:
        return f.dequantize(state["m"], state["m_scale"], shape)
    return state["m"].astype(mx.float32)


def write_momentum(m: mx.array, state: dict, decay: float) -> mx.array:
    """Store a float32 buffer: ``decay`` times the buffer that was read, plus a gradient.

    Returns:
        The buffer before rounding, for use in this update.
    """
    if "m_scale" in state:
        bits = 4 if state["m"].dtype == mx.uint8 else 8
        state["m"], state["m_scale"] = f.quantize(m, bits, decay)
    else:
        state["m"] = m.astype(state["m"].dtype)
    return state["m"] if state["m"].dtype == mx.float32 else m


def with_momentum(x: mx.array, state: dict, decay: float, nesterov: bool) -> mx.array:
    """Update the momentum ``m ← decay · m + x`` and return it.

    Nesterov: return ``decay · m + x`` of the new m. With a decay of zero there is no buffer.
    """
    if not decay:
        return x
    m = write_momentum(decay * read_momentum(state, x.shape) + x, state, decay)
    return decay * m + x if nesterov else m
