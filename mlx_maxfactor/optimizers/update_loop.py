"""One step of all parameters: groups of small ones, large ones one after the other."""

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_map


class ParameterSlot(NamedTuple):
    """A gradient, its parameter, and the state that each optimizer keeps at their path."""

    path: str
    gradient: mx.array
    parameter: mx.array
    states: tuple[Any, ...]


class Update(NamedTuple):
    """How a parameter is updated.

    Attributes:
        apply: From gradients, parameters and states to the updated parameters. States change in
            place.
        state: The state of this parameter.
        group: Parameters of one ``apply`` with an equal group may be updated together. None: alone.
        in_one_kernel: Whether the new state is computed in the kernel of the new parameters.
    """

    apply: Callable[[list[mx.array], list[mx.array], list[dict]], list[mx.array]]
    state: dict
    group: Hashable = None
    in_one_kernel: bool = False


UpdateRule = Callable[[ParameterSlot], Update | None]
"""Returns how to update a parameter, or None to leave it unchanged."""

GROUP_ELEMENTS = 2**19
"""Most elements of a group: its float32 copies exist at the same time."""


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

    def kept(self, new: mx.array, old: mx.array) -> mx.array:
        """Likewise, in the old dtype: MLX's optimizers return float32 for a float32 gradient."""
        return self.select(new.astype(old.dtype), old)

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


class UpdateLoop:
    """Evaluates updates one after the other, whatever the order of the graph.

    MLX evaluates breadth first: the float32 copies of twenty bf16 weights, and everything computed
    from them, exist at the same time. Here each update waits for the one before it, so that its
    temporary arrays and its gradient are released first. The last parameters come first, because a
    backward pass ends with the first layers. Small parameters are updated in groups: a GPU takes as
    long to start a kernel for one as for all.
    """

    def __init__(self, decision: StepDecision | None = None):
        self.decision = decision or StepDecision()
        self._before: list[mx.array] = []

    def update_all(self, slots: Sequence[ParameterSlot], rule: UpdateRule) -> dict[str, mx.array]:
        """Update every parameter. Returns the new parameters by path."""
        updated = {slot.path: slot.parameter for slot in slots}
        for group in _groups(slots, rule):
            updated |= self.update_group(group)
        return updated

    def update_group(self, group: list[tuple[ParameterSlot, Update]]) -> dict[str, mx.array]:
        """Update some parameters at once, after those before. Their states change in place.

        Raises:
            ValueError: A state does not fit its parameter.
        """
        slots = [slot for slot, _ in group]
        states = [update.state for _, update in group]
        old = [dict(state) for state in states]
        gradients = [self.decision.scaled(self._after(slot.gradient)) for slot in slots]
        parameters = [self._after(slot.parameter) for slot in slots]
        for state in states:
            state.update({k: self._after(x) for k, x in state.items() if isinstance(x, mx.array)})
        try:
            new = group[0][1].apply(gradients, parameters, states)
        except (KeyError, ValueError) as problem:
            what = f"its state has no {problem}" if isinstance(problem, KeyError) else problem
            slot = slots[0]
            raise ValueError(
                f"{slot.path} {slot.parameter.shape}, gradient {slot.gradient.shape}: {what}; "
                "create the optimizer again if the model has changed"
            ) from problem
        if any(x is not None for x in self.decision):
            for before, state in zip(old, states, strict=True):
                state.update(_selected(state, before, self.decision))
            new = [self.decision.kept(x, p) for x, p in zip(new, parameters, strict=True)]
        # What a later update waits for cannot be computed in one kernel with anything else.
        waits = [] if group[0][1].in_one_kernel else [x for s in states for x in s.values()]
        self._before = [*new, *filter(_is_array, waits)]
        return {slot.path: x for slot, x in zip(slots, new, strict=True)}

    def _after(self, x: mx.array) -> mx.array:
        """The array, read after the updates before. Each alone: arrays of one call stay alive."""
        return mx.depends(x, self._before) if self._before else x


def _groups(
    slots: Sequence[ParameterSlot], rule: UpdateRule
) -> list[list[tuple[ParameterSlot, Update]]]:
    """Parameters to update together, the last ones first."""
    groups: list[list[tuple[ParameterSlot, Update]]] = []
    open_groups: dict[Hashable, list[tuple[ParameterSlot, Update]]] = {}
    for slot in reversed(slots):
        if (update := rule(slot)) is None:
            continue
        group = open_groups.get(update.group) if update.group is not None else None
        if group is None or (len(group) + 1) * slot.parameter.size > GROUP_ELEMENTS:
            group = open_groups[update.group] = []
            groups.append(group)
        group.append((slot, update))
    return groups


def _selected(new: Any, old: Any, decision: StepDecision) -> Any:
    """A new state, or the old one if the step is skipped, in the old dtypes."""
    if isinstance(new, mx.array) and isinstance(old, mx.array):
        return decision.kept(new, old)
    if isinstance(new, dict) and isinstance(old, dict):
        return {k: _selected(x, old.get(k), decision) for k, x in new.items()}
    if isinstance(new, (list, tuple)) and isinstance(old, (list, tuple)) and len(new) == len(old):
        return type(new)(_selected(x, y, decision) for x, y in zip(new, old, strict=True))
    return new


def _is_array(x: Any) -> bool:
    return isinstance(x, mx.array)


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
