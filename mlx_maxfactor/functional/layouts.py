"""View arrays as the matrices they hold."""

import math
from collections.abc import Mapping
from typing import Literal, get_args

import mlx.core as mx

Layout = Literal["batched", "experts", "conv", "transposed"]
LAYOUTS = get_args(Layout)
"""How an array holds matrices. The shape alone does not tell.

- ``batched``: the last two axes are a matrix; norms of MaxFactor and Adafactor span the array.
- ``experts``: as ``batched``, but each matrix has its own norms.
- ``conv``: ``(out, k..., in)``, one matrix ``(out, k... * in)``. ``conv/4`` is a convolution with 4
  groups: one such matrix for each, with its own norms. The router writes the number.
- ``transposed``: a matrix stored as ``(in, out)``, like the two of LoRALinear.
"""


def is_stack(shape: tuple[int, ...], layout: str) -> bool:
    """Whether an array holds several matrices that are updated by themselves."""
    return len(shape) > 2 and (layout == "experts" or "/" in layout)


def as_items(x: mx.array, layout: str) -> mx.array:
    """View an array as the independent arrays that it holds, along a new or the first axis."""
    name, _, groups = layout.partition("/")
    if name == "conv" and x.ndim > 2:
        count = int(groups or 1)
        return x.reshape(count, x.shape[0] // count, -1)
    if layout == "transposed" and x.ndim > 1:
        x = x.swapaxes(-1, -2)
    return x.reshape(-1, *x.shape[-2:]) if is_stack(x.shape, layout) else mx.expand_dims(x, 0)


def from_items(x: mx.array, shape: tuple[int, ...], layout: str) -> mx.array:
    """Undo :func:`as_items`: the arrays of the original shape, ``(k, *shape)``."""
    if layout == "transposed" and len(shape) > 1:
        # In rows, as a checkpoint loads them: with a view, products would round differently.
        x = mx.contiguous(x.swapaxes(-1, -2))
    return x.reshape(-1, *shape)


def of_one(state: Mapping[str, mx.array], stack: bool) -> Mapping[str, mx.array]:
    """The state of one parameter: without the first axis, unless this counts its own matrices."""
    return state if stack else {key: x.squeeze(0) for key, x in state.items()}


def items_shape(shape: tuple[int, ...], layout: str) -> tuple[int, ...]:
    """The shape of :func:`as_items` for an array of this shape."""
    return as_items(mx.zeros(shape), layout).shape  # never evaluated


def input_axis_shape(shape: tuple[int, ...], layout: str) -> tuple[int, ...]:
    """The shape with the input axis last. For ``conv``, the kernel axes join the output axis."""
    if layout.startswith("conv") and len(shape) > 2:
        return (math.prod(shape[:-1]), shape[-1])
    if layout == "transposed" and len(shape) > 1:
        return (*shape[:-2], shape[-1], shape[-2])
    return shape


def pad(x: mx.array, axis: int, multiple: int) -> mx.array:
    """Pad the end of an axis with zeros, up to the next multiple of ``multiple``."""
    shape = list(x.shape)
    shape[axis] = -shape[axis] % multiple
    return mx.concatenate([x, mx.zeros(shape, x.dtype)], axis) if shape[axis] else x


def crop(x: mx.array, axis: int, length: int) -> mx.array:
    """Undo :func:`pad`: keep the first ``length`` elements of an axis."""
    return x if x.shape[axis] == length else mx.split(x, [length], axis)[0]
