"""Save and load a training run: one file, whole or not at all."""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import is_dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, BinaryIO, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.optimizers import MultiOptimizer, Optimizer
from mlx.utils import tree_unflatten

from ._version import __version__
from .distributed import ShardedOptimizer
from .optimizers._base import flatten
from .roles import find_aliases
from .schedules import Schedule

FORMAT = 1
"""Version of the layout below; a reader refuses any other."""

CHECKSUM = b'"checksum":"%s"'
BLANK = b"0" * 64
"""What stands in place of the checksum while it is computed."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, or that does not fit; nothing was changed."""


class Extra(dict[str, Any]):
    """What ``save_checkpoint`` was given beside model and optimizer.

    Attributes:
        differences: With ``strict=False``, what of the file did not fit and was left out.
    """

    differences: tuple[str, ...] = ()


def save_checkpoint(
    path: str | os.PathLike[str], model: nn.Module, optimizer: Optimizer, **extra: Any
) -> None:
    """Write weights, optimizer state, random state and ``extra`` to one ``.safetensors`` file.

    The file is written beside its place, synced, and renamed: a reader finds the old file or the
    new one, whole. A SHA-256 of every byte goes into the header.

    Args:
        path: Where to. Its folder must exist.
        model: The model; all of its parameters are kept, the frozen ones too.
        optimizer: Any MLX optimizer, its state made or not yet.
        **extra: JSON values to keep beside them: an epoch, the state of a data loader.

    Raises:
        CheckpointError: ``extra`` is not JSON, or the file system refuses; an older file stays.

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
    path = Path(path)
    try:
        metadata = {"extra": json.dumps(extra), "run": json.dumps(_description(optimizer))}
    except (TypeError, ValueError) as problem:
        raise CheckpointError(f"extra must be JSON values: {problem}") from problem
    metadata |= {"format": str(FORMAT), "checksum": BLANK.decode()}
    sharded = isinstance(optimizer, ShardedOptimizer)
    state = optimizer.gather_state() if sharded else flatten(optimizer.state)
    problem = None
    if not sharded or optimizer.is_first:
        problem = _write(path, _tensors(model, state), metadata)
    if sharded and not optimizer.all_agree(problem is None):
        problem = problem or OSError("the first rank could not")
    if problem:
        raise CheckpointError(f"{path} was not written: {problem}") from problem


def _write(path: Path, tensors: dict[str, mx.array], metadata: dict[str, str]) -> Exception | None:
    """Write a file whole, or say why not; an older file then stays."""
    # One name, so that what a killed process left is written over, not gathered.
    beside = path.with_name(f".{path.name}.partial.safetensors")
    try:
        mx.save_safetensors(str(beside), tensors, metadata)
        _seal(beside)
        os.replace(beside, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as problem:
        beside.unlink(missing_ok=True)
        return problem
    return None


def load_checkpoint(
    path: str | os.PathLike[str], model: nn.Module, optimizer: Optimizer, *, strict: bool = True
) -> Extra:
    """Restore a run into live objects, so that a step compiled before the load sees it.

    Args:
        path: A file that ``save_checkpoint`` wrote. It holds arrays and JSON: loading runs no code.
        model: The model, built as it was.
        optimizer: The optimizer, built as it was.
        strict: False loads what fits and returns the rest as ``.differences``. A damaged file is
            refused all the same.

    Returns:
        ``extra``, a dict.

    Raises:
        CheckpointError: The file is damaged, or is not of this model and optimizer; the message
            lists every difference. Model, optimizer and random state are as they were.
    """
    path = Path(path)
    saved, metadata = _read(path)
    before = [(member, dict(member.state), member._initialized) for member in _members(optimizer)]
    optimizer.init(model.trainable_parameters())
    sharded = isinstance(optimizer, ShardedOptimizer)
    live = _tensors(model, optimizer.whole_shapes() if sharded else flatten(optimizer.state))
    differences = [
        *_different_runs(json.loads(metadata["run"]), _description(optimizer)),
        *_different_tensors(saved, live),
    ]
    fitting = {name: array for name, array in saved.items() if _same_kind(array, live.get(name))}
    try:
        if sharded:
            fitting = _own_share(fitting, optimizer)
        mx.eval(fitting)  # a failing disk fails here, before anything is changed
        if differences and strict:
            raise CheckpointError(
                "\n  ".join([f"{path} does not fit this model and optimizer:", *differences])
                + "\nbuild both as they were when it was saved, or load what fits with strict=False"
            )
    except (CheckpointError, RuntimeError) as problem:
        for member, state, initialized in before:
            member.state.clear()
            member.state.update(state)
            member._initialized = initialized
        raise CheckpointError(str(problem)) from None
    _restore(fitting, model, optimizer)
    extra = Extra(json.loads(metadata["extra"]))
    extra.differences = tuple(differences)
    return extra


# What a file holds


def _tensors(model: nn.Module, state: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """Every array of a run by its name in the file."""
    aliases = find_aliases(model)
    weights = {k: v for k, v in flatten(model.parameters()).items() if k not in aliases}
    return {
        **{f"model.{path}": array for path, array in weights.items()},
        **{f"optimizer.{path}": array for path, array in state.items()},
        "random.key": mx.array(cast(Any, mx.random.state)[0]),
    }


def _own_share(tensors: Mapping[str, mx.array], optimizer: ShardedOptimizer) -> dict[str, mx.array]:
    """What of a file one rank keeps: all but the others' state."""
    prefix = "optimizer."
    state = {k.removeprefix(prefix): x for k, x in tensors.items() if k.startswith(prefix)}
    others = {k: x for k, x in tensors.items() if not k.startswith(prefix)}
    return others | {prefix + path: x for path, x in optimizer.own_share(state).items()}


def _restore(tensors: Mapping[str, mx.array], model: nn.Module, optimizer: Optimizer) -> None:
    """Put arrays into the live containers; the containers stay the same objects."""
    weights = []
    for name, array in tensors.items():
        part, _, path = name.partition(".")
        if part == "model":
            weights.append((path, array))
        elif part == "random":
            high, low = cast(list[int], array.tolist())
            mx.random.seed(high << 32 | low)  # the key of a seed is its two halves
        else:
            container: Any = optimizer.state
            *keys, last = path.split(".")
            for key in keys:
                container = container[int(key) if isinstance(container, list) else key]
            container[last] = array
    if weights:
        model.update(cast(dict, tree_unflatten(weights)), strict=False)


def _description(optimizer: Optimizer) -> dict[str, Any]:
    """Classes, options and plan, as JSON."""
    description = {
        "library": __version__,
        "optimizers": [
            {"class": f"{type(m).__module__}.{type(m).__qualname__}", **_options(m)}
            for m in _members(optimizer)
        ],
        "plan": [
            [entry.path, list(entry.shape), entry.role, entry.layout, entry.optimizer]
            for entry in getattr(optimizer, "plan", ())
        ],
    }
    return json.loads(json.dumps(description))


def _members(optimizer: Optimizer) -> list[Optimizer]:
    if isinstance(optimizer, MultiOptimizer):
        return [leaf for member in optimizer.optimizers for leaf in _members(member)]
    return [optimizer]


def _options(optimizer: Optimizer) -> dict[str, Any]:
    """Public attributes that are plain values, and what its schedules are called."""
    plain = (bool, int, float, str, tuple, list, type(None))
    public = {k: v for k, v in vars(optimizer).items() if k[0] != "_"}
    options = {k: v for k, v in public.items() if isinstance(v, plain)}
    named = {k: v for k, v in public.items() if isinstance(v, mx.Dtype) or is_dataclass(v)}
    options |= {k: str(v) for k, v in named.items()}
    for name, schedule in optimizer._schedulers.items():
        named = repr(schedule) if isinstance(schedule, Schedule) else schedule.__qualname__
        options[f"{name} schedule"] = named
    return options


# What does not fit


def _different_runs(saved: Mapping[str, Any], live: Mapping[str, Any]) -> Iterator[str]:
    for i, (old, new) in enumerate(zip_longest(saved["optimizers"], live["optimizers"])):
        if old is None or new is None or old["class"] != new["class"]:
            names = [(o or {"class": "none"})["class"].rpartition(".")[2] for o in (old, new)]
            yield f"optimizer {i}: {names[0]} in the file, {names[1]} here"
            continue
        for option in sorted(old.keys() | new.keys()):
            if old.get(option) != new.get(option):
                yield (
                    f"optimizer {i}, {old['class'].rpartition('.')[2]}: {option} is "
                    f"{old.get(option)!r} in the file, {new.get(option)!r} here"
                )
    plans = [{entry[0]: entry[1:] for entry in run["plan"]} for run in (saved, live)]
    for path in {**plans[0], **plans[1]}:
        old, new = (plan.get(path) for plan in plans)
        if old != new:
            yield f"plan, {path}: {old or 'nothing'} in the file, {new or 'nothing'} here"


def _different_tensors(
    saved: Mapping[str, mx.array], live: Mapping[str, mx.array]
) -> Iterator[str]:
    for name in {**saved, **live}:
        old, new = saved.get(name), live.get(name)
        if not _same_kind(old, new):
            yield f"{name}: {_kind(old)} in the file, {_kind(new)} here"


def _same_kind(old: mx.array | None, new: mx.array | None) -> bool:
    return _kind(old) == _kind(new)


def _kind(array: mx.array | None) -> str:
    if array is None:
        return "missing"
    return f"{str(array.dtype).rpartition('.')[2]} {tuple(array.shape)}"


# The file


def _read(path: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """The arrays, not yet read from the disk, and the metadata of an undamaged file."""
    try:
        with path.open("rb") as file:
            header = _header(file)
            metadata = json.loads(header).get("__metadata__") or {}
            if metadata.get("format") != str(FORMAT):
                raise CheckpointError(
                    f"{path} is no checkpoint of format {FORMAT}: its header says format "
                    f"{metadata.get('format')!r}; load it with the version that wrote it"
                )
            if _checksum(file, header, metadata.get("checksum", "")) != metadata["checksum"]:
                raise CheckpointError(f"{path} is damaged or incomplete: load an older checkpoint")
        arrays = mx.load(str(path), format="safetensors")
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError) as problem:
        raise CheckpointError(
            f"{path} is damaged or no checkpoint ({problem}): load an older one"
        ) from problem
    return cast(dict[str, mx.array], arrays), metadata


def _header(file: BinaryIO) -> bytes:
    """The first bytes of a safetensors file: eight for a length, then JSON of that length."""
    length = file.read(8)
    size = int.from_bytes(length, "little")
    if len(length) < 8 or size > os.fstat(file.fileno()).st_size:
        raise ValueError("its header is incomplete")
    return file.read(size)


def _checksum(file: BinaryIO, header: bytes, stands: str) -> str:
    """SHA-256 of the whole file, as it was when blanks stood in place of the checksum."""
    blank = header.replace(CHECKSUM % stands.encode(), CHECKSUM % BLANK, 1)
    digest = hashlib.sha256(len(header).to_bytes(8, "little") + blank)
    file.seek(8 + len(header))
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _seal(path: Path) -> None:
    """Write the checksum into its blanks, and everything to the disk."""
    with path.open("r+b") as file:
        header = _header(file)
        checksum = _checksum(file, header, BLANK.decode())
        file.seek(8 + header.index(CHECKSUM % BLANK))
        file.write(CHECKSUM % checksum.encode())
        file.flush()
        # On macOS fsync leaves the data in the drive's cache; F_FULLFSYNC does not.
        if full_sync := getattr(fcntl, "F_FULLFSYNC", None):
            fcntl.fcntl(file.fileno(), full_sync)
        else:
            os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable, where the file system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
