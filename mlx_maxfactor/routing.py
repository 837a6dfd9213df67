"""The plan, and the optimizer that follows it: which parameter goes to which member."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.optimizers import MultiOptimizer, Optimizer
from mlx.utils import tree_merge

from ._validate import Rate, check_rate
from .guard import GuardedOptimizer
from .optimizers._base import Float32Optimizer, flatten, trainable
from .roles import Parameter, find_aliases
from .schedules import Schedule, scaled


@dataclass(frozen=True)
class PlanEntry:
    """One trainable parameter: what it is and who updates it.

    Attributes:
        path: Its path in the model.
        shape: Its shape.
        role: One of ``roles.ROLES``.
        optimizer: Label of the member that updates it.
        layout: How it holds matrices, see ``functional.LAYOUTS``.
        state_bytes: Bytes of optimizer state that it costs.
        note: "guessed" for a head that was found last of all, "unexplained" for an array that
            belongs to no layer the router knows, else empty.
    """

    path: str
    shape: tuple[int, ...]
    role: str
    optimizer: str
    layout: str
    state_bytes: int
    note: str


class Plan(Sequence[PlanEntry]):
    """The trainable parameters, in order of definition. ``print(plan)`` shows them as a table."""

    def __init__(self, entries: Sequence[PlanEntry]):
        self.entries = tuple(entries)

    def __getitem__(self, index: Any) -> Any:
        return self.entries[index]

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def state_bytes(self) -> int:
        """Bytes of optimizer state in all."""
        return sum(entry.state_bytes for entry in self)

    def __str__(self) -> str:
        header = ("path", "shape", "role", "optimizer", "state bytes")
        rows = [
            (
                e.path,
                str(e.shape),
                f"{e.role} ({e.note})" if e.note else e.role,
                e.optimizer,
                f"{e.state_bytes:,}",
            )
            for e in self
        ]
        total = (f"{len(self)} parameters", "", "", "total", f"{self.state_bytes:,}")
        widths = [max(map(len, column)) for column in zip(header, *rows, total, strict=True)]
        rule = tuple("-" * width for width in widths)

        def line(row: tuple[str, ...]) -> str:
            *left, number = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            return "  ".join([*left, number.strip().rjust(widths[-1])])

        return "\n".join(map(line, [header, rule, *rows, rule, total]))


@dataclass(frozen=True)
class Member:
    """An optimizer of the router's, and the label that the plan shows."""

    label: str
    optimizer: Optimizer


class RoutedOptimizer(GuardedOptimizer):
    """Several optimizers behind one: each parameter goes to the member that its role asks for.

    Made by :func:`mlx_maxfactor.create_optimizer`. It works where any MLX optimizer does:
    ``optimizer.update(model, grads)``, inside ``mx.compile`` with ``optimizer.state`` captured, in
    mlx_lm's trainer. Layers may be frozen and unfrozen between steps; a compiled step must then be
    compiled again, as always in MLX.

    Args:
        model: The model; its trainable parameters get their state at once.
        parameters: Every parameter of the model with its role, the frozen ones too.
        members: The optimizers; the first one's rate stands for all.
        routes: Index of the member by path.
        max_grad_norm: As for ``GuardedOptimizer``.
        skip_nonfinite: Likewise; False by default.

    Raises:
        ValueError: Names every parameter that its member cannot take.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Sequence[Parameter],
        members: Sequence[Member],
        routes: Mapping[str, int],
        *,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
    ):
        filters = [lambda path, *_, i=i: routes.get(path) == i for i in range(len(members) - 1)]
        MultiOptimizer.__init__(self, [member.optimizer for member in members], filters)
        self._set_guard(max_grad_norm, skip_nonfinite)
        self._members = tuple(members)
        self._parameters = {p.path: p for p in parameters}
        self._routes = dict(routes)
        self._aliases = find_aliases(model)
        self._prepared: set[str] = set()
        peaks = [_peak_rate(optimizer) for optimizer in self.optimizers]
        self._ratios = [peak / peaks[0] if peaks[0] else 1.0 for peak in peaks]
        for path, index in routes.items():
            optimizer = members[index].optimizer
            if isinstance(optimizer, Float32Optimizer):
                optimizer.layouts[path] = self._parameters[path].layout
        self.init(model.trainable_parameters())

    @property
    def plan(self) -> Plan:
        """Who updates what, for every parameter that has been trainable so far."""
        return Plan([self._entry(p) for p in self._parameters.values() if p.path in self._prepared])

    def _entry(self, p: Parameter) -> PlanEntry:
        member = self._members[self._routes[p.path]]
        leaf: Any = member.optimizer.state
        for key in p.path.split("."):
            leaf = leaf[int(key) if isinstance(leaf, (list, tuple)) else key]
        size = sum(array.nbytes for array in flatten(leaf).values())
        return PlanEntry(p.path, p.shape, p.role, member.label, p.layout, size, p.note)

    # Updates

    def init(self, parameters: dict) -> None:
        """Make the state of every parameter that has none yet.

        Raises:
            ValueError: Names every parameter that the model did not have when this was made, or
                that its member cannot take.
        """
        new = [
            path
            for path, array in flatten(parameters).items()
            if path not in self._prepared
            and path not in self._aliases
            and mx.issubdtype(array.dtype, mx.floating)
        ]
        if unknown := [path for path in new if path not in self._routes]:
            raise ValueError(
                f"the model did not have these parameters when create_optimizer was called: "
                f"{', '.join(unknown)}; call it after the model is complete"
            )
        if new:
            for index, optimizer in enumerate(self.optimizers):
                optimizer.init(self._part(parameters, index))
            self._prepared.update(new)

    def _updated(self, gradients: dict, parameters: dict) -> dict:
        updated: Any = {}
        for index, optimizer in enumerate(self.optimizers):
            part = optimizer.apply_gradients(self._part(gradients, index), parameters)
            updated = tree_merge(updated, part)
        return updated

    def _part(self, tree: Any, index: int, path: str = "") -> Any:
        """The tree without what belongs to other members; lists keep their length."""
        if isinstance(tree, dict):
            prefix = f"{path}." if path else ""
            parts = {k: self._part(v, index, prefix + k) for k, v in tree.items()}
            return {k: part for k, part in parts.items() if part is not None}
        if isinstance(tree, (list, tuple)):
            parts = [self._part(v, index, f"{path}.{i}") for i, v in enumerate(tree)]
            return [{} if part is None else part for part in parts]
        return tree if self._routes.get(path) == index else None

    # Rates

    @property
    def learning_rate(self) -> mx.array:
        """The rate of the first member. Setting it keeps the ratios between the members.

        A number reaches compiled steps; a schedule set later needs them compiled again.
        """
        return self.optimizers[0].learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate: Rate) -> None:
        check_rate("learning_rate", learning_rate)
        first = self.learning_rate
        for optimizer, nominal in zip(self.optimizers, self._ratios, strict=True):
            # At the start of a warm-up all rates are 0: then the ratio of the peaks.
            ratio = mx.where(first > 0, optimizer.learning_rate / first, nominal)
            if callable(learning_rate):
                optimizer.learning_rate = scaled(learning_rate, float(ratio))
            else:
                optimizer.learning_rate = learning_rate * ratio

    def effective_learning_rates(self, model: dict) -> dict[str, float]:
        """Each parameter's own step size at the next update, by path, for logging.

        A member that is not of this suite reports its learning rate.
        """
        tree = trainable(model)
        rates: dict[str, float] = {}
        for index, optimizer in enumerate(self.optimizers):
            part = self._part(tree, index)
            if isinstance(optimizer, Float32Optimizer):
                rates |= optimizer.effective_learning_rates(part)
            else:
                rates |= dict.fromkeys(flatten(part), float(optimizer.learning_rate))
        return {path: rates[path] for path in self._parameters if path in rates}


def _peak_rate(optimizer: Optimizer) -> float:
    schedule = optimizer._schedulers.get("learning_rate")
    if isinstance(schedule, Schedule) and schedule.peak is not None:
        return schedule.peak
    return float(optimizer.learning_rate)
