"""Moments in an optimizer's state: factored statistics, and momentum in few or many bits."""

import math
from typing import Any, Literal

import mlx.core as mx

from .. import functional as f
from .._validate import got

StateDtype = Literal["float32", "bfloat16", "int8", "int4"] | mx.Dtype
"""What the option ``state_dtype`` takes: a name, or a dtype of MLX with that name."""

STATE_DTYPES = ("float32", "bfloat16", "int8", "int4")
BITS: dict[str, f.Bits] = {"int8": 8, "int4": 4}


def check_state_dtype(state_dtype: Any) -> str:
    """The name of the dtype, if a buffer may have it."""
    name = state_dtype
    if isinstance(state_dtype, mx.Dtype):
        name = str(state_dtype).rpartition(".")[2]
    if not isinstance(name, str) or name not in STATE_DTYPES:
        listed = ", ".join(map(repr, STATE_DTYPES))
        raise ValueError(f"state_dtype must be one of {listed}, {got(name, STATE_DTYPES)}")
    return name


def init_factored(state: dict, shape: tuple[int, ...]) -> None:
    """Add row and column statistics of zeros for matrices of this shape."""
    state["row"] = mx.zeros((*shape[:-1], 1))
    state["column"] = mx.zeros((*shape[:-2], 1, shape[-1]))


def init_momentum(state: dict, shape: tuple[int, ...], dtype: str) -> None:
    """Give a parameter a buffer of zeros: ``m``, and in few bits ``m_scale``."""
    if dtype in BITS:
        state["m"], state["m_scale"] = f.quantize(mx.zeros(shape), BITS[dtype])
    else:
        state["m"] = mx.zeros(shape, getattr(mx, dtype))


def aligned_to_groups(rows: int, shape: tuple[int, ...], dtype: str) -> int:
    """Rows after which a parameter can be cut, and its buffer too: in few bits between groups."""
    return math.lcm(rows, f.rows_of_groups(shape)) if dtype in BITS else rows


def read_momentum(state: dict, shape: tuple[int, ...]) -> mx.array:
    """The buffer in float32."""
    if "m_scale" in state:
        return f.dequantize(state["m"], state["m_scale"], shape)
    return state["m"].astype(mx.float32)


def write_momentum(m: mx.array, state: dict, decay: float) -> mx.array:
    """Keep a float32 buffer, which is ``decay`` times the one that was read, and a gradient.

    Returns:
        The buffer to go on with, not yet rounded.
    """
    if "m_scale" in state:
        bits = 4 if state["m"].dtype == mx.uint8 else 8
        state["m"], state["m_scale"] = f.quantize(m, bits, decay)
    else:
        state["m"] = m.astype(state["m"].dtype)
    return state["m"] if state["m"].dtype == mx.float32 else m
