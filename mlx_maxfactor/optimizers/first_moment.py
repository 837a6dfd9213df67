"""The first moment ``m``, in float32, bf16 or 8 bits, of every optimizer that keeps one."""

import math

import mlx.core as mx

from .. import functional as f
from .._validate import check_choice
from ._base import Float32Optimizer

STATE_DTYPES = (mx.float32, mx.bfloat16, mx.int8)


def check_state_dtype(state_dtype: mx.Dtype, momentum: object = True) -> mx.Dtype:
    """The dtype, if it is one that a buffer may have and there is a buffer."""
    check_choice("state_dtype", state_dtype, STATE_DTYPES)
    if state_dtype != mx.float32 and not momentum:
        raise ValueError(
            f"state_dtype={state_dtype} is of the momentum buffer, and there is none: give "
            f"momentum in (0, 1), got momentum={momentum!r}"
        )
    return state_dtype


def init_momentum(
    optimizer: Float32Optimizer, state: dict, shape: tuple[int, ...], dtype: mx.Dtype
) -> None:
    """Give a parameter a buffer of zeros: ``m``, and in 8 bits scales and a key to round with."""
    state["m"] = mx.zeros(shape, dtype)
    if dtype == mx.int8:
        state["m_scale"] = mx.zeros(f.scales(state["m"].size))
        optimizer.add_key(state)


def cuts_beside_momentum(cuts: int, shape: tuple[int, ...], dtype: mx.Dtype) -> int:
    """Rows after which a parameter can be cut, and its buffer: in 8 bits between two blocks."""
    return math.lcm(cuts, f.rows_of_blocks(shape)) if dtype == mx.int8 else cuts


def read_momentum(state: dict) -> mx.array:
    """The buffer in float32."""
    if "m_scale" in state:
        return f.dequantize(state["m"], state["m_scale"])
    return state["m"].astype(mx.float32)


def write_momentum(m: mx.array, state: dict, part: f.Part | None = None) -> mx.array:
    """Keep a float32 buffer; 8 bits are rounded by chance, with the parameter's own key.

    Returns:
        The buffer to go on with, not yet rounded.
    """
    if "m_scale" in state:
        state["key"], key = mx.random.split(state["key"])
        state["m"], state["m_scale"] = f.quantize(m, key, part)
    else:
        state["m"] = m.astype(state["m"].dtype)
    return state["m"] if state["m"].dtype == mx.float32 else m
