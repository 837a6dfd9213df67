"""Learning rates as functions of the step. MLX asks for step 0 at an optimizer's first update."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from inspect import getclosurevars
from math import isfinite
from typing import Any

import mlx.core as mx

from .._validate import check_number, check_steps, is_of_mlx


@dataclass(frozen=True)
class Schedule:
    """A function of the step that knows its peak and prints as what made it.

    Wrap a function of your own in it where the peak must be known: ``create_optimizer`` needs it if
    ``rest_learning_rate`` is a number. It finds the peaks of MLX's own schedules itself.

    Attributes:
        function: Step, an array of size one, to rate.
        description: How it was made.
        peak: Largest rate, or None if it is not known.
        ratio: Factor on the function.

    Example:
        >>> import mlx.core as mx
        >>> from mlx_maxfactor import Schedule
        >>> Schedule(lambda step: 0.01 * mx.rsqrt(step + 1), "inverse root", peak=0.01)
        inverse root
    """

    function: Callable[[mx.array], Any]
    description: str
    peak: float | None = None
    ratio: float = 1.0

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise ValueError(f"function must be a function of the step, got {self.function!r}")
        if self.peak is not None:
            check_number("peak", self.peak, 0.0)

    def __call__(self, step: mx.array | int) -> mx.array:
        """The rate at a step."""
        return self.ratio * self.function(mx.array(step))

    def __repr__(self) -> str:
        return self.description if self.ratio == 1 else f"{self.ratio:g} * {self.description}"


def scaled(schedule: Callable[[mx.array], Any], ratio: float) -> Schedule:
    """A schedule times a constant; its peak is kept where it is known."""
    if not isinstance(schedule, Schedule):
        schedule = Schedule(schedule, described(schedule))
    peak = None if schedule.peak is None else schedule.peak * ratio
    return replace(schedule, ratio=schedule.ratio * ratio, peak=peak)


def with_peak(schedule: Callable[[mx.array], Any]) -> Callable[[mx.array], Any]:
    """A schedule of mlx's own with its peak; any other as it is.

    The peak is the largest rate over every step below a million and every thousandth of the next
    billion, in one call. Where it is infinite it is not known.
    """
    if getattr(schedule, "peak", None) is not None or not is_of_mlx(schedule):
        return schedule
    if not isinstance(schedule, Schedule):
        schedule = Schedule(schedule, described(schedule))
    million = mx.arange(10**6)
    peak = float(mx.max(schedule(mx.concatenate([million, 10**6 + 1000 * million]))))
    return replace(schedule, peak=peak) if isfinite(peak) else schedule


def described(schedule: Callable[[mx.array], Any]) -> str:
    """What a schedule prints as: how it was made, where that is known, or its name."""
    if isinstance(schedule, Schedule):
        return repr(schedule)
    name = getattr(schedule, "__qualname__", type(schedule).__qualname__)
    if not is_of_mlx(schedule):
        return name.rpartition(".")[2]
    arguments = dict(getclosurevars(schedule).nonlocals)
    parts = [described(x) for x in arguments.pop("schedules", ())]
    shown = [*parts, *(f"{key}={value}" for key, value in arguments.items())]
    return f"{name.partition('.')[0]}({', '.join(shown)})"


def warmup_cosine(
    learning_rate: float,
    total_steps: int,
    warmup_steps: int | None = None,
    min_ratio: float = 0.1,
    *,
    start_ratio: float = 0.0,
) -> Schedule:
    r"""Linear warm-up to the peak, then a cosine to ``min_ratio`` of it, then constant.

    With warm-up :math:`w`, total :math:`T`, floor :math:`r` and start :math:`a`, at step :math:`s`

    .. math::

        s < w:\ \eta \left(a + (1 - a) \tfrac{s}{w}\right), \qquad
        s \ge w:\ \eta \left(r + (1-r) \tfrac{1 + \cos \pi x}{2}\right),\
        x = \min\left(1, \tfrac{s - w}{T - w}\right)

    An MLX optimizer evaluates its schedule at step 0 for its first update. With ``start_ratio`` 0
    that first update moves nothing; ``start_ratio=1 / warmup_steps`` makes use of it.

    Args:
        learning_rate: η, the peak, reached at step ``warmup_steps``.
        total_steps: Step at which the floor is reached.
        warmup_steps: Length of the warm-up, at most ``total_steps``. Default None: a fifth of them,
            at most 2000.
        min_ratio: Floor over peak, in [0, 1]. Default 0.1.
        start_ratio: Rate at step 0 over peak, in [0, 1]. Default 0.

    Returns:
        A function of the step, for ``learning_rate`` of any MLX optimizer.

    Raises:
        ValueError: An argument outside its range.

    Example:
        >>> from mlx_maxfactor import warmup_cosine
        >>> schedule = warmup_cosine(1e-4, total_steps=10_000)
        >>> [f"{schedule(step).item():.1e}" for step in (0, 1000, 2000, 6000, 10_000)]
        ['0.0e+00', '5.0e-05', '1.0e-04', '5.5e-05', '1.0e-05']

    Reference:
        Loshchilov and Hutter, *SGDR*, 2017, arXiv 1608.03983.
    """
    learning_rate = check_number("learning_rate", learning_rate, 0.0, ends="()")
    total_steps = check_steps("total_steps", total_steps, 1)
    if warmup_steps is None:
        warmup_steps = min(2000, total_steps // 5)
    warmup_steps = check_steps("warmup_steps", warmup_steps, 0)
    min_ratio = check_number("min_ratio", min_ratio, 0.0, 1.0, "[]")
    start_ratio = check_number("start_ratio", start_ratio, 0.0, 1.0, "[]")
    if warmup_steps > total_steps:
        raise ValueError(
            f"warmup_steps must be at most total_steps ({total_steps}), got {warmup_steps}"
        )

    rate = _WarmupCosine(learning_rate, total_steps, warmup_steps, min_ratio, start_ratio)
    text = f"warmup_cosine({learning_rate:g}, {total_steps}, {warmup_steps}, {min_ratio:g}"
    text += f", start_ratio={start_ratio:g})" if start_ratio else ")"
    return Schedule(rate, text, peak=learning_rate)


@dataclass(frozen=True)
class _WarmupCosine:
    """The function of :func:`warmup_cosine`; not a closure, which could not be pickled."""

    learning_rate: float
    total_steps: int
    warmup_steps: int
    min_ratio: float
    start_ratio: float

    def __call__(self, step: mx.array) -> mx.array:
        step = step.astype(mx.float32)
        warm = self.start_ratio + (1 - self.start_ratio) * step / max(1, self.warmup_steps)
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        cosine = 0.5 * (1 + mx.cos(mx.pi * mx.minimum(progress, 1.0)))
        decayed = self.min_ratio + (1 - self.min_ratio) * cosine
        return self.learning_rate * mx.where(step < self.warmup_steps, warm, decayed)


def adaptive_schedule(
    initial_lr: float = 1e-3, warmup_steps: int = 500, decay_factor: float = 0.1
) -> Schedule:
    r"""Linear warm-up, then the inverse square root that MaxFactor's own rate follows.

    With warm-up :math:`w`, at step :math:`s`

    .. math::

        s < w:\ \eta \max(10^{-3}, s / w), \qquad
        s \ge w:\ \eta \max\left(\text{decay\_factor}, \sqrt{w / s}\right)

    Without warm-up the root is :math:`1 / \sqrt{s + 1}`.

    Args:
        initial_lr: η, the peak, reached at step ``warmup_steps``. Default 1e-3.
        warmup_steps: Length of the warm-up. Default 500.
        decay_factor: Floor over peak, in [0, 1]. Default 0.1.

    Returns:
        A function of the step, for ``learning_rate`` of any MLX optimizer.

    Raises:
        ValueError: An argument outside its range.

    Example:
        >>> from mlx_maxfactor import adaptive_schedule
        >>> schedule = adaptive_schedule()
        >>> [f"{schedule(step).item():.1e}" for step in (0, 250, 500, 2000, 10**6)]
        ['1.0e-06', '5.0e-04', '1.0e-03', '5.0e-04', '1.0e-04']
    """
    initial_lr = check_number("initial_lr", initial_lr, 0.0, ends="()")
    warmup_steps = check_steps("warmup_steps", warmup_steps, 0)
    decay_factor = check_number("decay_factor", decay_factor, 0.0, 1.0, "[]")

    def rate(step: mx.array) -> mx.array:
        step = step.astype(mx.float32)
        warm = mx.maximum(1e-3, step / max(1, warmup_steps))
        # Without warm-up the peak is at step 0, and step 1 is the second to decay.
        t = step if warmup_steps else step + 1
        decayed = mx.sqrt(max(1, warmup_steps) / mx.maximum(t, 1.0))
        shape = mx.where(step < warmup_steps, warm, mx.maximum(decayed, decay_factor))
        return initial_lr * shape

    text = f"adaptive_schedule({initial_lr:g}, {warmup_steps}, {decay_factor:g})"
    return Schedule(rate, text, peak=initial_lr)
