"""The few checks of options, and the one form of their messages: name, rule, value."""

import math
import sys
import warnings
from collections.abc import Callable, Collection, Iterable
from ctypes import c_float
from difflib import get_close_matches
from inspect import getclosurevars
from numbers import Integral, Real
from typing import Any

import mlx.core as mx
import mlx.nn as nn

Rate = float | mx.array | Callable[[mx.array], Any]
"""A learning rate: a number, or a schedule, a function of the step (0 at the first update)."""

LARGEST_SEED = 2**32 - 1


def check_number(
    name: str, value: Any, low: float, high: float = math.inf, ends: str = "[)"
) -> float:
    """The value, if it is a number in the interval, whose ends are drawn as ``[)`` or ``(]``."""
    x = math.nan
    if isinstance(value, Real) and not isinstance(value, bool):
        try:  # arithmetic is float32: 1e-46 is 0 there, and 1e39 inf
            x = c_float(float(value)).value
        except OverflowError:  # a whole number beyond float64
            x = math.inf if str(value)[0] != "-" else -math.inf
    at_end = (x == low and ends[0] == "[") or (x == high and ends[1] == "]")
    if not (low < x < high or at_end):
        limits = f"{ends[0]}{low:g}, {high:g}{ends[1]}"
        raise ValueError(f"{name} must be in {limits}, got {shown(value)}")
    return float(value)


def check_not_negative(**numbers: Any) -> list[float]:
    """The values, if each is a number of at least 0."""
    return [check_number(name, value, 0.0) for name, value in numbers.items()]


def check_pair(name: str, value: Any, *args: Any, **kwargs: Any) -> tuple[float, float]:
    """The value as a tuple, if it is a pair of numbers in the interval of :func:`check_number`."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ValueError(f"{name} must be a pair of numbers, got {shown(value)}")
    first, second = (check_number(f"{name}[{i}]", v, *args, **kwargs) for i, v in enumerate(value))
    return first, second


def check_rising(name: str, value: Any, low: float, high: float) -> tuple[float, float]:
    """The value as a tuple, if it is a pair of numbers in [low, high], the first not larger."""
    pair = check_pair(name, value, low, high, "[]")
    if pair[0] > pair[1]:
        raise ValueError(f"{name} must rise, got {shown(value)}")
    return pair


def check_integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    """The value as an int, if it is a whole number, Python's or NumPy's, within the limits."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    number = int(value) if whole else low - 1
    if number < low or (high is not None and number > high):
        limits = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name} must be a whole number {limits}, got {shown(value)}")
    return number


def check_steps(name: str, value: Any, low: int) -> int:
    """As check_integer, but a division may have made the number: 3.0 is 3."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    whole = is_number and float(value).is_integer()
    return check_integer(name, int(float(value)) if whole else value, low)


def check_choice(name: str, value: Any, choices: Collection[Any]) -> Any:
    """The value, if it is one of the choices."""
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        listed = ", ".join(map(repr, choices))
        names = [choice for choice in choices if isinstance(choice, str)]
        raise ValueError(f"{name} must be one of {listed}, {got(value, names)}")
    return value


def check_flag(name: str, value: Any) -> bool:
    """The value, if it is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {shown(value)}")
    return value


def check_flags(**flags: Any) -> list[bool]:
    """The values, if each is True or False."""
    return [check_flag(name, value) for name, value in flags.items()]


def check_rate(name: str, value: Any, step: Any = 0) -> Rate:
    """The value, if it is a number of at least 0, an array of one, or a schedule that gives one.

    Traced arrays have no value yet and are accepted. A schedule is asked for its rate at ``step``,
    the only step that it was surely made for.
    """
    if callable(value):
        _check_schedule(name, value, step)
        return value
    if isinstance(value, mx.array) and value.size == 1:
        if (number := value_if_evaluated(value)) is not None:
            check_number(name, number, 0.0)
        return value
    if not isinstance(value, Real):
        raise ValueError(f"{name} must be a number or a function of the step, got {shown(value)}")
    return check_number(name, value, 0.0)


def _check_schedule(name: str, schedule: Callable[[mx.array], Any], step: Any) -> None:
    if isinstance(schedule, nn.Module):
        raise ValueError(f"{name} is a model: create_optimizer takes one, an optimizer its rate")
    try:
        rate = schedule(mx.array(step, mx.uint64))
    except TypeError as problem:
        raise ValueError(
            f"{name} must be a function of the step alone, got {shown(schedule)}: {problem}"
        ) from problem
    if isinstance(rate, mx.array) and rate.size == 1:
        rate = value_if_evaluated(rate.reshape(()))
    elif isinstance(rate, bool) or not isinstance(rate, Real):
        raise ValueError(
            f"{name} must be a function that returns one number a step, got {shown(rate)}"
        )
    if rate is not None:
        check_number(f"{name}, at step {shown(value_if_evaluated(step))},", rate, 0.0)


def is_of_mlx(schedule: Any) -> bool:
    """Whether mlx made a schedule: it takes any step then, and an array of steps.

    A function that reads a table must not be tried like that: MLX does not check an index.
    """
    schedule = getattr(schedule, "function", schedule)
    if getattr(schedule, "__module__", None) != "mlx.optimizers.schedulers":
        return False
    return all(map(is_of_mlx, getclosurevars(schedule).nonlocals.get("schedules", ())))


def value_if_evaluated(value: Any) -> Any:
    """What an array of one element holds; None while it is traced. All else as it is."""
    if not isinstance(value, mx.array):
        return value
    try:
        number = value.item()
    except ValueError:
        return None
    return float(f"{number:.7g}") if isinstance(number, float) else number  # float32 has no more


def warn(message: str) -> None:
    """Warn at the line of the caller's own code that led here, whatever lies between."""
    package, level, frame = __name__.partition(".")[0], 1, sys._getframe()
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] == package:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


# What a message says of a value


def shown(value: Any) -> str:
    """The value in one line, cut off where it is long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 100 else f"{text[:97]}..."


def got(value: Any, choices: Collection[str]) -> str:
    """The value and the nearest choice as a question; of a class, what to pass in its place."""
    if isinstance(value, type):
        name = value.__name__
        known_as = f", or the name {name.lower()!r}" if name.lower() in choices else ""
        return f"got the class {name}: pass an instance, {name}(...){known_as}"
    return f"got {shown(value)}{hint(str(value), choices)}"


def hint(word: str, choices: Iterable[str]) -> str:
    """The nearest choice as a question, if one is near, whatever the case of its letters."""
    lower = {choice.lower(): choice for choice in choices}
    close = get_close_matches(word.lower(), lower, n=1)
    return f" (did you mean {lower[close[0]]!r}?)" if close else ""
