"""Bad batches: clipping by the global norm, and steps that are skipped, inside a compiled step."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.optimizers import MultiOptimizer, Optimizer
from mlx.utils import tree_map

from . import functional as f
from ._validate import Rate, check_flags, check_integer, check_number, check_update, got, known
from .optimizers._base import Float32Optimizer, flatten
from .optimizers._turns import Leaf, Turns, Update, Way, find_leaves, numbers_of


class GuardedOptimizer(MultiOptimizer):
    """Any MLX optimizer, with clipping by the global norm and a way past bad batches.

    A step whose gradients hold an inf or a NaN leaves parameters and state bit for bit as they
    were, the step count and the schedule among them, and is counted. All of it happens in arrays:
    no value is read back, and a compiled step stays one graph. The gradients must all be there
    before the first parameter moves, which costs memory where they were freed one by one.

    What the forward pass did to BatchNorm's running statistics is not undone.

    Args:
        optimizer: The optimizer to guard. :func:`mlx_maxfactor.create_optimizer` takes both options
            itself.
        max_grad_norm: Largest global norm of the gradients, computed in float32 whatever their
            dtype; larger ones are scaled to it. None: no limit. Default None.
        skip_nonfinite: Skip steps whose gradients are not all finite. Default True.
        max_skipped: So many skipped steps in a row are an error, a FloatingPointError where the
            count is looked at: by :attr:`skipped`, and in a loop that is not compiled at every so
            many updates. No other step waits for the device. None: no limit. Default None.

    Raises:
        ValueError: ``max_grad_norm`` is not above 0; ``max_skipped`` is below 1, or nothing is
            skipped.

    Example:
        >>> import mlx.core as mx
        >>> from mlx_maxfactor import GuardedOptimizer, SignSGD
        >>> optimizer = GuardedOptimizer(SignSGD())
        >>> p = {"b": mx.ones(2)}
        >>> optimizer.apply_gradients({"b": mx.array([1.0, float("nan")])}, p)["b"].tolist()
        [1.0, 1.0]
        >>> optimizer.skipped.item()
        1
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = True,
        max_skipped: int | None = None,
    ):
        if not isinstance(optimizer, Optimizer):
            raise ValueError(f"optimizer must be an optimizer, {got(optimizer, ())}")
        super().__init__([optimizer])
        self._set_guard(max_grad_norm, skip_nonfinite, max_skipped)

    def _set_guard(
        self, max_grad_norm: float | None, skip_nonfinite: bool, max_skipped: int | None
    ) -> None:
        check_flags(skip_nonfinite=skip_nonfinite)
        if max_skipped is not None:
            max_skipped = check_integer("max_skipped", max_skipped, 1)
            if not skip_nonfinite:
                raise ValueError("max_skipped is a limit of skipped steps: set skip_nonfinite=True")
        if max_grad_norm is not None:
            max_grad_norm = check_number("max_grad_norm", max_grad_norm, 0.0, ends="()")
        self.filters = []  # `_index_of` splits trees here, and lambdas could not be pickled
        self.max_grad_norm = max_grad_norm
        self.skip_nonfinite = skip_nonfinite
        self.max_skipped = max_skipped
        self._updates = 0  # by Python, to look at the count now and then
        counts = ("skipped", "skipped_in_a_row") if skip_nonfinite else ()
        self._guard = {name: mx.array(0, mx.uint32) for name in counts}

    def __repr__(self) -> str:
        """The optimizer that is guarded, and how."""
        parts = [shown_optimizer(self.optimizers[0]), *self._shown_guard()]
        return f"{type(self).__name__}({', '.join(parts)})"

    def _shown_guard(self) -> list[str]:
        limit = [] if self.max_grad_norm is None else [f"max_grad_norm={self.max_grad_norm:g}"]
        most = [] if self.max_skipped is None else [f"max_skipped={self.max_skipped}"]
        return limit + ["skip_nonfinite=True"] * self.skip_nonfinite + most

    @property
    def guards(self) -> bool:
        """Whether it clips or skips anything."""
        return self.max_grad_norm is not None or self.skip_nonfinite

    @property
    def skipped(self) -> mx.array:
        """Number of steps that were skipped.

        Raises:
            FloatingPointError: There were ``max_skipped`` in a row.
        """
        self._look()
        return self._guard.get("skipped", mx.array(0, mx.uint32))

    def _look(self) -> None:
        """Raise if there were too many skipped steps in a row. Waits for the device."""
        if self.max_skipped is None:
            return
        count = known(self._guard["skipped_in_a_row"])
        if count is not None and count >= self.max_skipped:
            raise FloatingPointError(
                f"{count} steps in a row were skipped: their gradients held an inf or a NaN; the "
                f"model is as it was after update {known(self.step)}"
            )

    @property
    def step(self) -> mx.array:
        """Number of updates made; a skipped step is none."""
        return self.optimizers[0].step

    @property
    def learning_rate(self) -> mx.array:
        """The rate of the first member."""
        return self.optimizers[0].learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate: Rate) -> None:
        self.optimizers[0].learning_rate = learning_rate

    def init(self, parameters: dict) -> None:
        """Make the state of every parameter that has none yet."""
        for index, optimizer in enumerate(self.optimizers):
            optimizer.init(self._part(parameters, index))

    def update(self, model: nn.Module, gradients: dict) -> None:
        """Update the model's parameters in place."""
        check_update(model, gradients)
        self._updates += 1
        if self._updates % (self.max_skipped or 1) == 0:
            self._look()
        super().update(model, gradients)

    def apply_gradients(self, gradients: dict, parameters: dict) -> dict:
        """Return the updated parameters, in the structure of the gradients."""
        leaves = find_leaves(gradients, parameters, self._states)
        if not all(map(self._is_ready, leaves)):
            # A member's init gets parameters here, never gradients, as MLX's lazy one would.
            self.init(tree_map(lambda _, p: p, gradients, parameters))
            leaves = find_leaves(gradients, parameters, self._states)
        leaves = self._received(leaves)
        turns = self._turns([leaf.gradient for leaf in leaves])
        before = [numbers_of(state) for state in self._states]
        try:
            members = range(len(self.optimizers))
            updated = self._updated(gradients, parameters, leaves, turns, members)
        except Exception:
            for state, numbers in zip(self._states, before, strict=True):
                state.update(numbers)
            raise
        self._count(turns)
        return updated

    def _updated(
        self,
        gradients: Any,
        parameters: Any,
        leaves: list[Leaf],
        turns: Turns,
        members: Iterable[int],
    ) -> Any:
        """The parameters that some members update, in the structure of their gradients."""
        whole: dict[str, mx.array] = {}
        for index in members:
            optimizer = self.optimizers[index]
            if is_single(optimizer):
                _advance(optimizer, turns)
            else:
                whole |= _update_whole(optimizer, self._part(gradients, index), parameters, turns)

        def way(leaf: Leaf) -> tuple[Update, dict] | None:
            index = self._index_of(leaf.path)
            if index is None:
                return None
            if leaf.path in whole:
                return (lambda *_: whole[leaf.path]), {}
            optimizer = self.optimizers[index]
            ours = isinstance(optimizer, Float32Optimizer)
            update = optimizer.update_at(leaf.path) if ours else optimizer.apply_single
            return update, leaf.states[index]

        return self._take_all(turns, gradients, leaves, way)

    def _count(self, turns: Turns) -> None:
        """Count the step if it is skipped."""
        if self.skip_nonfinite:
            skipped, in_a_row = self._guard["skipped"], self._guard["skipped_in_a_row"]
            self._guard["skipped"] = turns.kept(skipped, skipped + 1)
            self._guard["skipped_in_a_row"] = turns.kept(mx.zeros_like(in_a_row), in_a_row + 1)

    def _received(self, leaves: list[Leaf]) -> list[Leaf]:
        """The leaves, with the gradients that the step is made of."""
        return leaves

    def _take_all(self, turns: Turns, gradients: dict, leaves: list[Leaf], way: Way) -> dict:
        """Every parameter, updated."""
        return turns.take_all(gradients, leaves, way)

    def _turns(self, gradients: Sequence[mx.array]) -> Turns:
        """What happens to every gradient and every update of this step."""
        if not self.guards:
            return Turns()
        factor, (peak, norm) = None, f.scaled_global_norm(gradients, f.can_wait())
        finite = f.hoist(mx.isfinite(norm))
        if self.max_grad_norm is not None:
            # An inf is not scaled: times 0 it would be a NaN, and all else 0.
            factor = mx.minimum(1.0, self.max_grad_norm / peak / norm)
            factor = f.hoist(mx.where(finite, factor, 1.0))
        return Turns(factor, finite if self.skip_nonfinite else None)

    @property
    def _states(self) -> list[dict]:
        return [optimizer.state for optimizer in self.optimizers]

    def _index_of(self, path: str) -> int | None:
        """Index of the member that updates the parameter at a path."""
        return 0

    def _is_ready(self, leaf: Leaf) -> bool:
        index = self._index_of(leaf.path)
        return index is not None and isinstance(leaf.states[index], dict)

    def _part(self, tree: Any, index: int) -> Any:
        return tree

    @property
    def state(self) -> dict:
        """The members' live states and the guard's own. Assigning copies into them.

        ``state["step"]`` and ``state["learning_rate"]`` are those of the optimizer as a whole.
        """
        state = _State(self, states=[optimizer.state for optimizer in self.optimizers])
        if self._guard:
            state["guard"] = self._guard
        return state

    @state.setter
    def state(self, state: dict) -> None:
        states = state.get("states", ()) if isinstance(state, dict) else ()
        if len(states) != len(self.optimizers):
            raise ValueError(
                f"state must hold {len(self.optimizers)} states, one a member, got {len(states)}"
            )
        for optimizer, new in zip(self.optimizers, states, strict=True):
            if isinstance(optimizer, Float32Optimizer):
                optimizer.state = new
            else:
                new = tree_map(lambda array: array, new)
                optimizer.state.clear()
                optimizer.state.update(new)
        counts = state.get("guard", {})
        for name in self._guard:
            self._guard[name] = counts.get(name, mx.array(0, mx.uint32))


class _State(dict):
    """A state that also answers for the whole, where public trainers look for it.

    Not as items: a compiled step and a checkpoint would take them for arrays of their own.
    """

    def __init__(self, optimizer: MultiOptimizer, **items: Any):
        super().__init__(**items)
        self._optimizer = optimizer

    def __missing__(self, key: str) -> Any:
        if key in ("step", "learning_rate"):
            return getattr(self._optimizer, key)
        raise KeyError(key)


def shown_optimizer(optimizer: Optimizer) -> str:
    """What an optimizer prints as; mlx's own, which say nothing of themselves, by their name."""
    kind = type(optimizer)
    if kind.__repr__ is object.__repr__:
        return f"{kind.__module__.partition('.')[0]}'s {kind.__name__}"
    return repr(optimizer)


def is_single(optimizer: Optimizer) -> bool:
    """Whether it updates one parameter at a time, as MLX's own do."""
    own = type(optimizer).apply_gradients
    return own in (Optimizer.apply_gradients, Float32Optimizer.apply_gradients)


def _advance(optimizer: Optimizer, turns: Turns) -> None:
    """Count an update and move the schedules, if the step is made."""
    before = numbers_of(optimizer.state)
    if isinstance(optimizer, Float32Optimizer):
        optimizer.advance()
    else:
        for key, schedule in optimizer._schedulers.items():
            optimizer.state[key] = schedule(optimizer.step)
        optimizer.state["step"] = optimizer.step + 1
    optimizer.state.update({key: turns.kept(optimizer.state[key], x) for key, x in before.items()})


def _update_whole(
    optimizer: Optimizer, gradients: Any, parameters: Any, turns: Turns
) -> dict[str, mx.array]:
    """The update of an optimizer that has its own way with trees, by path."""
    before = tree_map(lambda array: array, optimizer.state)
    try:
        updated = optimizer.apply_gradients(tree_map(turns.scaled, gradients), parameters)
    except Exception:
        _settle(before, optimizer.state, lambda _, old: old)
        raise
    _settle(before, optimizer.state, lambda new, old: turns.kept(new.astype(old.dtype), old))
    return flatten(
        tree_map(lambda new, old: turns.kept(new.astype(old.dtype), old), updated, parameters)
    )


def _settle(before: Any, live: Any, settled: Callable[[mx.array, mx.array], mx.array]) -> None:
    """Put into a live state what ``settled`` makes of each new array and the one from before."""
    for key, old in before.items() if isinstance(before, dict) else enumerate(before):
        if isinstance(old, mx.array):
            live[key] = settled(live[key], old)
        else:
            _settle(old, live[key], settled)
