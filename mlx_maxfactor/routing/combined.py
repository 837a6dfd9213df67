"""Several optimizers as one: how a step gets from gradients to parameters."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.optimizers import MultiOptimizer, Optimizer

from .._validate import got
from ..engine.guard import Guard
from ..engine.step import ParameterSlot, check_update, find_slots, in_order, take_step
from ..optimizers.foreign import as_member


class UpdateStrategy:
    """This machine makes all updates and holds all state. A subclass shares both among ranks.

    Attributes:
        rank: Number of this rank.
        ranks: Number of ranks.
    """

    rank, ranks = 0, 1

    def prepare(self, optimizer: Any, parameters: dict) -> None:
        """Called when the optimizer has made the state of these parameters."""

    def average_gradients(self, slots: list[ParameterSlot]) -> list[ParameterSlot]:
        """The slots, each with the mean of all ranks' gradients."""
        return slots

    def update(
        self,
        slots: list[ParameterSlot],
        step: Callable[[list[ParameterSlot]], dict[str, mx.array]],
    ) -> dict[str, mx.array]:
        """Every parameter by path, updated by ``step``."""
        return step(slots)

    def state_bytes(self) -> dict[str, int]:
        """Bytes of whole states, by path, where this machine holds only parts of them."""
        return {}

    # Checkpoints. All ranks must call these methods together.

    def gather(self, own: mx.array) -> mx.array:
        """The arrays of all ranks along a new first axis. One machine's array is unchanged."""
        return own

    def spread_state(self) -> Mapping[str, mx.array]:
        """Templates of the arrays that are spread over ranks, by their names on one machine."""
        return {}

    def with_whole_state(self, write: Callable[[dict[str, mx.array]], None]) -> None:
        """Call ``write`` on one rank, with the spread arrays whole. If it fails, all raise."""
        write({})


class CombinedOptimizer(MultiOptimizer):
    """Optimizers that update one model together, with one guard.

    Args:
        optimizers: The members. A subclass says with :meth:`index_of` who updates what.
        guard: Decides which gradients to scale, and which steps to skip.
        strategy: Who makes the updates. Default: this machine.
    """

    def __init__(
        self, optimizers: list[Optimizer], guard: Guard, strategy: UpdateStrategy | None = None
    ):
        super().__init__(optimizers, [None] * (len(optimizers) - 1))
        self._routes: dict[str, int] = {}
        self.filters = []  # `index_of` replaces them, and MLX's own lambda could not be pickled
        self._members = [as_member(optimizer) for optimizer in optimizers]
        self.guard = guard
        self.strategy = strategy or UpdateStrategy()
        self._updates = 0  # counted by Python, to check the guard after every max_skipped

    def index_of(self, path: str) -> int | None:
        """Index of the member that updates the parameter at a path. None: no member does."""
        return self._routes.get(path)

    def split(self, tree: Any, index: int) -> Any:
        """The part of a tree that one member updates. Lists keep their length."""
        return tree

    @property
    def step(self) -> mx.array:
        """Number of updates that were made. Skipped steps do not count."""
        return self._members[0].step

    @property
    def skipped(self) -> mx.array:
        """Number of steps that were skipped.

        Raises:
            FloatingPointError: The guard's ``max_skipped`` was reached.
        """
        self.guard.check(self.step)
        return self.guard.counts.get("skipped", mx.array(0, mx.uint32))

    def init(self, parameters: dict) -> None:
        """Make the state of every parameter that has none yet."""
        for index, optimizer in enumerate(self.optimizers):
            optimizer.init(self.split(parameters, index))
        self.strategy.prepare(self, parameters)

    def update(self, model: nn.Module, gradients: dict) -> None:
        """Update the model's parameters in place."""
        check_update(model, gradients)
        limit = self.guard.max_skipped
        if limit is not None and self._updates % limit == 0:
            self.guard.check(self.step)
        self._updates += 1
        super().update(model, gradients)

    def apply_gradients(self, gradients: dict, parameters: dict) -> dict:
        """Return the updated parameters, in the structure of the gradients."""
        slots = find_slots(gradients, parameters, self._members, self.index_of, self.init)
        slots = self.strategy.average_gradients(slots)
        decision = self.guard.decide([slot.gradient for slot in slots])
        step = partial(take_step, members=self._members, decision=decision)
        updated = self.strategy.update(slots, step)
        self.guard.count(decision)
        return in_order(gradients, slots, updated)

    @property
    def state(self) -> dict:
        """The members' live states and the guard's counts. Assigning copies into them.

        ``state["step"]`` and ``state["learning_rate"]`` are those of the optimizer as a whole.
        """
        state = _State(self, states=[member.state for member in self._members])
        if self.guard.counts:
            state["guard"] = self.guard.counts
        return state

    @state.setter
    def state(self, state: dict) -> None:
        states = state.get("states", ()) if isinstance(state, dict) else ()
        if len(states) != len(self.optimizers):
            raise ValueError(
                f"state must hold {len(self.optimizers)} states, one for each member, got "
                f"{len(states)}"
            )
        for member, new in zip(self._members, states, strict=True):
            member.state = new
        counts = state.get("guard", {})
        for name in self.guard.counts:
            self.guard.counts[name] = counts.get(name, mx.array(0, mx.uint32))


class GuardedOptimizer(CombinedOptimizer):
    """Any MLX optimizer, with clipping by the global norm and skipping of bad batches.

    A step whose gradients hold an inf or a NaN leaves parameters and state bit for bit as they
    were, including the step count and the schedule, and is counted. Everything happens in arrays:
    no value is read back, and a compiled step stays one graph. All gradients must exist before the
    first parameter changes, which costs memory where they were released one by one.

    BatchNorm's running statistics, which the forward pass has changed already, are not restored.

    Args:
        optimizer: The optimizer to guard. :func:`mlx_maxfactor.create_optimizer` has the same
            options.
        max_grad_norm: Largest global norm of the gradients, computed in float32 whatever their
            dtype. Larger gradients are scaled down to it. None: no limit. Default None.
        skip_nonfinite: Skip steps whose gradients are not all finite. Default True.
        max_skipped: Raise a FloatingPointError at the next check after this many skipped steps in a
            row. A check is made where the count is read: by :attr:`skipped`, and in a loop that is
            not compiled after every ``max_skipped`` updates. Other steps do not wait for the
            device. None: no limit. Default None.

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
        if isinstance(optimizer, CombinedOptimizer) and optimizer.strategy.ranks > 1:
            raise ValueError(
                "an optimizer that several ranks share decides for all of them: give "
                "max_grad_norm, skip_nonfinite and max_skipped to create_optimizer"
            )
        super().__init__([optimizer], Guard(max_grad_norm, skip_nonfinite, max_skipped))

    def index_of(self, path: str) -> int | None:
        """The optimizer updates every parameter."""
        return 0

    def __repr__(self) -> str:
        """The guarded optimizer, and the guard's options."""
        options = [shown_optimizer(self.optimizers[0]), *self.guard.shown]
        return f"GuardedOptimizer({', '.join(options)})"


class _State(dict):
    """A state that also has the step and the rate as a whole, where public trainers look for them.

    They are not items, because a compiled step and a checkpoint would treat these as more arrays.
    """

    def __init__(self, optimizer: MultiOptimizer, **items: Any):
        super().__init__(**items)
        self._optimizer = optimizer

    def __missing__(self, key: str) -> Any:
        if key in ("step", "learning_rate"):
            return getattr(self._optimizer, key)
        raise KeyError(key)

    def __setitem__(self, key: str, value: Any) -> None:
        if key == "learning_rate":
            self._optimizer.learning_rate = value
        else:
            super().__setitem__(key, value)


def shown_optimizer(optimizer: Optimizer) -> str:
    """What an optimizer prints as. MLX's own have no repr and are shown by name."""
    kind = type(optimizer)
    if kind.__repr__ is object.__repr__:
        return f"{kind.__module__.partition('.')[0]}'s {kind.__name__}"
    return repr(optimizer)
