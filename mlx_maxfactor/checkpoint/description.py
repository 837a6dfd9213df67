"""Describe a run without its arrays, as JSON, and compare two descriptions."""

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import is_dataclass
from importlib.metadata import version
from inspect import isfunction
from itertools import zip_longest
from typing import Any, cast

import mlx.core as mx
from mlx.optimizers import MultiOptimizer, Optimizer

from ..engine.schedules import described
from .file import kind_of

SAMPLE = 1024
"""At least this many elements of a frozen array are hashed, or all if it has fewer."""


def describe(
    optimizer: Optimizer, weights: str, frozen: Mapping[str, mx.array], average: Any = None
) -> dict[str, Any]:
    """Describe a run as JSON: classes, options, rates, schedules, plan, hashes of frozen arrays."""
    description = {
        "library": version("mlx_maxfactor"),
        "weights": weights,
        "optimizers": [_member(o) for o in find_members(optimizer).values()],
        "wrappers": [
            _class_and_options(o) for _, o in _walk(optimizer) if isinstance(o, MultiOptimizer)
        ],
        "average": [] if average is None else [_class_and_options(average)],
        "plan": {
            entry.path: [list(entry.shape), entry.role, entry.layout, entry.optimizer]
            for entry in getattr(optimizer, "plan", ())
        },
        "frozen": _fingerprints(frozen),
    }
    return json.loads(json.dumps(description))


def find_members(optimizer: Optimizer) -> dict[str, Optimizer]:
    """Find the optimizers that update parameters, keyed by the prefix of their state's names."""
    return {name: o for name, o in _walk(optimizer) if not isinstance(o, MultiOptimizer)}


def find_used(optimizer: Optimizer) -> set[int]:
    """Indices of the members that update any parameter. A router may have made others."""
    if (plan := getattr(optimizer, "plan", None)) is None:
        return set(range(len(find_members(optimizer))))
    return {cast(Any, optimizer).index_of(entry.path) for entry in plan}


def _walk(optimizer: Optimizer, prefix: str = "") -> Iterator[tuple[str, Optimizer]]:
    """An optimizer and all that it contains, with the prefix of their state's names."""
    yield prefix, optimizer
    if isinstance(optimizer, MultiOptimizer):
        for i, member in enumerate(optimizer.optimizers):
            yield from _walk(member, f"{prefix}states.{i}.")


def _member(optimizer: Optimizer) -> dict[str, Any]:
    """Class, options, the constant rate it was built with, and how each schedule was made.

    MLX's own optimizers do not remember their rate. A constant rate may have replaced a schedule.
    """
    rate = getattr(optimizer, "built_rate", None)
    schedules = {name: described(schedule) for name, schedule in optimizer._schedulers.items()}
    if rate is not None:
        rate = float(rate)
        schedules.pop("learning_rate", None)
    return {**_class_and_options(optimizer), "built rate": rate, "schedules": schedules}


def _class_and_options(optimizer: Any) -> dict[str, Any]:
    """The class of an optimizer or an average, and its public attributes that are plain values."""
    public = {k: v for k, v in vars(optimizer).items() if k[0] != "_"}
    options = {k: v for k, v in public.items() if _is_plain(v)}
    named = {k: v for k, v in public.items() if isinstance(v, mx.Dtype) or is_dataclass(v)}
    options |= {k: str(v) for k, v in named.items()}
    options |= {k: v.__qualname__ for k, v in public.items() if isfunction(v)}
    if guard := public.get("guard"):
        options |= _class_and_options(guard)["options"]
    kind = type(optimizer)
    return {"class": _in_package(f"{kind.__module__}.{kind.__qualname__}"), "options": options}


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _fingerprints(arrays: Mapping[str, mx.array]) -> dict[str, str]:
    """The kind of each array and a hash of a sample of it, to avoid reading gigabytes."""
    samples = {path: _sample(array) for path, array in arrays.items()}
    mx.eval(samples)
    return {
        path: f"{kind_of(arrays[path])} {hashlib.sha256(cast(Any, sample)).hexdigest()[:16]}"
        for path, sample in samples.items()
    }


def _sample(array: mx.array) -> mx.array:
    """The bytes of elements spread over an array. The odd stride reaches every column."""
    stride = max(1, array.size // SAMPLE) | 1
    return mx.contiguous(mx.flatten(array)[::stride]).view(mx.uint8)


# Differences


def find_differences(
    saved: Mapping[str, Any], live: Mapping[str, Any], *, schedules: Collection[int]
) -> Iterator[str]:
    """Yield one line for each difference between two descriptions. Rates are not compared.

    Schedules are compared only for the members whose indices are in ``schedules``.
    """
    for i, (old, new) in enumerate(zip_longest(saved["optimizers"], live["optimizers"])):
        yield from _different_optimizers(f"optimizer {i}", old, new)
        if i in schedules and same_class(old, new):
            for option, there, here in _changed(old["schedules"], new["schedules"]):
                name = f"{name_of(i, new)}: {option} schedule"
                yield f"{name} is {there or 'none'} in the file, {here or 'none'} here"
    for part, place in {"wrappers": "what holds the optimizers", "average": "average"}.items():
        for old, new in zip_longest(saved[part], live[part]):
            yield from _different_optimizers(place, old, new)
    frozen = saved["frozen"].keys() | live["frozen"].keys()
    if others := [path for path, *_ in _changed(saved["frozen"], live["frozen"])]:
        shown = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        yield (
            f"the frozen weights are not those it was trained on: {len(others)} of {len(frozen)} "
            f"arrays differ ({shown})"
        )
    for path, old, new in _changed(saved["plan"], live["plan"]):
        yield f"plan, {path}: {_row(old)} in the file, {_row(new)} here"


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield each key whose values differ, with both values. None: there is no such key."""
    for key in {**old, **new}:
        if old.get(key) != new.get(key):
            yield key, old.get(key), new.get(key)


def name_of(index: int, member: Mapping[str, Any]) -> str:
    """How messages call a member."""
    return f"optimizer {index}, {_short(member['class'])}"


def same_class(old: Mapping[str, Any] | None, new: Mapping[str, Any] | None) -> bool:
    """Whether both members exist and have the same class."""
    return old is not None and new is not None and old["class"] == new["class"]


def _row(row: list[Any] | None) -> str:
    """A readable row of the plan."""
    if row is None:
        return "nothing"
    shape, role, layout, label = row
    return f"{label} {tuple(shape)}, {role}, {layout}"


def _different_optimizers(place: str, old: Any, new: Any) -> Iterator[str]:
    if not same_class(old, new):
        there, here = (o["class"] if o else "none" for o in (old, new))
        if _short(there) != _short(here):  # else only their modules tell them apart
            there, here = _short(there), _short(here)
        yield f"{place}: {there} in the file, {here} here"
        return
    for option, there, here in _changed(old["options"], new["options"]):
        name = f"{place}, {_short(old['class'])}: {option}"
        yield f"{name} is {there!r:.200} in the file, {here!r:.200} here"


def _in_package(name: str) -> str:
    """The name from which a user imports a class."""
    homes = (home for home in ("mlx_maxfactor", "mlx.optimizers") if name.startswith(f"{home}."))
    return next((f"{home}.{_short(name)}" for home in homes), name)


def _short(name: str) -> str:
    return name.rpartition(".")[2]
