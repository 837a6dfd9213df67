"""One step of all parameters: groups of small ones, large ones one after the other.

This is the only engine. A bare optimizer is one member; a routed optimizer has several.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from .trees import at, leaves, select

GROUP_ELEMENTS = 2**17
"""Most elements of a group: its float32 copies exist at the same time."""


class Member(Protocol):
    """What the engine asks of an optimizer.

    Attributes:
        elementwise: Whether each element is updated by itself, so that one fused kernel is enough.
        updates_at_once: Whether it updates all of its parameters in one call.
    """

    elementwise: bool
    updates_at_once: bool

    @property
    def state(self) -> dict:
        """The live state: numbers at the top, and the state of each parameter at its path."""
        ...

    def owns(self, path: str) -> bool:
        """Whether it updates the parameter at ``path``."""
        ...

    def advance(self) -> None:
        """Count an update, and set its rates."""
        ...

    def group_of(self, path: str, parameter: mx.array) -> Hashable:
        """What parameters that it updates together have in common. None: update it alone."""
        ...

    def apply(
        self,
        paths: Sequence[str],
        gradients: list[mx.array],
        parameters: list[mx.array],
        states: list[dict],
    ) -> Sequence[mx.array]:
        """The updated parameters of a group. Their states change in place."""
        ...


class ParameterSlot(NamedTuple):
    """A gradient, its parameter, the optimizer that updates it, and the state it keeps for it."""

    path: str
    gradient: mx.array
    parameter: mx.array
    member: Member | None  # None: it is not updated
    state: Any  # None: there is none yet


class StepDecision(NamedTuple):
    """What the guard decided about a step.

    Attributes:
        factor: Float32 factor on every gradient. None: 1.
        accepted: Whether to make the step. If not, every array keeps its value. None: make it.
    """

    factor: mx.array | None = None
    accepted: mx.array | None = None

    def kept(self, new: Any, old: mx.array) -> mx.array:
        """The new array in the old dtype, or the old one if the step is skipped.

        MLX's optimizers return float32 for a float32 gradient.
        """
        new = new.astype(old.dtype)
        return new if self.accepted is None else mx.where(self.accepted, new, old)


def check_update(model: Any, gradients: Any) -> None:
    """Raise unless these are what ``optimizer.update`` takes."""
    if model == {} == gradients:  # moves a schedule, and nothing else
        return
    if not isinstance(model, nn.Module):
        name = type(model).__name__
        raise ValueError(f"update takes the model, then its gradients; the model is a {name}")
    if not isinstance(gradients, dict):
        raise ValueError(
            "gradients must be a tree like the model's parameters, as nn.value_and_grad gives "
            f"beside the loss, got a {type(gradients).__name__}"
        )


def find_slots(
    gradients: Any,
    parameters: Any,
    members: Sequence[Member],
    index_of: Callable[[str], int | None],
    init: Callable[[Any], None] | None = None,
) -> list[ParameterSlot]:
    """Match every gradient with its parameter, its optimizer and its state, in the same order.

    Where a state is missing, ``init`` makes it from the parameters. MLX's lazy call would hand it
    gradients.

    Raises:
        ValueError: A gradient has no parameter, or they differ in shape. MLX would broadcast
            silently, or stop half-way.
    """
    states, slots, is_complete = [member.state for member in members], [], True
    for keys, gradient in leaves(gradients):
        path, parameter = ".".join(map(str, keys)), at(parameters, keys)
        for name, x in (("gradient", gradient), ("parameter", parameter)):
            if x is None and name == "parameter":
                raise ValueError(f"{path}: the gradient has no parameter of this name")
            if not isinstance(x, mx.array):
                raise ValueError(f"{path}: the {name} must be an array, got {type(x).__name__}")
        if gradient.shape != parameter.shape:
            raise ValueError(
                f"{path}: the gradient has shape {gradient.shape}, and the parameter "
                f"{parameter.shape}"
            )
        member = state = None
        if (index := index_of(path)) is not None:
            owner = members[index]  # one that updates all at once makes its own state
            state = states[index] if owner.updates_at_once else at(states[index], keys)
            member = owner if owner.owns(path) else None
            is_complete &= not owner.updates_at_once
        needs_state = mx.issubdtype(parameter.dtype, mx.inexact)
        is_complete &= isinstance(state, dict) or not needs_state
        slots.append(ParameterSlot(path, gradient, parameter, member, state))
    if len({slot.path for slot in slots}) < len(slots):
        (path, _), *_ = Counter(slot.path for slot in slots).most_common()
        raise ValueError(f"two parameters have the path {path}: rename one of them")
    if is_complete or init is None:
        return slots
    init(tree_map(lambda _, p: p, gradients, parameters))
    return find_slots(gradients, parameters, members, index_of)


def in_order(gradients: Any, slots: Sequence[ParameterSlot], updated: dict[str, mx.array]) -> Any:
    """The updated parameters in the structure of the gradients."""
    each = (updated[slot.path] for slot in slots)
    return tree_map(lambda _: next(each), gradients)


def take_step(
    slots: Sequence[ParameterSlot], members: Sequence[Member], decision: StepDecision
) -> dict[str, mx.array]:
    """Count a step, move the schedules, and update every parameter.

    MLX evaluates breadth first: the float32 copies of twenty bf16 weights, and everything computed
    from them, would exist at the same time. Here each group waits for the one before it, so that
    its temporary arrays and its gradients are released first. The last parameters come first,
    because a backward pass ends with the first layers. Small parameters are updated in groups: a
    GPU takes as long to start a kernel for one as for all.

    Returns:
        The new parameters by path. If a step fails, all states are as they were.
    """
    updated = {slot.path: slot.parameter for slot in slots}
    with _unchanged_on_error(slots, members) as numbers:
        for member, (state, before) in zip(members, numbers, strict=True):
            member.advance()
            if decision.accepted is not None:
                select(state, before, decision.kept)
        done: list[mx.array] = []
        for group in _groups(slots):
            new, done = _update_group(group, decision, done)
            updated |= new
    return updated


def _groups(slots: Sequence[ParameterSlot]) -> list[list[ParameterSlot]]:
    """Parameters to update together, the last ones first."""
    groups: list[list[ParameterSlot]] = []
    open_groups: dict[Hashable, list[ParameterSlot]] = {}
    for slot in reversed(slots):
        is_updated = slot.parameter.size and mx.issubdtype(slot.parameter.dtype, mx.inexact)
        if slot.member is None or not is_updated:
            continue
        key = slot.member.group_of(slot.path, slot.parameter)
        group = None if key is None else open_groups.get(key)
        full = group and (len(group) + 1) * slot.parameter.size > GROUP_ELEMENTS
        if group is None or (full and not slot.member.updates_at_once):
            group = open_groups[key] = []
            groups.append(group)
        group.append(slot)
    return groups


def _update_group(
    group: list[ParameterSlot], decision: StepDecision, done: list[mx.array]
) -> tuple[dict[str, mx.array], list[mx.array]]:
    """Update some parameters at once, after those that are done.

    Returns:
        The new parameters by path, and what the next group waits for.

    Raises:
        ValueError: A state does not fit its parameter.
    """
    slot, member = group[0], group[0].member
    assert member is not None
    states = list({id(slot.state): slot.state for slot in group}.values())
    decides = any(x is not None for x in decision)
    before = [tree_map(lambda x: x, state) for state in states] if decides else []
    gradients = _after(done, [slot.gradient for slot in group])
    if decision.factor is not None:  # in float32: a small fp16 gradient would become zero
        gradients = [g * decision.factor for g in gradients]
    parameters = _after(done, [slot.parameter for slot in group])
    for state in states:
        arrays = {key: x for key, x in state.items() if isinstance(x, mx.array)}
        state.update(zip(arrays, _after(done, list(arrays.values())), strict=True))
    try:
        paths = [slot.path for slot in group]
        new = list(member.apply(paths, gradients, parameters, states))
    except (KeyError, ValueError) as problem:
        what = f"its state has no {problem}" if isinstance(problem, KeyError) else problem
        raise ValueError(
            f"{slot.path} {slot.parameter.shape}, gradient {slot.gradient.shape}: {what}; "
            "create the optimizer again if the model has changed"
        ) from problem
    if decides:
        new = [decision.kept(x, p) for x, p in zip(new, parameters, strict=True)]
        for state, old in zip(states, before, strict=True):
            select(state, old, decision.kept)
    # What a later update waits for cannot be computed in one kernel with anything else.
    kept = [] if member.elementwise else [x for state in states for x in state.values()]
    done = [*new, *(x for x in kept if isinstance(x, mx.array))]
    return {slot.path: x for slot, x in zip(group, new, strict=True)}, done


def _after(done: list[mx.array], arrays: list[mx.array]) -> list[mx.array]:
    """Arrays that are read after others. Each alone: arrays of one call stay alive together."""
    return [mx.depends(x, done) for x in arrays] if done else arrays


@contextmanager
def _unchanged_on_error(
    slots: Sequence[ParameterSlot], members: Sequence[Member]
) -> Iterator[list[tuple[dict, dict[str, mx.array]]]]:
    """Restore the optimizers' states if an update fails half-way.

    Yields:
        Each member's state, with the arrays that belong to no parameter, such as step and rate.
    """
    live = {id(slot.state): slot for slot in slots if isinstance(slot.state, dict)}.values()
    kept = [(slot, tree_map(lambda x: x, slot.state)) for slot in live]
    numbers = [
        (state, {key: x for key, x in state.items() if isinstance(x, mx.array)})
        for state in (member.state for member in members)
    ]
    try:
        yield numbers
    except BaseException:
        for slot, before in kept:
            if slot.member is not None and slot.member.updates_at_once:
                select(slot.state, before, lambda _, old: old)
            else:
                slot.state.clear()
                slot.state.update(before)
        for state, before in numbers:
            state.update(before)
        raise
