"""Trees of arrays, as models, gradients and states are: paths and leaves."""

from collections.abc import Callable, Iterable, Iterator
from itertools import zip_longest
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten


def flatten(tree: Any) -> dict[str, mx.array]:
    """The arrays of a tree by path."""
    return dict(cast(list[tuple[str, mx.array]], tree_flatten(tree)))


def trainable(model: Any) -> Any:
    """The trainable parameters of a model. A tree is returned unchanged."""
    return model.trainable_parameters() if isinstance(model, nn.Module) else model


def children(tree: Any, path: str) -> Iterator[tuple[Any, str, Any]]:
    """Yield key, path and value of each child of a dictionary or list that is at ``path``."""
    for key, child in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield key, f"{path}.{key}" if path else str(key), child


def leaves(tree: Any, keys: tuple = ()) -> list[tuple[tuple, Any]]:
    """Each leaf of a tree, after the keys and indices that lead to it."""
    if not isinstance(tree, (dict, list, tuple)):
        return [(keys, tree)]
    below = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return [leaf for key, child in below for leaf in leaves(child, (*keys, key))]


def at(tree: Any, keys: Iterable[Any]) -> Any:
    """What a tree holds at keys and indices, or at the parts of a path. None if there is none."""
    for key in keys:
        if isinstance(tree, dict):
            tree = tree.get(key)
        elif isinstance(tree, (list, tuple)) and str(key).isdigit() and int(key) < len(tree):
            tree = tree[int(key)]
        else:
            return None
    return tree


def select(new: Any, old: Any, chosen: Callable[[mx.array, mx.array], mx.array]) -> Any:
    """A tree with ``chosen(new, old)`` for each array. Dictionaries change in place: they are live.

    What the old tree does not have is new.
    """
    if isinstance(new, mx.array) and isinstance(old, mx.array):
        return chosen(new, old)
    if isinstance(new, dict) and isinstance(old, dict):
        for key, x in new.items():
            new[key] = select(x, old.get(key), chosen)
    elif isinstance(new, (list, tuple)) and isinstance(old, (list, tuple)):
        pairs = zip_longest(new, old[: len(new)])
        return type(new)(select(x, y, chosen) for x, y in pairs)
    return new
