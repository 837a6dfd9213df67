"""Measure where the time and the memory of a training step go, for `training.py --profile`."""

import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from statistics import fmean
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from mlx_maxfactor import RoutedOptimizer
from mlx_maxfactor.routing.plan import table

WHOLE, FORWARD, GUARD = "whole step", "forward and backward", "guard"


@dataclass(frozen=True)
class Cost:
    """Time and memory of a step or a part of it.

    Attributes:
        seconds: Time until all results are computed.
        python_seconds: The part of ``seconds`` before the call returned: Python, and MLX building
            the graph or submitting the compiled one.
        peak_bytes: Peak memory of all arrays of the process meanwhile.
    """

    seconds: float
    python_seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Breakdown:
    """The costs of one step, as a whole and in parts, and its shortest and longest time."""

    step: Cost
    parts: Mapping[str, Cost]
    spread: tuple[float, float]

    @property
    def total(self) -> Cost:
        """The sum of the parts' seconds, and the largest of their peaks."""
        each = self.parts.values()
        seconds, python = sum(c.seconds for c in each), sum(c.python_seconds for c in each)
        return Cost(seconds, python, max(c.peak_bytes for c in each))


@dataclass(frozen=True)
class Profile:
    """What :func:`profile_step` measured, "eager" and "compiled". It prints as a table."""

    ways: Mapping[str, Breakdown]
    rounds: int
    held_bytes: int

    def __repr__(self) -> str:
        columns = [{**way.parts, "sum": way.total, WHOLE: way.step} for way in self.ways.values()]
        head = ["", *(title for way in self.ways for title in (way, "Python", "peak MB"))]
        rows = [[name, *(x for each in columns for x in _cells(each[name]))] for name in columns[0]]
        lines = [table([head, *rows])]
        for name, way in self.ways.items():
            low, high = (1e3 * seconds for seconds in way.spread)
            lines.append(
                f"{name}: the sum is {way.total.seconds / way.step.seconds:.2f} of the whole step, "
                f"which took {low:.2f} to {high:.2f} ms in {self.rounds} rounds"
            )
        return "\n".join([*lines, f"before the step {self.held_bytes / 1e6:.1f} MB are held"])


def _cells(cost: Cost) -> list[str]:
    times = (cost.seconds, cost.python_seconds)
    return [*(f"{1e3 * seconds:.2f} ms" for seconds in times), f"{cost.peak_bytes / 1e6:.1f}"]


def profile_step(
    model: nn.Module,
    optimizer: RoutedOptimizer,
    loss_of: Callable[..., mx.array],
    *batch: Any,
    rounds: int = 9,
) -> Profile:
    """Measure the parts of a training step, eagerly and compiled.

    MLX is lazy, and a compiled step is one graph, so nothing inside a step can be timed. Instead
    each part runs by itself: loss and gradients; the guard's decision; each member's update. The
    sum also counts what a whole step shares or overlaps: a kernel, a wait, Python that runs while
    the device computes. It lacks the scaling by the guard.

    Copies of model and optimizer are trained, which the peaks do not count. The random state is
    restored, and ``mx.get_peak_memory`` is reset.

    Args:
        model: The model to train.
        optimizer: Its optimizer.
        loss_of: A function of the model and the batch that returns the loss.
        *batch: The arguments of ``loss_of`` after the model.
        rounds: How often each part is timed. Default 9.
    """
    mx.eval(model.state, optimizer.state, batch)
    high, low = cast(list[int], cast(Any, mx.random.state)[0].tolist())
    held = mx.get_active_memory()
    try:
        ways = {}
        for name, compiled in (("eager", False), ("compiled", True)):
            step = _Step(deepcopy(model), deepcopy(optimizer), loss_of, compiled)
            # The first round compiles, and replaces the arrays that the copies share.
            for run in (step.whole, step.apart):
                run(batch)
            copies = mx.get_active_memory() - held
            costs = [(step.whole(batch), step.apart(batch)) for _ in range(rounds)]
            whole, apart = ([pair[i] for pair in costs] for i in range(2))
            ways[name] = breakdown(whole, apart, copies)
            del step, run
        return Profile(ways, rounds, held)
    finally:
        mx.random.seed(high << 32 | low)  # a key is the two halves of its seed


def breakdown(
    whole: Sequence[dict[str, Cost]], apart: Sequence[dict[str, Cost]], copies: int = 0
) -> Breakdown:
    """The costs over all rounds, without the bytes of the copies."""
    times = [each[WHOLE].seconds for each in whole]
    return Breakdown(
        _mean(whole, copies)[WHOLE], _mean(apart, copies), spread=(min(times), max(times))
    )


def _mean(rounds: Sequence[dict[str, Cost]], copies: int) -> dict[str, Cost]:
    """The means of the faster half of the rounds: other load on the machine only adds time."""
    ordered = sorted(rounds, key=lambda each: sum(cost.seconds for cost in each.values()))
    faster = ordered[: (len(ordered) + 1) // 2]
    return {
        name: Cost(
            fmean(each[name].seconds for each in faster),
            fmean(each[name].python_seconds for each in faster),
            max(each[name].peak_bytes for each in rounds) - copies,
        )
        for name in rounds[0]
    }


def measured(call: Callable[[], Any], changed: Any) -> tuple[Any, Cost]:
    """The result of a call, and what it cost to compute it and the arrays that it changes."""
    mx.reset_peak_memory()
    start = time.perf_counter()
    result = call()
    called = time.perf_counter()
    mx.eval(result, changed)
    seconds = time.perf_counter() - start
    return result, Cost(seconds, called - start, mx.get_peak_memory())


class _Step:
    """A training step that can run as a whole or in parts."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: RoutedOptimizer,
        loss_of: Callable[..., mx.array],
        compiled: bool,
    ):
        def function(f: Callable[..., Any], *state: Any) -> Callable[..., Any]:
            return mx.compile(f, inputs=state, outputs=state) if compiled else f

        def step(*batch: Any) -> Any:
            value, gradients = loss_and_gradients(model, *batch)
            optimizer.update(model, gradients)
            return value

        def decide(gradients: Any) -> Any:
            decision = optimizer.guard.decide(
                [cast(mx.array, g) for _, g in tree_flatten(gradients)]
            )
            return decision.factor, decision.accepted

        loss_and_gradients = nn.value_and_grad(model, loss_of)
        optimizer.init(model.trainable_parameters())
        self.model, self.optimizer = model, optimizer
        self.state = [model.state, optimizer.state, mx.random.state]
        self.step = function(step, *self.state)
        self.forward = function(
            lambda *batch: loss_and_gradients(model, *batch), model.state, mx.random.state
        )
        self.decide = function(decide)
        self.updates = [function(m.apply_gradients, m.state) for m in optimizer.optimizers]

    def whole(self, batch: Sequence[Any]) -> dict[str, Cost]:
        """Run the step as a whole."""
        return {WHOLE: measured(lambda: self.step(*batch), self.state)[1]}

    def apart(self, batch: Sequence[Any]) -> dict[str, Cost]:
        """Run the same step one part after the other."""
        costs, optimizer = {}, self.optimizer
        (_, gradients), costs[FORWARD] = measured(lambda: self.forward(*batch), self.state)
        if optimizer.guard.is_active:
            _, costs[GUARD] = measured(lambda: self.decide(gradients), [])
        for i, (member, update) in enumerate(zip(optimizer.members, self.updates, strict=True)):
            share = optimizer.split(gradients, i)
            if tree_flatten(share):
                of_share = tree_map(lambda _, p: p, share, self.model)
                new, costs[member.label] = measured(
                    lambda f=update, g=share, p=of_share: f(g, p), self.state
                )
                self.model.update(new)
        return costs
