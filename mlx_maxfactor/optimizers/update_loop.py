"""Update one parameter at a time: the arrays of each path, and the order of evaluation."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_map

from .. import functional as f

Update = Callable[[mx.array, mx.array, dict], mx.array]
"""An optimizer's ``apply_single``: gradient, parameter and state to the updated parameter."""


class ParameterSlot(NamedTuple):
    """A gradient, its parameter, and the state that each optimizer keeps at their path.

    ``elements``: if this is a shard, where its elements are in the whole parameter.
    """

    path: str
    gradient: mx.array
    parameter: mx.array
    states: tuple[Any, ...]
    elements: f.ElementRange | None = None


UpdateRule = Callable[[ParameterSlot], tuple[Update, dict] | None]
"""Returns a parameter's update function and state, or None to leave it unchanged."""


class StepDecision(NamedTuple):
    """What the guard decided about a step.

    Attributes:
        factor: Float32 factor on every gradient. None: 1.
        accepted: Whether to make the step. If not, every array keeps its value. None: make it.
    """

    factor: mx.array | None = None
    accepted: mx.array | None = None

    def scaled(self, gradient: mx.array) -> mx.array:
        """The gradient times the factor, in float32: a small fp16 gradient would become zero."""
        return gradient if self.factor is None else gradient * self.factor

    def select(self, new: mx.array, old: mx.array) -> mx.array:
        """The new array, or the old one if the step is skipped."""
        return new if self.accepted is None else mx.where(self.accepted, new, old)


def find_slots(gradients: Any, parameters: Any, states: Sequence[Any]) -> list[ParameterSlot]:
    """Match every gradient with its parameter and states, in the order of the gradients.

    Raises:
        ValueError: A gradient has no parameter, or they differ in shape. MLX would broadcast
            silently, or stop half-way.
    """
    slots = list(_slots("", gradients, parameters, states))
    if len({slot.path for slot in slots}) < len(slots):
        (path, _), *_ = Counter(slot.path for slot in slots).most_common()
        raise ValueError(f"two parameters have the path {path}: rename one of them")
    return slots


def _slots(
    path: str, gradient: Any, parameter: Any, states: Sequence[Any]
) -> Iterator[ParameterSlot]:
    # Not nested in find_slots: a recursive closure is a cycle, which would keep gradients alive.
    if not isinstance(gradient, (dict, list, tuple)):
        _check_slot(path, gradient, parameter)
        yield ParameterSlot(path, gradient, parameter, tuple(states))
        return
    for key, at, child in children(gradient, path):
        if (below := child_at(parameter, key)) is None:
            raise ValueError(f"{at}: the gradient has no parameter of this name")
        yield from _slots(at, child, below, [child_at(state, key) for state in states])


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


def _check_slot(path: str, gradient: Any, parameter: Any) -> None:
    for name, x in (("gradient", gradient), ("parameter", parameter)):
        if not isinstance(x, mx.array):
            raise ValueError(f"{path}: the {name} must be an array, got {type(x).__name__}")
    if gradient.shape != parameter.shape:
        raise ValueError(
            f"{path}: the gradient has shape {gradient.shape}, and the parameter {parameter.shape}"
        )


def in_order(
    gradients: Any, slots: Sequence[ParameterSlot], updated: Mapping[str, mx.array]
) -> Any:
    """The updated parameters in the structure of the gradients."""
    each = (updated[slot.path] for slot in slots)
    return tree_map(lambda _: next(each), gradients)


def top_level_arrays(state: dict) -> dict[str, mx.array]:
    """The state arrays that belong to no parameter, such as the step and the rate."""
    return {key: x for key, x in state.items() if isinstance(x, mx.array)}


class LiveState(dict):
    """A parameter's state during its update. Each array keeps its value if the step is skipped.

    Attributes:
        elements: Where the parameter's elements are in the whole parameter, or None.
    """

    def __init__(self, state: dict, decision: StepDecision, elements: f.ElementRange | None):
        super().__init__(state)
        self.elements = elements
        self._decision = decision

    def __setitem__(self, key: str, new: Any) -> None:
        if key in self:
            new = tree_map(self._decision.select, new, self[key])
        super().__setitem__(key, new)

    def update(self, *arguments: Any, **arrays: Any) -> None:
        """Set several arrays. A dictionary's own method would not select."""
        for key, new in dict(*arguments, **arrays).items():
            self[key] = new

    def __ior__(self, arrays: Any) -> "LiveState":
        self.update(arrays)
        return self


class UpdateLoop:
    """Evaluates updates one after the other, whatever the order of the graph.

    MLX evaluates breadth first: the float32 copies of twenty bf16 weights, and everything computed
    from them, exist at the same time. Here each update waits for the one before it, so that its
    temporary arrays and its gradient are released first. The last parameters come first, because a
    backward pass ends with the first layers.
    """

    def __init__(self, decision: StepDecision | None = None):
        self.decision = decision or StepDecision()
        self._before: list[mx.array] = []

    def update_all(self, slots: Sequence[ParameterSlot], rule: UpdateRule) -> dict[str, mx.array]:
        """Update every parameter. Returns the new parameters by path."""
        return {slot.path: self.update_one(slot, rule) for slot in reversed(slots)}

    def update_one(self, slot: ParameterSlot, rule: UpdateRule) -> mx.array:
        """Return one parameter, updated after the one before it. Its state changes in place.

        Raises:
            ValueError: The state does not fit the parameter.
        """
        found = rule(slot)
        if found is None:
            return slot.parameter
        apply_single, state = found
        names = [key for key, x in state.items() if isinstance(x, mx.array)]
        arrays = [slot.gradient, slot.parameter, *(state[key] for key in names)]
        if self._before:
            # One call per array: arrays of one call are held together, so none could be reused.
            arrays = [mx.depends(x, self._before) for x in arrays]
        gradient, parameter, *old = arrays
        # A Linear's gradient is a transposed array, over which every pass is slow.
        gradient = f.fusion_barrier(gradient)
        state.update(zip(names, old, strict=True))
        live = state
        if self.decision.accepted is not None or slot.elements is not None:
            # An update that reads back a new state array gets the chosen one: no second copy.
            live = LiveState(state, self.decision, slot.elements)
        try:
            new = apply_single(self.decision.scaled(gradient), parameter, live)
        except (KeyError, ValueError) as problem:
            what = f"its state has no {problem}" if isinstance(problem, KeyError) else problem
            raise ValueError(
                f"{slot.path} {slot.parameter.shape}, gradient {slot.gradient.shape}: {what}; "
                "create the optimizer again if the model has changed"
            ) from problem
        if any(x is not None for x in self.decision):
            # With a float32 gradient, MLX's own optimizers return float32 weights and states.
            new = new.astype(parameter.dtype)
            cast = {key: live[key].astype(x.dtype) for key, x in zip(names, old, strict=True)}
            dict.update(live, cast)
        state.update(live)
        updated = self.decision.select(new, parameter)
        self._before = [updated, *(state[key] for key in names)]
        return updated


@contextmanager
def unchanged_on_error(states: Sequence[dict], slots: Sequence[ParameterSlot]) -> Iterator[None]:
    """Restore the optimizers' states if an update fails half-way.

    Args:
        states: The optimizers' live states.
        slots: The parameters to update. The state of others does not change.
    """
    kept = [(s, dict(s)) for slot in slots for s in slot.states if isinstance(s, dict)]
    numbers = [(state, top_level_arrays(state)) for state in states]
    try:
        yield
    except BaseException:
        for state, before in kept:
            state.clear()
            state.update(before)
        for state, before in numbers:
            state.update(before)
        raise
