"""Trees of arrays, as models, gradients and states are: paths and leaves."""

from collections.abc import Callable, Iterator
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


def child_at(tree: Any, key: Any) -> Any:
    """The child of a dictionary or list at a key or index. None if there is none."""
    if isinstance(key, str):
        return tree.get(key) if isinstance(tree, dict) else None
    return tree[key] if isinstance(tree, (list, tuple)) and key < len(tree) else None


def at_path(tree: Any, path: str) -> Any:
    """What a tree holds at a dotted path. None if there is nothing."""
    for key in path.split("."):
        tree = child_at(tree, int(key) if isinstance(tree, (list, tuple)) else key)
    return tree


def matched_leaves(
    tree: Any, others: list[Any], path: str = ""
) -> list[tuple[str, Any, list[Any]]]:
    """Each leaf of a tree with its path, and what the other trees hold at the same place."""
    if not isinstance(tree, (dict, list, tuple)):
        return [(path, tree, others)]
    found = []
    for key, child in tree.items() if isinstance(tree, dict) else enumerate(tree):
        below = [child_at(other, key) for other in others]
        found += matched_leaves(child, below, f"{path}.{key}" if path else str(key))
    return found


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
