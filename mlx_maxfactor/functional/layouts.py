"""Arrays as the matrices they hold."""

import math
from typing import Literal, get_args

import mlx.core as mx

Layout = Literal["batched", "experts", "conv"]
LAYOUTS = get_args(Layout)
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


def input_axis_shape(shape: tuple[int, ...], layout: str) -> tuple[int, ...]:
    """Shape with the input axis last: a convolution's before its kernel is flattened into it."""
    if layout == "conv" and len(shape) > 2:
        return (math.prod(shape[:-1]), shape[-1])
    if layout == "transposed" and len(shape) > 1:
        return (*shape[:-2], shape[-1], shape[-2])
    return shape


def norm_axes(ndim: int, layout: str) -> tuple[int, int] | None:
    """The axes that a norm spans: each matrix by itself for experts, else the whole array."""
    return (-2, -1) if layout == "experts" and ndim > 2 else None


def filled(x: mx.array, axis: int, multiple: int) -> mx.array:
    """Zeros at the end of an axis, until its length is a multiple."""
    shape = list(x.shape)
    shape[axis] = -shape[axis] % multiple
    return mx.concatenate([x, mx.zeros(shape, x.dtype)], axis) if shape[axis] else x


def cut(x: mx.array, axis: int, length: int) -> mx.array:
    """The first ``length`` places of an axis: what :func:`filled` was given."""
    # By take: a slice and a pad cannot be compiled shapeless.
    return x if x.shape[axis] == length else mx.take(x, mx.arange(length), axis)
