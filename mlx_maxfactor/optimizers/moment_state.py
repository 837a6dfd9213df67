"""Moments in an optimizer's state: factored statistics, and momentum in 4 to 32 bits."""

import math
from typing import Any, Literal

import mlx.core as mx

from .. import functional as f
from .._validate import got

StateDtype = Literal["float32", "bfloat16", "int8", "int4"] | mx.Dtype
"""Type of the option ``state_dtype``: a name, or the MLX dtype of that name."""

STATE_DTYPES = ("float32", "bfloat16", "int8", "int4")
BITS: dict[str, f.Bits] = {"int8": 8, "int4": 4}


def check_state_dtype(state_dtype: Any) -> str:
    """Return the dtype's name. Raise if a buffer cannot have it."""
    name = state_dtype
    if isinstance(state_dtype, mx.Dtype):
        name = str(state_dtype).rpartition(".")[2]
    if not isinstance(name, str) or name not in STATE_DTYPES:
        listed = ", ".join(map(repr, STATE_DTYPES))
        raise ValueError(f"state_dtype must be one of {listed}, {got(name, STATE_DTYPES)}")
    return name


def init_factored(state: dict, shape: tuple[int, ...]) -> None:
    """Add zero row and column statistics for matrices of this shape."""
    state["row"] = mx.zeros((*shape[:-1], 1))
    state["column"] = mx.zeros((*shape[:-2], 1, shape[-1]))


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
