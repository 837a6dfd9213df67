"""The few checks of options, and the one form of their messages: name, rule, value."""

from collections.abc import Callable, Collection, Iterable
from ctypes import c_float
from difflib import get_close_matches
from numbers import Real
from typing import Any

import mlx.core as mx

Rate = float | mx.array | Callable[[mx.array], Any]
"""A learning rate: a number, or a schedule, a function of the step (0 at the first update)."""


def check_number(
    name: str,
    value: Any,
    low: float = -float("inf"),
    high: float = float("inf"),
    ends: str = "[)",
) -> float:
    """The value, if it is a number in the interval, whose ends are drawn as ``[)`` or ``(]``."""
    inside = False
    if isinstance(value, Real) and not isinstance(value, bool):
        x = c_float(float(value)).value  # arithmetic is float32: 1e-46 is 0 there, and 1e39 inf
        inside = (x >= low if ends[0] == "[" else x > low) and (
            x <= high if ends[1] == "]" else x < high
        )
    if not inside:
        raise ValueError(f"{name} must be in {ends[0]}{low:g}, {high:g}{ends[1]}, got {value!r}")
    return float(value)


def check_pair(name: str, value: Any, *args: Any, **kwargs: Any) -> tuple[float, float]:
    """The value as a tuple, if it is a pair of numbers in the interval of :func:`check_number`."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ValueError(f"{name} must be a pair of numbers, got {value!r}")
    first, second = (check_number(f"{name}[{i}]", v, *args, **kwargs) for i, v in enumerate(value))
    return first, second


def check_integer(name: str, value: Any, low: int) -> int:
    """The value, if it is a whole number of at least ``low``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name} must be a whole number of at least {low}, got {value!r}")
    return value


def check_choice(name: str, value: Any, choices: Collection[Any]) -> Any:
    """The value, if it is one of the choices."""
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        listed = ", ".join(map(repr, choices))
        raise ValueError(f"{name} must be one of {listed}, got {value!r}")
    return value


def check_flags(**flags: Any) -> None:
    """Raise unless every keyword is True or False."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, got {value!r}")


def check_rate(name: str, value: Any) -> Rate:
    """The value, if it is a schedule, an array, or a number of at least 0."""
    if callable(value) or (isinstance(value, mx.array) and value.ndim == 0):
        return value
    if not isinstance(value, Real):
        raise ValueError(f"{name} must be a number or a function of the step, got {value!r}")
    return check_number(name, value, 0.0)


def hint(word: str, choices: Iterable[str]) -> str:
    """The nearest choice as a question, if one is near."""
    close = get_close_matches(word, list(choices), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
