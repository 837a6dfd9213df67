"""Save and load a training run in one file, written completely or not at all."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.optimizers import Optimizer
from mlx.utils import tree_map

from .._validate import check_choice, check_flags
from ..engine.trees import at, flatten
from ..engine.weight_average import WeightAverage
from ..routing.combined import UpdateStrategy
from ..routing.roles import find_aliases
from . import description, file
from .file import CheckpointError, kind_of

FORMATS = ("4",)
"""Format versions that can be read. The last one is written."""

STATE = "_run.optimizer."
AVERAGE = "_run.average."
KEY = "_run.random"
"""Names, and prefixes of names, of arrays that are not weights. MLX never gives a weight a name
that begins with _. ``KEY`` holds one random key, or one row per rank.
"""

SHOWN = 10
"""The most differences that a message lists."""

REMEDY = (
    "build both as they were when it was saved, or keep the rates of this optimizer with "
    'rates="here", or load what fits with strict=False'
)


class Place(NamedTuple):
    """The place of an array in a live model or state."""

    container: Any
    key: Any

    @property
    def array(self) -> mx.array:
        """The array at this place. A schedule may have put a number there."""
        value = self.container[self.key]
        return value if isinstance(value, mx.array) else mx.array(value)


class Extra(dict[str, Any]):
    """The ``extra`` values of ``save_checkpoint``.

    Attributes:
        differences: Rates that differ from the file's. With ``strict=False`` also everything in the
            file that did not fit and was not loaded.
    """

    differences: tuple[str, ...] = ()


def save_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizer,
    /,
    *,
    weights: Literal["all", "trainable"] = "all",
    average: WeightAverage | None = None,
    **extra: Any,
) -> None:
    """Write weights, optimizer state, random state and ``extra`` to one ``.safetensors`` file.

    The file is written under another name, synced, and renamed. A reader finds the complete
    old or new file. The header holds a SHA-256 of every byte. Weights have their own names, so
    ``model.load_weights(path, strict=False)`` and ``mlx_lm.lora --resume-adapter-file`` read them.
    ``mlx_lm.fuse`` and ``mlx_lm.load`` refuse a file that holds more than adapters: write one for
    them with ``mx.save_safetensors``.

    Args:
        path: The file. Its folder must exist.
        model: The model.
        optimizer: Any MLX optimizer. If it has no state yet, it is initialized.
        weights: "all" also saves the frozen weights. "trainable", for LoRA and QLoRA, saves the
            trained weights, the running statistics of BatchNorm, and a hash of about 1,000 elements
            of each frozen array, so that a load detects a different base model. Use "all" if your
            model changes other frozen arrays.
        average: A ``WeightAverage`` to save as well.
        **extra: JSON values to save: an epoch, the state of a data loader. Scalars of NumPy and MLX
            count as numbers.

    Raises:
        CheckpointError: ``extra`` is not JSON, or the file cannot be written. An existing
            file is kept.

    Example:
        >>> import mlx.nn as nn
        >>> from tempfile import mkdtemp
        >>> from mlx_maxfactor import create_optimizer, load_checkpoint, save_checkpoint
        >>> model = nn.Linear(3, 2)
        >>> optimizer = create_optimizer(model)
        >>> path = mkdtemp() + "/run.safetensors"
        >>> save_checkpoint(path, model, optimizer, epoch=3)
        >>> load_checkpoint(path, model, optimizer)
        {'epoch': 3}
    """
    _check_arguments(path, model, optimizer)
    check_choice("weights", weights, ("all", "trainable"))
    for name, value in extra.items():
        try:  # refuse what cannot be read back
            json.loads(json.dumps({name: value}, default=_scalar))
        except (TypeError, ValueError, RecursionError) as problem:
            message = f"extra must be JSON values, and {name!r} is not: {problem}"
            raise CheckpointError(message) from problem
    optimizer.init(model.trainable_parameters())  # of layers that were just unfrozen, too
    kept, frozen = _find_weights(model, optimizer, weights)
    run = description.describe(optimizer, weights, _arrays_at(frozen), average)
    arrays = _arrays_at(kept | _find_state(optimizer, average))
    strategy = _strategy_of(optimizer)
    arrays[KEY] = strategy.gather(mx.array(cast(Any, mx.random.state)[0]))
    metadata = {"format": FORMATS[-1], "run": json.dumps(run)}
    metadata["extra"] = json.dumps(extra, default=_scalar)

    def write(whole: dict[str, mx.array]) -> None:
        named = {STATE + name: array for name, array in whole.items()}
        file.write(Path(path), arrays | named, metadata)

    strategy.with_whole_state(write)


def load_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizer,
    *,
    strict: bool = True,
    rates: Literal["built", "file", "here"] = "built",
    average: WeightAverage | None = None,
) -> Extra:
    """Restore a run into live objects, so that a step compiled before the load sees it.

    Everything is checked before anything changes. Then the arrays are replaced one by one, so no
    memory for a second model is needed. If the disk fails during that, the error says that model
    and optimizer are half loaded.

    With several ranks, each rank gets its own random state back. Additional ranks get new random
    states, unless all ranks had the same one.

    Args:
        path: A file of ``save_checkpoint``. It holds arrays and JSON; loading it runs no code.
        model: The model, built as when it was saved.
        optimizer: The optimizer, built as when it was saved.
        strict: False loads what fits and lists the rest in ``.differences``. A damaged file, or one
            in which no weight fits, is still an error.
        rates: "built" uses the file's rates, even if they were set by hand, as long as both
            optimizers were built with the same rate. If this optimizer was built with another
            constant rate, its new rate is used. "file" uses the file's rates. "here" uses the rates
            and schedules of this optimizer and does not compare schedules. MLX's own optimizers do
            not remember the rate they were built with, and use the file's.
        average: The ``WeightAverage`` that was saved. If the file holds one, it must be passed,
            except with ``strict=False``.

    Returns:
        The ``extra`` values, a dict, with ``.differences``.

    Raises:
        CheckpointError: The file is damaged, or belongs to another model or optimizer. The message
            lists the first differences, and ``differences`` holds all. Model, optimizer and random
            state are unchanged.
    """
    _check_arguments(path, model, optimizer)
    check_flags(strict=strict)
    check_choice("rates", rates, ("built", "file", "here"))
    path = Path(path)
    saved = file.read(path, FORMATS)
    try:
        with _undone_on_error(optimizer):
            loading = _Loading(saved, model, optimizer, average, rates)
            loading.check(strict)
    except CheckpointError as problem:
        known = problem.differences, problem.remedy
        raise CheckpointError(f"{path} {problem.problem}", *known) from None
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as problem:
        raise CheckpointError(f"{path} was not loaded: {problem}") from problem
    try:
        loading.apply()
    except RuntimeError as problem:
        raise CheckpointError(
            f"{path} could not be read to its end ({problem}): model and optimizer are half "
            "loaded, so load it again, or another one, before you go on"
        ) from problem
    return loading.extra


class _Loading:
    """A file and the live run: what fits, what differs, whose rates are used."""

    def __init__(
        self, saved: file.Contents, model: nn.Module, optimizer: Optimizer, average: Any, rates: str
    ):
        (metadata, self.arrays), self.rates = saved, rates
        self.saved = json.loads(metadata["run"])
        self.extra = Extra(json.loads(metadata["extra"]))
        key, strategy = self.arrays.pop(KEY, None), _strategy_of(optimizer)
        if key is None or key.dtype != mx.uint32 or key.shape[-1:] != (2,) or key.ndim > 2:
            raise CheckpointError("is damaged: its random key is missing")
        self.key = _own_key(key, strategy.rank, strategy.ranks)
        self.kinds = {name: kind_of(array) for name, array in self.arrays.items()}
        optimizer.init(model.trainable_parameters())
        kept, frozen = _find_weights(model, optimizer, self.saved["weights"])
        self.weights = kept | frozen
        self.members = description.find_members(optimizer)
        self.used = description.find_used(optimizer)
        arrays = _arrays_at(frozen)
        self.live = description.describe(optimizer, self.saved["weights"], arrays, average)
        state = _find_state(optimizer, average)
        spread = {STATE + name: x for name, x in strategy.spread_state().items()}
        self.places = {**self.weights, **state}
        self.here = {name: kind_of(x) for name, x in (_arrays_at(self.places) | spread).items()}
        self.expected = {**kept, **state, **spread}.keys()
        self.kept_here: set[str] = set()
        """Names of state arrays that keep their live values, whatever the file holds."""

    def check(self, strict: bool) -> None:
        """Find the differences, and raise if they are not allowed."""
        notes = self._settle_rates()
        compared = self.used if self.rates != "here" else ()
        differences = [
            *description.find_differences(self.saved, self.live, schedules=compared),
            *self._different_arrays(),
        ]
        lines = [line[:500] for line in differences[:SHOWN]]
        lines += [f"and {len(differences) - SHOWN} more"] * (len(differences) > SHOWN)
        listed = "\n  ".join(["", *lines])
        if differences and strict:
            problem = f"does not fit this model and optimizer:{listed}"
            raise CheckpointError(problem, differences, REMEDY)
        if self.weights and not self._fitting() & self.weights.keys():
            raise CheckpointError(f"holds no weight that fits this model:{listed}", differences)
        self.extra.differences = (*notes, *differences)

    def apply(self) -> None:
        """Put the arrays that fit into the live containers, which stay the same objects."""
        high, low = self.key
        for name in self._fitting():
            # One at a time: the old array is released before the next one is read.
            array = self.arrays.pop(name)
            if name not in self.places:  # another rank has it
                continue
            mx.eval(array)
            container, key = self.places[name]
            number = isinstance(container[key], (int, float))
            container[key] = type(container[key])(array.item()) if number else array
        mx.random.seed(high << 32 | low)  # a key is the two halves of its seed

    def _fitting(self) -> set[str]:
        return {name for name, _ in self.kinds.items() & self.here.items()} - self.kept_here

    def _different_arrays(self) -> Iterator[str]:
        """A line for each array that does not fit, weights first."""
        names = {**self.kinds, **dict.fromkeys(self.expected)}
        for name in sorted(names, key=lambda name: name.startswith(STATE)):
            old, new = self.kinds.get(name, "missing"), self.here.get(name, "missing")
            if name not in self.kept_here and old != new:
                yield f"{name.removeprefix('_run.')}: {old} in the file, {new} here"

    def _settle_rates(self) -> list[str]:
        """Decide whose rates and states to use. Return what the user should know of it."""
        notes: list[str] = []
        pairs = zip(self.saved["optimizers"], self.live["optimizers"], strict=False)
        for i, (prefix, (old, new)) in enumerate(zip(self.members, pairs, strict=False)):
            built = old["built rate"], new["built rate"]
            rate = {f"{STATE}{prefix}{key}" for key in ("learning_rate", "scheduled")}
            if not description.same_class(old, new):  # then its state is useless too
                self.kept_here |= {name for name in self.here if name.startswith(STATE + prefix)}
            elif self.rates == "here":
                self.kept_here |= rate
            elif self.rates == "built" and None in built:
                schedules = (x["schedules"].get("learning_rate") for x in (old, new))
                self.kept_here |= rate if len({*schedules}) > 1 else set()
            elif self.rates == "built" and built[0] != built[1]:
                self.kept_here |= rate
                if i in self.used:
                    line = f"learning_rate is {built[0]:.6g} in the file, {built[1]:.6g} here"
                    notes.append(f"{description.name_of(i, new)}: {line}, which is used")
        return notes


@contextmanager
def _undone_on_error(optimizer: Optimizer) -> Iterator[None]:
    """Restore the optimizers if anything is raised. Their live states stay the same objects."""
    before = [
        (member, dict(vars(member)), tree_map(lambda array: array, member.state))
        for member in description.find_members(optimizer).values()
    ]
    try:
        yield
    except BaseException:
        for member, attributes, state in before:
            vars(member).update(attributes)
            member.state.clear()
            member.state.update(state)
        raise


# Contents of a file


def _find_weights(
    model: nn.Module, optimizer: Optimizer, weights: str
) -> tuple[dict[str, Place], dict[str, Place]]:
    """The weights that are saved, and the frozen ones that are not, by path.

    A shared parameter is listed once. What has optimizer state was trained, though it may be frozen
    now.
    """
    aliases = find_aliases(model)
    states = [member.state for member in description.find_members(optimizer).values()]
    paths = flatten(model.trainable_parameters()).keys() | {
        path
        for path in flatten(model.parameters())
        if any(isinstance(at(s, path.split(".")), dict) for s in states)
    }
    trained = {aliases.get(path, path) for path in paths}
    kept, frozen = {}, {}
    places = ((path, place) for path, place in _walk(model) if path not in aliases)
    for path, place in _by_name(places).items():
        # BatchNorm's statistics are frozen, but every forward pass changes them.
        moves = path.rpartition(".")[2].startswith("running_")
        if weights == "all" or path in trained or moves:
            kept[path] = place
        else:
            frozen[path] = place
    return kept, frozen


def _find_state(optimizer: Optimizer, average: WeightAverage | None) -> dict[str, Place]:
    """Every array of the states of optimizer and average by its name in the file."""
    averaged = {} if average is None else average.state
    return _by_name(chain(_walk(optimizer.state, STATE), _walk(averaged, AVERAGE)))


def _by_name(places: Iterable[tuple[str, Place]]) -> dict[str, Place]:
    found: dict[str, Place] = {}
    for name, place in places:
        if name in found:
            raise CheckpointError(f"two arrays are called {name!r}: rename one of them")
        found[name] = place
    return found


def _strategy_of(optimizer: Optimizer) -> UpdateStrategy:
    """The optimizer's strategy, which knows what other ranks hold."""
    return getattr(optimizer, "strategy", None) or UpdateStrategy()


def _walk(container: Any, prefix: str = "") -> Iterator[tuple[str, Place]]:
    """The arrays in a live tree, as MLX lists them."""
    module = isinstance(container, nn.Module)
    items = container.items() if isinstance(container, dict) else enumerate(container)
    for key, value in items:
        name = f"{prefix}{key}"
        if module and str(key).startswith("_"):  # MLX does not count these as parameters
            continue
        if prefix.startswith(STATE) and isinstance(value, tuple):
            value = container[key] = list(value)  # in a tuple, no array could be replaced
        if isinstance(value, (dict, list)):
            yield from _walk(value, f"{name}.")
        elif isinstance(value, mx.array) or (
            prefix.startswith(STATE) and isinstance(value, (int, float))
        ):
            yield name, Place(container, key)


def _arrays_at(places: Mapping[str, Place]) -> dict[str, mx.array]:
    return {name: place.array for name, place in places.items()}


def _own_key(keys: mx.array, rank: int, ranks: int) -> list[int]:
    """The random key of a rank: the saved one, or a new one for an additional rank."""
    known = cast(list[list[int]], keys.reshape(-1, 2).tolist())
    if rank < len(known):
        return known[rank]
    if len(known) > 1 and all(key == known[0] for key in known):  # the run shares one key
        return known[0]
    return cast(Any, mx.random.split(mx.array(known[0], mx.uint32), ranks)[rank]).tolist()


def _scalar(value: Any) -> Any:
    """The number in a zero-dimensional array of any library."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{type(value).__name__} is not JSON")


def _check_arguments(path: Any, model: Any, optimizer: Any) -> None:
    kinds = {"path": (str, os.PathLike), "model": nn.Module, "optimizer": Optimizer}
    for (name, kind), value in zip(kinds.items(), (path, model, optimizer), strict=True):
        if not isinstance(value, kind):
            raise CheckpointError(
                f"the arguments are a path, a model and an MLX optimizer: {name} is a "
                f"{type(value).__name__}"
            )
