"""MLX's own optimizers, with the methods that the engine and the router call."""

import math
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx.optimizers import MultiOptimizer, Optimizer
from mlx.utils import tree_map, tree_unflatten

from .._validate import Rate
from ..engine.trees import flatten
from .base import ELEMENTWISE_FLOPS, Float32Optimizer


def as_member(optimizer: Optimizer) -> Any:
    """The optimizer itself if it is one of this suite, or else MLX's behind the same methods."""
    own = isinstance(optimizer, Float32Optimizer) and not _updates_at_once(optimizer)
    return optimizer if own else ForeignOptimizer(optimizer)


def _updates_at_once(optimizer: Optimizer) -> bool:
    methods = Optimizer.apply_gradients, Float32Optimizer.apply_gradients
    return type(optimizer).apply_gradients not in methods


class ForeignOptimizer:
    """One of MLX's optimizers, or one that updates all of its parameters in one call.

    Args:
        optimizer: The optimizer. It is used as it is, with its own state.
    """

    elementwise = False

    def __init__(self, optimizer: Optimizer):
        self.optimizer = optimizer
        self.updates_at_once = _updates_at_once(optimizer)

    # Updates

    @property
    def state(self) -> dict:
        """The live state."""
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        own = type(self.optimizer).state
        if isinstance(self.optimizer, MultiOptimizer) and own is MultiOptimizer.state:
            for inner, given in zip(self.optimizer.optimizers, state["states"], strict=True):
                as_member(inner).state = given
        elif own is Optimizer.state:
            copied = tree_map(lambda array: array, state)
            self.optimizer.state.clear()
            self.optimizer.state.update(copied)
        else:
            self.optimizer.state = state

    @property
    def step(self) -> mx.array:
        """Number of updates. A MultiOptimizer counts in its members."""
        if "step" in self.state:
            return self.state["step"]
        inner: Any = self.optimizer
        return as_member(inner.optimizers[0]).step

    def owns(self, path: str) -> bool:
        """Whether it updates the parameter at ``path``: MLX's optimizers update all."""
        return True

    def advance(self) -> None:
        """Count an update, and move the schedules."""
        if self.updates_at_once:
            return  # it does so itself
        for key, schedule in self.optimizer._schedulers.items():
            new = schedule(self.step)
            if key == "learning_rate" and "scheduled" in self.state:
                new = mx.where(self.state["scheduled"], new, self.state[key])
            self.state[key] = new
        self.state["step"] = self.step + 1

    def group_of(self, path: str, parameter: mx.array) -> int | None:
        """All parameters in one call, or each alone."""
        return id(self) if self.updates_at_once else None

    def apply(
        self,
        paths: Sequence[str],
        gradients: list[mx.array],
        parameters: list[mx.array],
        states: list[dict],
    ) -> list[mx.array]:
        """The updated parameters."""
        if not self.updates_at_once:
            return [self.optimizer.apply_single(gradients[0], parameters[0], states[0])]
        trees = (tree_unflatten(list(zip(paths, x, strict=True))) for x in (gradients, parameters))
        updated = flatten(self.optimizer.apply_gradients(*trees))
        return [updated[path] for path in paths]

    def flops(self, shape: tuple[int, ...], layout: str) -> float:
        """The cost of an update, as for ``Float32Optimizer``."""
        return ELEMENTWISE_FLOPS * math.prod(shape)

    def layout_of(self, path: str) -> str:
        """MLX's optimizers know one layout."""
        return "batched"

    def set_layout(self, path: str, layout: str) -> None:
        """Nothing: MLX's optimizers know one layout."""

    # Rates

    def set_rate(self, rate: Rate) -> None:
        """Set the rate: a number ends its schedule, a function starts one."""
        if callable(rate):
            self.optimizer._maybe_schedule("learning_rate", rate)
            self.state["scheduled"] = mx.array(True)
            return
        self.optimizer.learning_rate = rate
        if "scheduled" in self.state:
            # The schedule stays: a compiled step computes it, and asks the state if it counts.
            self.state["scheduled"] = mx.array(False)

    def warn_if_small(self, rate: Any) -> None:
        """Nothing: any rate may be right."""

    def effective_learning_rates(self, model: Any) -> dict[str, float]:
        """The learning rate, by path."""
        rate = float(self.state.get("learning_rate", float("nan")))
        return dict.fromkeys(flatten(model), rate)
