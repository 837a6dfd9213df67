"""The routed optimizer: each parameter goes to the member that its role asks for."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.optimizers import Optimizer

from .._validate import Rate, check_rate, value_if_evaluated
from ..engine.guard import Guard
from ..engine.schedules import scaled
from ..engine.trees import children, flatten, trainable
from ..optimizers.base import refuse_complex
from .combined import CombinedOptimizer, UpdateStrategy, shown_optimizer
from .plan import Plan, PlanEntry
from .roles import Parameter, find_aliases


@dataclass(frozen=True)
class Member:
    """An optimizer of a routed one, its label in the plan, and its peak rate.

    The peak rate is a constant rate, or the peak of a schedule. Where schedules move the rates, the
    ratio of two members is the ratio of their peak rates.
    """

    label: str
    optimizer: Optimizer
    peak_rate: float


class RoutedOptimizer(CombinedOptimizer):
    """Several optimizers as one: each parameter goes to the member that its role asks for.

    :func:`mlx_maxfactor.create_optimizer` makes it. It works wherever an MLX optimizer does:
    ``optimizer.update(model, grads)``, inside ``mx.compile`` with ``optimizer.state`` captured, in
    mlx_lm's trainer. Layers may be frozen and unfrozen between steps; a compiled step must then be
    compiled again, as always in MLX.

    Args:
        model: The model; its trainable parameters get their state at once.
        parameters: Every parameter of the model with its role, the frozen ones too.
        members: The optimizers. ``learning_rate`` is that of the first one with parameters.
        routes: Index of the member by path.
        guard: Decides which gradients to scale, and which steps to skip.
        strategy: Who makes the updates. Default: this machine.

    Raises:
        ValueError: Names every parameter that its member cannot take.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Sequence[Parameter],
        members: Sequence[Member],
        routes: Mapping[str, int],
        guard: Guard,
        strategy: UpdateStrategy | None = None,
    ):
        super().__init__([member.optimizer for member in members], guard, strategy)
        self.members = tuple(members)
        self._parameters = {p.path: p for p in parameters}
        self._routes = dict(routes)
        self._aliases = find_aliases(model)
        self._prepared: set[str] = set()
        for path in routes:
            self._set_layout(path)
        for optimizer in self.optimizers:
            if "learning_rate" in optimizer._schedulers:
                optimizer.state.setdefault("scheduled", mx.array(True))
        self.init(model.trainable_parameters())
        self._primary = min((self._routes[path] for path in self._prepared), default=0)

    def _set_layout(self, path: str) -> None:
        self._members[self._routes[path]].set_layout(path, self._parameters[path].layout)

    @property
    def plan(self) -> Plan:
        """Who updates what, for every parameter that has been trainable so far.

        With several machines the bytes of state are those that one machine would keep.
        """
        sizes: Counter[tuple[int, str]] = Counter()
        for index, optimizer in enumerate(self.optimizers):
            for path, array in flatten(optimizer.state).items():
                while path and path not in self._parameters:
                    path = path.rpartition(".")[0]
                # A user's state may hold a plain number.
                sizes[index, path] += getattr(array, "nbytes", 0)
        whole = self.strategy.state_bytes()
        entries = []
        for p in self._parameters.values():
            if p.path in self._prepared:
                index = self._routes[p.path]
                member, size = self.members[index], sizes[index, p.path]
                size = whole.get(p.path, size)
                fields = (p.role, member.label, member.peak_rate, p.layout, size, p.note)
                entries.append(PlanEntry(p.path, p.shape, *fields))
        return Plan(entries)

    def __repr__(self) -> str:
        """One line for each member with parameters: its label, how many, the optimizer."""
        counts = Counter(self._routes[path] for path in self._prepared)
        lines = [
            f"{member.label}: {_counted(counts[index])}, {shown_optimizer(member.optimizer)}"
            for index, member in enumerate(self.members)
            if counts[index]
        ]
        return "\n  ".join(["RoutedOptimizer(", *lines, *self.guard.shown]) + "\n)"

    # Updates

    def init(self, parameters: dict) -> None:
        """Make the state of every parameter that has none yet.

        Raises:
            ValueError: Names every parameter that the model did not have when this was made, or
                that its member cannot take.
        """
        arrays = flatten(parameters)
        refuse_complex(arrays)
        new = [
            path
            for path, array in arrays.items()
            if path not in self._prepared
            and self._aliases.get(path) not in arrays
            and mx.issubdtype(array.dtype, mx.floating)
        ]
        for path in new:
            if path not in self._routes and path in self._aliases:
                # The name that MLX would train is frozen: this one gets the gradient.
                listed = self._aliases[path]
                self._parameters[path] = replace(self._parameters[listed], path=path)
                self._routes[path] = self._routes[listed]
                self._set_layout(path)
        if unknown := [path for path in new if path not in self._routes]:
            raise ValueError(
                f"create_optimizer was called with a model that has no {', '.join(unknown)}: "
                "update that whole model, or pass trees with its own paths; if it has grown, call "
                "create_optimizer again"
            )
        super().init(parameters)
        self._prepared.update(new)

    def split(self, tree: Any, index: int, path: str = "") -> Any:
        """The tree without the parameters of other members. Lists keep their length."""
        if not isinstance(tree, (dict, list, tuple)):
            return tree if self._routes.get(path) == index else None
        parts = {key: self.split(child, index, at) for key, at, child in children(tree, path)}
        if isinstance(tree, dict):
            return {key: part for key, part in parts.items() if part is not None}
        return [{} if part is None else part for part in parts.values()]

    # Rates

    @property
    def learning_rate(self) -> mx.array:
        """The rate of the first member with parameters. Setting it keeps the members' ratios.

        A number reaches compiled steps; a schedule set later needs them compiled again.
        """
        return self.optimizers[self._primary].learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate: Rate) -> None:
        learning_rate = check_rate("learning_rate", learning_rate, self.step)
        primary = self.members[self._primary]
        self._members[self._primary].warn_if_small(learning_rate)
        first, first_constant = self.learning_rate, _is_constant(primary.optimizer)
        for member, updater in zip(self.members, self._members, strict=True):
            if "learning_rate" not in member.optimizer.state:
                continue  # MLX's Adafactor with a rate relative to the weights
            rate = member.optimizer.state["learning_rate"]
            constant = first_constant & _is_constant(member.optimizer) & (first > 0) & (rate > 0)
            peaks = member.peak_rate, primary.peak_rate
            ratio = mx.where(constant, rate / first, peaks[0] / peaks[1] if peaks[1] else 1.0)
            if callable(learning_rate):
                updater.set_rate(scaled(learning_rate, float(ratio)))
            else:
                updater.set_rate(learning_rate * ratio)
        if value_if_evaluated(self.learning_rate) is not None:  # not traced
            # Another thread could not evaluate the rates later.
            mx.eval([member.optimizer.state.get("learning_rate") for member in self.members])

    def effective_learning_rates(self, model: dict) -> dict[str, float]:
        """Each parameter's own step size at the next update, by path, for logging.

        A member that is not of this suite reports its learning rate.
        """
        tree = trainable(model)
        rates: dict[str, float] = {}
        for index, member in enumerate(self._members):
            rates |= member.effective_learning_rates(self.split(tree, index))
        return {path: rates[path] for path in self._parameters if path in rates}


def _counted(count: int) -> str:
    return f"{count} parameter{'s' * (count != 1)}"


def _is_constant(optimizer: Optimizer) -> mx.array:
    """Whether no schedule moves the rate; an array, as a compiled step may have changed it."""
    if "learning_rate" not in optimizer._schedulers:
        return mx.array(True)
    return ~optimizer.state.get("scheduled", mx.array(True))
