"""Run a model with a few of its layers: those that stand for all others of their kind.

The whole model is built, lazily, and the layers that are left out pass their input on. No config
is shortened, so what a config says of single layers needs no special case.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from ..engine.trees import flatten

MOST = 4
"""More kinds than these are merged: layers that differ in nothing but their sizes are one kind."""


def kinds_of(model: nn.Module) -> list[list[int]]:
    """The layers of each kind, the largest first. Layers of a kind do the same at the same size."""
    layers = cast(Any, model).layers
    for with_shapes in (True, False):
        found: dict[Any, list[int]] = defaultdict(list)
        for index, layer in enumerate(layers):
            found[_signature(layer, with_shapes)].append(index)
        if len(found) <= MOST:
            break
    sizes = sizes_of(model)
    return [sorted(kind, key=lambda i: -sizes[i]) for kind in found.values()]


def _signature(layer: nn.Module, with_shapes: bool) -> Any:
    arrays = flatten(layer.parameters()).items()
    flags = [
        (path, type(module).__name__, key, value)
        for path, module in layer.named_modules()
        for key, value in (("", ""), *vars(module).items())
        if isinstance(value, bool | str)
    ]
    shapes = [(path, x.dtype, x.shape if with_shapes else x.ndim) for path, x in arrays]
    return tuple(sorted(map(str, (*flags, *shapes))))


@dataclass(frozen=True)
class Plan:
    """What to measure, and how the whole model's step follows from it.

    Attributes:
        kinds: The layers of each kind.
        kept: The layers that are kept in each measurement.
        weights: The step is the sum of the measured ones, weighted by these.
    """

    kinds: Sequence[Sequence[int]]
    kept: Sequence[Sequence[int]]
    weights: Sequence[float]


def plan_of(model: nn.Module, trained: int, checkpointed: bool, more: bool) -> Plan:
    """Measure a few trained layers of each kind, then each kind with further ones.

    Args:
        model: The model, before adapters.
        trained: How many of the last layers are trained.
        checkpointed: With gradient checkpointing a second layer adds more than a third one does,
            so where there is one kind, several are added together.
        more: Measure more layers than needed: an error of the difference counts less.
    """
    kinds, sizes = kinds_of(model), sizes_of(model)
    members = [[i for i in kind if i >= len(sizes) - trained] for kind in kinds]
    trained_kinds = [pair for pair in zip(kinds, members, strict=True) if pair[1]]
    single = len(trained_kinds) == 1
    first = 2 if more and single and trained > 2 else 1
    extras = (1 + (single and checkpointed)) * (2 if more else 1)
    base = [i for kind, _ in trained_kinds for i in kind[:first]]
    kept, weights = [base], [1.0]
    for kind, counted in trained_kinds:
        extra = kind[first : first + extras]
        further = sum(sizes[i] for i in counted) - sum(sizes[i] for i in kind[:first])
        if extra and further > 0:
            kept.append([*base, *extra])
            weights.append(further / sum(sizes[i] for i in extra))
    weights[0] -= sum(weights[1:])
    return Plan(kinds, kept, weights)


def whole(model: nn.Module) -> Plan:
    """Measure every layer, where a model does not run without some of them."""
    every = range(len(cast(Any, model).layers))
    return Plan([[i] for i in every], [every], [1.0])


def sizes_of(model: nn.Module) -> list[int]:
    """Parameters of each layer."""
    layers = cast(Any, model).layers
    return [sum(x.size for x in flatten(layer.parameters()).values()) for layer in layers]


def keep_layers(model: nn.Module, kept: Collection[int], kinds: Sequence[Sequence[int]]) -> None:
    """Let the other layers pass their input on, without parameters.

    What a layer returns besides, such as keys and values for later layers, is what the last layer
    of its kind returned.
    """
    last: dict[int, Any] = {}
    numbers = {index: number for number, kind in enumerate(kinds) for index in kind}
    for index, layer in enumerate(cast(Any, model).layers):
        if index not in kept:
            layer.update(tree_map(lambda x: mx.zeros((1,) * x.ndim, x.dtype), layer.parameters()))
            layer.freeze()
        call = _call(type(layer), numbers[index], last, index in kept)
        layer.__class__ = type(type(layer).__name__, (type(layer),), {"__call__": call})


def _call(kind: type, number: int, last: dict[int, Any], kept: bool) -> Callable[..., Any]:
    def run(layer: Any, *args: Any, **kwargs: Any) -> Any:
        last[number] = kind.__call__(layer, *args, **kwargs)
        return last[number]

    def skip(_: Any, *args: Any, **kwargs: Any) -> Any:
        x = next(a for a in (*args, *kwargs.values()) if isinstance(a, mx.array))
        out = last.get(number)
        return (x, *out[1:]) if isinstance(out, tuple) else x

    return run if kept else skip
