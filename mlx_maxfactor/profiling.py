"""Measure the time and memory of a training step, as a whole and in parts."""

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any, NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.optimizers import MultiOptimizer, Optimizer
from mlx.utils import tree_map

from ._validate import check_flags, check_integer
from .combined import CombinedOptimizer
from .guard import Guard
from .optimizers.update_loop import StepDecision, UpdateLoop, find_slots, in_order
from .routing.routed import RoutedOptimizer
from .trees import flatten

WHOLE, FORWARD, GUARD, WAIT = "whole step", "forward and backward", "guard", "wait"


@dataclass(frozen=True)
class Cost:
    """Time and memory of a step or a part of it.

    Attributes:
        seconds: Time until all results are computed. Mean of the faster half of the rounds, because
            other load on the machine only adds time.
        python_seconds: The part of ``seconds`` before the call returned, when nothing is computed
            yet: Python, and MLX building the graph or submitting the compiled one.
        peak_bytes: Peak memory of all arrays of the process meanwhile.
    """

    seconds: float
    python_seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Breakdown:
    """The costs of one step, as a whole and in parts.

    Attributes:
        step: The whole step.
        parts: Each part by its name, in order.
        spread: Seconds of the shortest and the longest whole step.
    """

    step: Cost
    parts: Mapping[str, Cost]
    spread: tuple[float, float]

    @property
    def total(self) -> Cost:
        """The sum of the parts' seconds, and the largest of their peaks."""
        each = self.parts.values()
        seconds, python = sum(c.seconds for c in each), sum(c.python_seconds for c in each)
        return Cost(seconds, python, max(c.peak_bytes for c in each))

    @property
    def ratio(self) -> float:
        """Total seconds of the parts, divided by the seconds of the whole step."""
        return self.total.seconds / self.step.seconds


@dataclass(frozen=True)
class Profile:
    """What :func:`profile_step` measured. ``print(profile)`` shows it as a table.

    Attributes:
        eager: The step without ``mx.compile``.
        compiled: The step as one compiled function, and each part as one. None if the compiled step
            was not measured.
        rounds: How often each run was timed.
        held_bytes: Memory of the process's arrays before the step: weights, state, data.
        wait_seconds: Time to evaluate one number. Each part includes this overhead of submitting
            work and waiting for it.
    """

    eager: Breakdown
    compiled: Breakdown | None
    rounds: int
    held_bytes: int
    wait_seconds: float

    def __repr__(self) -> str:
        ways = {"eager": self.eager} | ({"compiled": self.compiled} if self.compiled else {})
        costs = [{**way.parts, "sum": way.total, WHOLE: way.step} for way in ways.values()]
        width = max(map(len, costs[0]))
        lines = [
            "".ljust(width) + "".join(f"{way:>13}{'Python':>10}{'peak MB':>9}" for way in ways)
        ]
        lines.append("-" * len(lines[0]))
        for name in costs[0]:
            cells = (
                f"{1e3 * cost.seconds:10.2f} ms{1e3 * cost.python_seconds:7.2f} ms"
                f"{cost.peak_bytes / 1e6:9.1f}"
                for cost in (each[name] for each in costs)
            )
            lines.append(name.ljust(width) + "".join(cells))
        lines.insert(-2, lines[1])
        for name, way in ways.items():
            low, high = (1e3 * seconds for seconds in way.spread)
            lines.append(
                f"{name}: the sum is {way.ratio:.2f} of the whole step, which took "
                f"{low:.2f} to {high:.2f} ms in {self.rounds} rounds"
            )
        if self.compiled:
            saved = 1 - self.compiled.step.seconds / self.eager.step.seconds
            lines.append(f"compiling saves {saved:.0%} of the eager step")
        lines.append(f"handing over and waiting take {1e3 * self.wait_seconds:.2f} ms of each part")
        return "\n".join([*lines, f"before the step {self.held_bytes / 1e6:.1f} MB are held"])


def profile_step(
    model: nn.Module,
    optimizer: Optimizer,
    loss_and_gradients: Callable[..., tuple[Any, Any]],
    *batch: Any,
    rounds: int = 9,
    compiled: bool = True,
) -> Profile:
    """Measure where the time and the memory of a training step go.

    MLX is lazy, and a compiled step is one graph, so nothing inside a step can be timed. Instead
    each part runs and is evaluated separately: loss and gradients; the guard; the update of each
    member of the optimizer, including the scaling of gradients. The time of an update that changes
    nothing is subtracted. Runs of the whole step alternate with runs of the parts, and the profile
    shows the ratio of the parts' total time to the whole step's. The total also counts what only a
    whole step can share or overlap: a kernel, a wait, Python that runs while the device computes.

    Every run makes the same step, on copies. Afterwards model, optimizer and random state hold the
    same arrays as before. ``mx.get_peak_memory`` is reset, and the cache is emptied. The copies of
    weights and state take memory meanwhile, but the peaks do not count it. Peaks include memory
    that MLX allocates in advance, which varies between runs on a CPU.

    Args:
        model: The model to train.
        optimizer: Any MLX optimizer. One with members has a line for each member.
        loss_and_gradients: The function that ``nn.value_and_grad(model, loss_of)`` returns.
        *batch: The arguments of ``loss_and_gradients``.
        rounds: How often each part is timed. Default 9.
        compiled: Whether to measure the compiled step as well. Default True.

    Returns:
        The profile. Print it to see the table.

    Raises:
        ValueError: ``rounds`` is not a whole number of at least 1, or the optimizer was made with
            ``group``.

    Example:
        >>> import mlx.core as mx
        >>> import mlx.nn as nn
        >>> from mlx_maxfactor import create_optimizer, profile_step
        >>> model = nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 1))
        >>> optimizer = create_optimizer(model, max_grad_norm=1.0)
        >>> loss_and_gradients = nn.value_and_grad(model, lambda x: mx.mean(model(x) ** 2))
        >>> profile = profile_step(model, optimizer, loss_and_gradients, mx.ones((4, 8)), rounds=2)
        >>> list(profile.eager.parts)
        ['forward and backward', 'guard', 'orthomaxfactor', 'adamw', 'adamw, no decay']
    """
    check_integer("rounds", rounds, 1)
    check_flags(compiled=compiled)
    if isinstance(optimizer, CombinedOptimizer) and optimizer.strategy.ranks > 1:
        raise ValueError(
            "the step of several ranks cannot be profiled: create the optimizer without group"
        )
    mx.eval(model.state, optimizer.state, batch)
    before = Snapshot(model, optimizer)
    try:
        optimizer.init(model.trainable_parameters())
        mx.eval(optimizer.state)
        held = mx.get_active_memory()
        kept = Snapshot(model, optimizer)
        modes = [False, True][: 1 + compiled]
        steps = [_Step(model, optimizer, loss_and_gradients, mode) for mode in modes]
        runs = [partial(run, batch) for step in steps for run in (step.whole, step.apart)]
        times = _times([*runs, _wait], kept, rounds)
        wait = fmean(each[WAIT].whole for each in _faster(times.pop()))
        peaks = [_peaks(run, kept) for run in runs]
        # Each step has two runs: the whole step, and its parts.
        eager, *rest = (
            _breakdown(times[i], times[i + 1], peaks[i], peaks[i + 1])
            for i in range(0, len(runs), 2)
        )
        return Profile(eager, rest[0] if rest else None, rounds, held, wait)
    finally:
        before.put_back()


class _Seconds(NamedTuple):
    whole: float
    python: float


Measure = Callable[..., tuple[Any, Any]]
"""Makes a call, evaluates its result and the arrays it changes, and returns result and measurement.

An optional third argument is called first. It does what the call does apart from the actual work:
passing arrays in and out. Its time is subtracted."""


Run = Callable[[Measure], dict[str, Any]]
"""Makes a step, whole or in parts. Returns the measurements by the name of each part."""


def _times(runs: Sequence[Run], kept: "Snapshot", rounds: int) -> list[list[dict[str, _Seconds]]]:
    """Time each run in several rounds. A first round, which compiles functions, is discarded."""
    times: list[list[dict[str, _Seconds]]] = [[] for _ in runs]
    for number in range(rounds + 1):
        for run, found in list(zip(runs, times, strict=True))[:: 1 if number % 2 else -1]:
            kept.copy()
            found.append(run(_seconds))
    return [found[1:] for found in times]


def _seconds(
    call: Callable[[], Any], changed: Any, idle: Callable[[], Any] | None = None
) -> tuple[Any, _Seconds]:
    beside = _seconds(idle, changed)[1] if idle else _Seconds(0.0, 0.0)
    start = time.perf_counter()
    result = call()
    called = time.perf_counter()
    mx.eval(result, changed)
    whole = time.perf_counter() - start
    return result, _Seconds(whole - beside.whole, called - start - beside.python)


def _wait(measure: Measure) -> dict[str, Any]:
    return {WAIT: measure(lambda: mx.array(0.0) + 1.0, [])[1]}


def _peaks(run: Run, kept: "Snapshot") -> dict[str, int]:
    """Peak bytes of each part, without the copies."""
    kept.put_back()
    others = mx.get_active_memory()
    kept.copy()
    return run(partial(_peak, mx.get_active_memory() - others))


def _peak(copies: int, call: Callable[[], Any], changed: Any, *_: Any) -> tuple[Any, int]:
    mx.clear_cache()
    mx.reset_peak_memory()
    # A memory limit would stop MLX from allocating in advance, but 0.32.1 then may wait forever.
    result = call()
    mx.eval(result, changed)
    return result, mx.get_peak_memory() - copies


def _breakdown(
    whole: Sequence[dict[str, _Seconds]],
    apart: Sequence[dict[str, _Seconds]],
    whole_peak: dict[str, int],
    peaks: dict[str, int],
) -> Breakdown:
    def cost(rounds: Sequence[dict[str, _Seconds]], name: str, peak: int) -> Cost:
        seconds, python = zip(*(each[name] for each in _faster(rounds)), strict=True)
        return Cost(fmean(seconds), fmean(python), peak)

    parts = {name: cost(apart, name, peak) for name, peak in peaks.items()}
    each = [found[WHOLE].whole for found in whole]
    return Breakdown(cost(whole, WHOLE, whole_peak[WHOLE]), parts, (min(each), max(each)))


def _faster(rounds: Sequence[dict[str, _Seconds]]) -> Sequence[dict[str, _Seconds]]:
    """The faster half of the rounds. Unlike medians, means of the parts add up."""
    ordered = sorted(rounds, key=lambda each: sum(seconds.whole for seconds in each.values()))
    return ordered[: (len(ordered) + 1) // 2]


class _Step:
    """A training step that can run as a whole or in parts."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        loss_and_gradients: Callable[..., tuple[Any, Any]],
        compiled: bool,
    ):
        def function(f: Callable[..., Any], *state: Any) -> Callable[..., Any]:
            return mx.compile(f, inputs=state, outputs=state) if compiled else f

        def step(*batch: Any) -> Any:
            value, gradients = loss_and_gradients(*batch)
            optimizer.update(model, gradients)
            return value

        self.model, self.optimizer = model, optimizer
        self.step = function(step, model.state, optimizer.state, mx.random.state)
        self.forward = function(loss_and_gradients, model.state, mx.random.state)
        self.guard = None
        if isinstance(optimizer, CombinedOptimizer) and optimizer.guard.is_active:
            self.guard = function(partial(_decide, optimizer.guard), optimizer.guard.counts)
        self.updates = [
            (name, member.state, function(update, member.state))
            for name, member, update in _members(optimizer)
        ]

    def whole(self, batch: Sequence[Any], measure: Measure) -> dict[str, Any]:
        """Run the step as a whole."""
        state = [self.model.state, self.optimizer.state, _random_key()]
        return {WHOLE: measure(lambda: self.step(*batch), state)[1]}

    def apart(self, batch: Sequence[Any], measure: Measure) -> dict[str, Any]:
        """Run the same step one part after the other."""
        costs, decision = {}, (None, None)
        state = [self.model.state, _random_key()]
        (_, gradients), costs[FORWARD] = measure(lambda: self.forward(*batch), state)
        if self.guard:
            guard = partial(self.guard, gradients)
            decision, costs[GUARD] = measure(guard, self.optimizer.state)
            del guard
        shares = _shares(self.optimizer, gradients)
        del gradients  # so that each update holds the last reference and frees as it goes
        for name, state, update in self.updates:
            share = shares.pop(0)
            if not flatten(share):
                continue
            idle = partial(self._update, _unchanged, [share], decision)
            call = partial(self._update, update, [share], decision)
            del share
            _, costs[name] = measure(call, [self.model.state, state], idle)
        return costs

    def _update(self, update: Callable[..., Any], share: list, decision: tuple) -> None:
        parameters = tree_map(lambda _, p: p, share[0], self.model)
        self.model.update(update(share.pop(), parameters, *decision))


def _unchanged(gradients: Any, parameters: Any, *_: Any) -> Any:
    return parameters


def _decide(guard: Guard, gradients: Any) -> tuple[Any, Any]:
    """Return the guard's decision on the gradients."""
    decision = guard.decide(list(flatten(gradients).values()))
    guard.count(decision)
    return decision.factor, decision.accepted


def _shares(optimizer: Optimizer, gradients: Any) -> list[Any]:
    """The gradients of each member."""
    if isinstance(optimizer, CombinedOptimizer):
        return [optimizer.split(gradients, i) for i in range(len(optimizer.optimizers))]
    if isinstance(optimizer, MultiOptimizer):
        return optimizer._split_dictionary(gradients)
    return [gradients]


def _members(optimizer: Optimizer) -> list[tuple[str, Optimizer, Callable[..., Any]]]:
    """Name, optimizer and update function of each member. The update takes the guard's decision."""
    members = []
    inner = optimizer.optimizers if isinstance(optimizer, MultiOptimizer) else [optimizer]
    for i, member in enumerate(inner):
        routed = isinstance(optimizer, RoutedOptimizer)
        name = optimizer.members[i].label if routed else type(member).__name__
        if name in [taken for taken, *_ in members]:
            name = f"{name} ({i + 1})"
        guarded = isinstance(optimizer, CombinedOptimizer)
        update = partial(_apply_member, optimizer, i) if guarded else partial(_apply, member)
        members.append((name, member, update))
    return members


def _apply(optimizer: Optimizer, gradients: Any, parameters: Any, *_: Any) -> Any:
    return optimizer.apply_gradients(gradients, parameters)


def _apply_member(
    optimizer: CombinedOptimizer, index: int, gradients: Any, parameters: Any, *decision: Any
) -> Any:
    made = StepDecision(*decision)
    rule = optimizer.begin_step([index], gradients, parameters, made)
    slots = find_slots(gradients, parameters, [member.state for member in optimizer.optimizers])
    return in_order(gradients, slots, UpdateLoop(made).update_all(slots, rule))


def _random_key() -> mx.array:
    return cast(Any, mx.random.state)[0]


class Snapshot:
    """The arrays of a model, an optimizer and the random state, to restore later.

    Containers are refilled and stay the same objects, because compiled functions hold them.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer):
        self._contents: dict[int, tuple[Any, Any]] = {}
        self._visit([model, optimizer])
        self._moving = {
            id(x) for x in flatten([model.trainable_parameters(), optimizer.state]).values()
        }
        self._key = cast(list[int], _random_key().tolist())

    def _visit(self, node: Any) -> None:
        if isinstance(node, (nn.Module, Optimizer, Guard)):
            self._visit(vars(node))
        if isinstance(node, (dict, list, set)):
            if id(node) in self._contents:
                return
            kind = next(kind for kind in (dict, list, set) if isinstance(node, kind))
            self._contents[id(node)] = node, kind(node)
        if isinstance(node, (dict, list, tuple)):
            for child in list(node.values()) if isinstance(node, dict) else node:
                self._visit(child)

    def put_back(self) -> None:
        """Restore every original array."""
        self._fill(lambda x: x)

    def copy(self) -> None:
        """Replace the arrays by copies. Arrays that a step releases are copied in memory."""
        self._fill(self._stand_in)
        mx.eval([container for container, _ in self._contents.values()])

    def _stand_in(self, x: Any) -> Any:
        if not isinstance(x, mx.array):
            return x
        # Always a new object: `x += 1` in a model would change the original.
        return mx.array(x) if id(x) in self._moving else copy.copy(x)

    def _fill(self, stand_in: Callable[[Any], Any]) -> None:
        for container, content in self._contents.values():
            if isinstance(content, dict):
                dict.clear(container)
                dict.update(container, {key: stand_in(x) for key, x in content.items()})
            elif isinstance(content, list):
                container[:] = map(stand_in, content)
            else:
                container.clear()
                container.update(content)
        high, low = self._key
        mx.random.seed(high << 32 | low)  # a key is the two halves of its seed
