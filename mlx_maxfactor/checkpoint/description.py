"""Describe a run without its arrays, as JSON, and compare two descriptions."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import is_dataclass
from inspect import isfunction
from itertools import zip_longest
from typing import Any, cast

import mlx.core as mx
from mlx.optimizers import MultiOptimizer, Optimizer

from .._version import __version__
from ..schedules import Schedule, takes_any_step
from .file import kind_of

STEPS = [0, *sorted({round(10 ** (i / 10)) for i in range(61)})]
"""Steps at which schedules are compared: ten per decade, up to a million."""

SAMPLE = 1024
"""At least this many elements of a frozen array are hashed, or all if it has fewer."""


def describe(
    optimizer: Optimizer,
    weights: str,
    frozen: Mapping[str, mx.array],
    made: int = 0,
    average: Any = None,
) -> dict[str, Any]:
    """Describe a run as JSON: classes, options, rates, schedules, plan, hashes of frozen arrays.

    A user's own schedule is sampled only at steps that were already run: by this optimizer, or the
    ``made`` steps in a file. It may index a table, and MLX does not check the index.
    """
    description = {
        "library": __version__,
        "weights": weights,
        "optimizers": [
            {
                **_class_and_options(m),
                "built rate": _built_rate(m),
                "schedules": {
                    name: _sampled(schedule, max(made, int(cast(Any, m.step))))
                    for name, schedule in _schedules(m).items()
                },
            }
            for m in find_members(optimizer).values()
        ],
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


def find_used(optimizer: Optimizer) -> dict[int, str]:
    """Find the members that update any parameter. A router may have made others.

    Returns:
        A name for each, by index: its label or class, with its index if others share the name.
    """
    labels = {f"states.{i}.": m.label for i, m in enumerate(getattr(optimizer, "members", ()))}
    updating = {
        f"states.{cast(Any, optimizer).index_of(entry.path)}."
        for entry in getattr(optimizer, "plan", ())
    }
    names = {
        i: labels.get(prefix, type(member).__name__)
        for i, (prefix, member) in enumerate(find_members(optimizer).items())
        if prefix not in labels or prefix in updating
    }
    counts = Counter(names.values())
    return {i: f"optimizer {i}, {n}" if counts[n] > 1 else n for i, n in names.items()}


def _walk(optimizer: Optimizer, prefix: str = "") -> Iterator[tuple[str, Optimizer]]:
    """An optimizer and all that it contains, with the prefix of their state's names."""
    yield prefix, optimizer
    if isinstance(optimizer, MultiOptimizer):
        for i, member in enumerate(optimizer.optimizers):
            yield from _walk(member, f"{prefix}states.{i}.")


def _class_and_options(optimizer: Any) -> dict[str, Any]:
    """The class of an optimizer or an average, and its public attributes that are plain values."""
    public = {k: v for k, v in vars(optimizer).items() if k[0] != "_"}
    options = {k: v for k, v in public.items() if _is_plain(v)}
    named = {k: v for k, v in public.items() if isinstance(v, mx.Dtype) or is_dataclass(v)}
    options |= {k: str(v) for k, v in named.items()}
    options |= {k: v.__qualname__ for k, v in public.items() if isfunction(v)}
    if guard := public.get("guard"):
        options |= guard.options
    kind = type(optimizer)
    return {"class": _in_package(f"{kind.__module__}.{kind.__qualname__}"), "options": options}


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _built_rate(optimizer: Optimizer) -> float | None:
    """The constant rate it was built with. MLX's own optimizers do not remember theirs."""
    rate = getattr(optimizer, "built_rate", None)
    return None if rate is None else float(rate)


def _schedules(optimizer: Optimizer) -> dict[str, Callable[[mx.array], Any]]:
    """Its schedules by option name, without a rate schedule that a constant rate replaced."""
    schedules = dict(optimizer._schedulers)
    if _built_rate(optimizer) is not None:
        schedules.pop("learning_rate", None)
    return schedules


def _sampled(schedule: Callable[[mx.array], Any], made: int) -> dict[str, Any]:
    """A schedule's name, for messages, and its values at some steps, for comparison."""
    steps = STEPS if takes_any_step(schedule) else [step for step in STEPS if step <= made]
    unnamed = repr(schedule) if isinstance(schedule, Schedule) else type(schedule).__qualname__
    name = getattr(schedule, "__qualname__", unnamed)
    return {"name": name, "values": [_value(schedule, step) for step in steps]}


def _value(schedule: Callable[[mx.array], Any], step: int) -> float | None:
    """None on an error: a save must not fail because a table of rates ends early."""
    try:
        value = float(schedule(mx.array(step, mx.uint64)))
    except Exception:
        return None
    return float(f"{value:.6g}") if math.isfinite(value) else None


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
        place = f"optimizer {i}"
        yield from _different_optimizers(place, old, new)
        if i in schedules and same_class(old, new):
            yield from _different_schedules(place, old, new)
    for old, new in zip_longest(saved["wrappers"], live["wrappers"]):
        yield from _different_optimizers("what holds the optimizers", old, new)
    for old, new in zip_longest(saved["average"], live["average"]):
        yield from _different_optimizers("average", old, new)
    frozen = {**saved["frozen"], **live["frozen"]}
    others = [path for path in frozen if saved["frozen"].get(path) != live["frozen"].get(path)]
    if others:
        shown = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        yield (
            f"the frozen weights are not those it was trained on: {len(others)} of {len(frozen)} "
            f"arrays differ ({shown})"
        )
    for path in {**saved["plan"], **live["plan"]}:
        old, new = (run["plan"].get(path) for run in (saved, live))
        if old != new:
            yield f"plan, {path}: {_row(old, new)} in the file, {_row(new, old)} here"


def same_class(old: Mapping[str, Any] | None, new: Mapping[str, Any] | None) -> bool:
    """Whether both members exist and have the same class."""
    return old is not None and new is not None and old["class"] == new["class"]


def schedules_differ(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether the rate schedules of two members differ, or only one member has one."""
    pair = [member["schedules"].get("learning_rate") for member in (old, new)]
    return pair != [None, None] and _difference(*pair) is not None


def _row(row: list[Any] | None, other: list[Any] | None) -> str:
    """A readable row of the plan: optimizer and shape, and role and layout where they differ."""
    if not row:
        return "nothing"
    *rest, label = row
    shape = tuple(rest[0]) if rest and isinstance(rest[0], list) else rest[:1]
    beside = zip(rest[1:], (other or row)[1:-1], strict=False)
    return ", ".join([f"{label} {shape}", *(str(mine) for mine, its in beside if mine != its)])


def _different_optimizers(place: str, old: Any, new: Any) -> Iterator[str]:
    if not same_class(old, new):
        there, here = (o["class"] if o else "none" for o in (old, new))
        if _short(there) != _short(here):  # else only their modules tell them apart
            there, here = _short(there), _short(here)
        yield f"{place}: {there} in the file, {here} here"
        return
    place = f"{place}, {_short(old['class'])}"
    for option in sorted(old["options"].keys() | new["options"].keys()):
        a, b = old["options"].get(option), new["options"].get(option)
        if a != b:
            yield f"{place}: {option} is {a!r:.200} in the file, {b!r:.200} here"


def _different_schedules(place: str, old: Any, new: Any) -> Iterator[str]:
    for name in sorted(old["schedules"].keys() | new["schedules"].keys()):
        a, b = (member["schedules"].get(name) for member in (old, new))
        if (difference := _difference(a, b)) is not None:
            yield f"{place}, {_short(old['class'])}: {name} schedule {difference}"


def _difference(old: Mapping[str, Any] | None, new: Mapping[str, Any] | None) -> str | None:
    """How two schedules differ: the first step at which their values differ. None if they agree."""
    if old is None or new is None:
        names = [schedule and schedule["name"] for schedule in (old, new)]
        return f"is {names[0]} in the file, {names[1]} here"
    largest = max((abs(v) for v in old["values"] + new["values"] if v is not None), default=0.0)
    for step, a, b in zip(STEPS, old["values"], new["values"], strict=False):
        # Devices round a cosine differently, so a relative difference of 1e-5 is ignored.
        near = a is not None and b is not None and abs(a - b) <= 1e-5 * largest
        if not near and a != b:
            return (
                f"gives {a} at step {step} in the file, {b} here "
                f"({old['name']} in the file, {new['name']} here)"
            )
    return None


def _in_package(name: str) -> str:
    """The name from which a user imports a class."""
    homes = (home for home in ("mlx_maxfactor", "mlx.optimizers") if name.startswith(f"{home}."))
    return next((f"{home}.{_short(name)}" for home in homes), name)


def _short(name: str) -> str:
    return name.rpartition(".")[2]
