"""One parameter at a time: what a step has at each path, and the order of its evaluation."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_map

from .. import functional as f

Update = Callable[[mx.array, mx.array, dict], mx.array]
"""An optimizer's ``apply_single``: gradient, parameter and state to the parameter, updated."""


class Leaf(NamedTuple):
    """A gradient, its parameter, and what each optimizer keeps at their path (None: nothing)."""

    path: str
    gradient: mx.array
    parameter: mx.array
    states: tuple[Any, ...]


Way = Callable[[Leaf], tuple[Update, dict] | None]
"""What updates a leaf, and its state; None leaves the parameter as it is."""


def find_leaves(gradients: Any, parameters: Any, states: Sequence[Any]) -> list[Leaf]:
    """Everything that a step has, path by path, in the order of the gradients."""
    leaves: list[Leaf] = []
    _visit("", gradients, parameters, states, leaves)
    return leaves


def _visit(path: str, gradient: Any, parameter: Any, states: Any, leaves: list[Leaf]) -> None:
    # No function inside find_leaves: its reference to itself would keep every gradient alive.
    prefix = f"{path}." if path else ""
    if isinstance(gradient, dict):
        for key, child in gradient.items():
            below = [state.get(key) if isinstance(state, dict) else None for state in states]
            if not isinstance(parameter, dict) or key not in parameter:
                raise ValueError(f"{prefix}{key}: there is a gradient, and no such parameter")
            _visit(f"{prefix}{key}", child, parameter[key], below, leaves)
    elif isinstance(gradient, (list, tuple)):
        for i, child in enumerate(gradient):
            below = [state[i] if _reaches(state, i) else None for state in states]
            if not _reaches(parameter, i):
                raise ValueError(f"{prefix}{i}: there is a gradient, and no such parameter")
            _visit(f"{prefix}{i}", child, parameter[i], below, leaves)
    else:
        _check_leaf(path, gradient, parameter)
        leaves.append(Leaf(path, gradient, parameter, tuple(states)))


def _check_leaf(path: str, gradient: Any, parameter: Any) -> None:
    """Raise before anything is changed: MLX would broadcast in silence, or stop half-way."""
    for name, x in (("gradient", gradient), ("parameter", parameter)):
        if not isinstance(x, mx.array):
            raise ValueError(f"{path}: the {name} must be an array, got {type(x).__name__}")
    if gradient.shape != parameter.shape:
        raise ValueError(
            f"{path}: the gradient has shape {gradient.shape}, and the parameter {parameter.shape}"
        )


def numbers_of(state: dict) -> dict[str, mx.array]:
    """What an optimizer's state holds beside the parameters': its step, its rate."""
    return {key: x for key, x in state.items() if isinstance(x, mx.array)}


def _reaches(state: Any, index: int) -> bool:
    return isinstance(state, (list, tuple)) and index < len(state)


class Turns:
    """Updates that are evaluated one after the other, whatever the order of the graph.

    MLX evaluates breadth first: float32 copies of twenty bf16 weights, and what was computed from
    them, are alive at once. Where each update waits for the one before, they are released in
    between, and so is a gradient. A backward pass ends with the first layers: the last are first.

    Args:
        factor: What gradients are multiplied by, in float32. None: nothing.
        finite: Whether the step is made; if not, every array stays as it was. None: it is.
    """

    def __init__(self, factor: mx.array | None = None, finite: mx.array | None = None):
        self.factor = factor
        self.finite = finite
        self._before: list[mx.array] = []
        self._waits = f.can_wait()

    def take_all(
        self,
        gradients: Any,
        leaves: Sequence[Leaf],
        way: Way,
    ) -> Any:
        """Update every leaf, the last one first.

        Args:
            gradients: The tree that the leaves are of.
            leaves: What :func:`find_leaves` found.
            way: What updates each of them.

        Returns:
            The parameters, in the structure of the gradients.

        Raises:
            ValueError: What is kept does not fit a parameter; every state is as it was.
        """
        updated, before = {}, []
        try:
            for leaf in reversed(leaves):
                found = way(leaf)
                if found:
                    before.append((found[1], dict(found[1])))
                updated[leaf.path] = self.take(leaf, *found) if found else leaf.parameter
        except Exception:
            for state, kept in before:
                state.clear()
                state.update(kept)
            raise
        each = (updated[leaf.path] for leaf in leaves)
        return tree_map(lambda _: next(each), gradients)

    def take(self, leaf: Leaf, apply_single: Update, state: dict) -> mx.array:
        """Return one parameter, updated after the one before it; its state changes in place."""
        kept = [key for key, x in state.items() if isinstance(x, mx.array)]
        arrays = [leaf.gradient, leaf.parameter, *(state[key] for key in kept)]
        if self._before and self._waits:
            # One by one: what is given together is held together, and nothing is updated in place.
            arrays = [mx.depends(x, self._before) for x in arrays]
        gradient, parameter, *old = arrays
        # A Linear's gradient comes transposed: every pass that reads it so takes twice as long.
        gradient = f.hoist(gradient)
        state.update(zip(kept, old, strict=True))
        # Through a dictionary that keeps: a formula that reads back what it wrote then needs no
        # second copy of its state beside the one that stays.
        live = state if self.finite is None else _Kept(self, state)
        try:
            new = apply_single(self.scaled(gradient), parameter, live)
        except (KeyError, ValueError) as problem:
            lacks = isinstance(problem, KeyError)
            what = f"there is no {problem} in its state" if lacks else problem
            raise ValueError(
                f"{leaf.path} {parameter.shape}, gradient {gradient.shape}: {what}; make the "
                "optimizer again where the model has changed"
            ) from problem
        if self.factor is not None or self.finite is not None:
            # MLX's own answer a float32 gradient with float32 weights and states.
            new = new.astype(parameter.dtype)
            live.update({key: live[key].astype(x.dtype) for key, x in zip(kept, old, strict=True)})
        state.update(live)
        updated = self.kept(new, parameter)
        self._before = [updated, *(state[key] for key in kept)]
        return updated

    def scaled(self, gradient: mx.array) -> mx.array:
        """The gradient times the factor, in float32: in fp16 a quiet layer's would be zero."""
        return gradient if self.factor is None else gradient * self.factor

    def kept(self, new: mx.array, old: mx.array) -> mx.array:
        """The new array, or the old one if the step is not made."""
        return new if self.finite is None else mx.where(self.finite, new, old)


class _Kept(dict):
    """Arrays of a state, each of which stays as it is if the step is not made."""

    def __init__(self, turns: Turns, state: dict):
        super().__init__(state)
        self._turns = turns

    def __setitem__(self, key: str, new: mx.array) -> None:
        super().__setitem__(key, self._turns.kept(new, self[key]) if key in self else new)
