"""The plan, and the optimizer that follows it: which parameter goes to which member."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.optimizers import MultiOptimizer, Optimizer

from ._validate import Rate, check_rate
from .guard import GuardedOptimizer, shown_optimizer
from .optimizers._base import Float32Optimizer, flatten, refuse_complex, trainable
from .optimizers._turns import Leaf
from .roles import Parameter, find_aliases
from .schedules import scaled


@dataclass(frozen=True)
class PlanEntry:
    """One trainable parameter: what it is and who updates it.

    Attributes:
        path: Its path in the model.
        shape: Its shape.
        role: One of ``roles.ROLES``.
        optimizer: Label of the member that updates it.
        rate: That member's rate, or the peak of its schedule where it is known, when it was made.
        layout: How it holds matrices, see ``functional.LAYOUTS``.
        state_bytes: Bytes of optimizer state that it costs.
        note: "guessed" for a head that was found last of all, "unexplained" for an array that
            belongs to no layer the router knows, else empty.
    """

    path: str
    shape: tuple[int, ...]
    role: str
    optimizer: str
    rate: float
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

    def __repr__(self) -> str:
        return str(self)

    @property
    def state_bytes(self) -> int:
        """Bytes of optimizer state in all."""
        return sum(entry.state_bytes for entry in self)

    def __str__(self) -> str:
        header = ("path", "shape", "role", "optimizer", "rate", "state bytes")
        rows = [
            (
                e.path,
                str(e.shape),
                f"{e.role} ({e.note})" if e.note else e.role,
                e.optimizer,
                f"{e.rate:.2g}",
                f"{e.state_bytes:,}",
            )
            for e in self
        ]
        total = (f"{len(self)} parameters", "", "", "total", "", f"{self.state_bytes:,}")
        widths = [max(map(len, column)) for column in zip(header, *rows, total, strict=True)]
        rule = tuple("-" * width for width in widths)

        def line(row: tuple[str, ...]) -> str:
            *left, number = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            return "  ".join([*left, number.strip().rjust(widths[-1])])

        return "\n".join(map(line, [header, rule, *rows, rule, total]))


@dataclass(frozen=True)
class Member:
    """An optimizer of the router's, the label that the plan shows, and its nominal rate.

    The nominal rate is a constant, or a schedule's peak; ratios between members are ratios of it
    where a schedule moves the rates themselves.
    """

    label: str
    optimizer: Optimizer
    nominal: float


class RoutedOptimizer(GuardedOptimizer):
    """Several optimizers behind one: each parameter goes to the member that its role asks for.

    Made by :func:`mlx_maxfactor.create_optimizer`. It works where any MLX optimizer does:
    ``optimizer.update(model, grads)``, inside ``mx.compile`` with ``optimizer.state`` captured, in
    mlx_lm's trainer. Layers may be frozen and unfrozen between steps; a compiled step must then be
    compiled again, as always in MLX.

    Args:
        model: The model; its trainable parameters get their state at once.
        parameters: Every parameter of the model with its role, the frozen ones too.
        members: The optimizers; the rate of the first with parameters stands for all.
        routes: Index of the member by path.
        max_grad_norm: As for ``GuardedOptimizer``.
        skip_nonfinite: Likewise; False by default.
        max_skipped: Likewise.

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
        max_skipped: int | None = None,
    ):
        nothing = [lambda *_: False] * (len(members) - 1)
        MultiOptimizer.__init__(self, [member.optimizer for member in members], nothing)
        self._set_guard(max_grad_norm, skip_nonfinite, max_skipped)
        self._members = tuple(members)
        self._parameters = {p.path: p for p in parameters}
        self._routes = dict(routes)
        self._aliases = find_aliases(model)
        self._prepared: set[str] = set()
        for path in routes:
            self._set_layout(path)
        self.init(model.trainable_parameters())
        used = [self._routes[path] for path in self._prepared]
        self._lead = min(used, default=0)

    def _set_layout(self, path: str) -> None:
        optimizer = self.optimizers[self._routes[path]]
        if isinstance(optimizer, Float32Optimizer):
            optimizer.layouts[path] = self._parameters[path].layout

    @property
    def plan(self) -> Plan:
        """Who updates what, for every parameter that has been trainable so far."""
        sizes: Counter[tuple[int, str]] = Counter()
        for index, optimizer in enumerate(self.optimizers):
            for path, array in flatten(optimizer.state).items():
                sizes[index, path.rpartition(".")[0]] += array.nbytes
        entries = []
        for p in self._parameters.values():
            if p.path in self._prepared:
                index = self._routes[p.path]
                member, size = self._members[index], sizes[index, p.path]
                entries.append(
                    PlanEntry(
                        p.path,
                        p.shape,
                        p.role,
                        member.label,
                        member.nominal,
                        p.layout,
                        size,
                        p.note,
                    )
                )
        return Plan(entries)

    def __repr__(self) -> str:
        """A line a member: its label, how many parameters it has so far, what it is."""
        counts = Counter(self._routes[path] for path in self._prepared)
        lines = [
            f"{member.label}: {_counted(counts[index])}, {shown_optimizer(member.optimizer)}"
            for index, member in enumerate(self._members)
        ]
        return "\n  ".join([f"{type(self).__name__}(", *lines, *self._shown_guard()]) + "\n)"

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

    def _index_of(self, path: str) -> int | None:
        return self._routes.get(path)

    def _is_ready(self, leaf: Leaf) -> bool:
        # Integer arrays belong to nobody.
        return super()._is_ready(leaf) or not mx.issubdtype(leaf.parameter.dtype, mx.inexact)

    def _part(self, tree: Any, index: int, path: str = "") -> Any:
        """The tree without what belongs to other members; lists keep their length."""
        if isinstance(tree, dict):
            prefix = f"{path}." if path else ""
            parts = {k: self._part(v, index, f"{prefix}{k}") for k, v in tree.items()}
            return {k: part for k, part in parts.items() if part is not None}
        if isinstance(tree, (list, tuple)):
            parts = [self._part(v, index, f"{path}.{i}") for i, v in enumerate(tree)]
            return [{} if part is None else part for part in parts]
        return tree if self._routes.get(path) == index else None

    # Rates

    @property
    def learning_rate(self) -> mx.array:
        """The rate of the first member with parameters. Setting it keeps the members' ratios.

        A number reaches compiled steps; a schedule set later needs them compiled again.
        """
        return self.optimizers[self._lead].learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate: Rate) -> None:
        learning_rate = check_rate("learning_rate", learning_rate, self.step)
        lead = self._members[self._lead]
        if isinstance(lead.optimizer, Float32Optimizer):
            lead.optimizer.warn_if_small(learning_rate)
        first, first_constant = self.learning_rate, _is_constant(lead.optimizer)
        for member in self._members:
            rate = member.optimizer.state.get("learning_rate", first)
            constant = first_constant & _is_constant(member.optimizer) & (first > 0) & (rate > 0)
            nominal = member.nominal / lead.nominal if member.nominal and lead.nominal else 1.0
            ratio = mx.where(constant, rate / first, nominal)
            if callable(learning_rate):
                set_rate(member.optimizer, scaled(learning_rate, float(ratio)))
            else:
                set_rate(member.optimizer, learning_rate * ratio)

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
                rate = float(optimizer.state.get("learning_rate", float("nan")))
                rates |= dict.fromkeys(flatten(part), rate)
        return {path: rates[path] for path in self._parameters if path in rates}


def _counted(count: int) -> str:
    return f"{count} parameter{'s' * (count != 1)}"


def set_rate(optimizer: Optimizer, rate: Rate) -> None:
    """Set the rate of any MLX optimizer: a number ends its schedule, a function starts one."""
    if isinstance(optimizer, Float32Optimizer):
        optimizer.set_rate(rate)
    elif callable(rate):
        optimizer._maybe_schedule("learning_rate", rate)
    else:
        optimizer._schedulers.pop("learning_rate", None)
        optimizer.learning_rate = rate


def _is_constant(optimizer: Optimizer) -> mx.array:
    """Whether no schedule moves the rate; an array, as a compiled step may have changed it."""
    if "learning_rate" not in optimizer._schedulers:
        return mx.array(True)
    return ~optimizer.state.get("scheduled", mx.array(True))
