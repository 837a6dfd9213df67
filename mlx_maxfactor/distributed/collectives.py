"""Communication between ranks: ordered collectives, gathered arrays, a bounded wait."""

import math
import re
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import _exit
from typing import Any, NamedTuple

import mlx.core as mx

from .._validate import check_number

MESSAGE_BYTES = 32 << 20
"""The most bytes that a rank sends in one collective, as in ``mlx.nn.average_gradients``."""

STALLED = 70
"""Exit status of a rank whose wait was ended."""


class LostRankError(RuntimeError):
    """Another rank, or the connection to it, has ended."""


@contextmanager
def bounded_wait(seconds: float = 300.0) -> Iterator[None]:
    """Bound the wait for other ranks: a rank that died or stalled becomes an error, not a hang.

    MLX reports most closed connections within a second as a ``RuntimeError``, which becomes a
    :class:`LostRankError` here. If it misses one, or if a rank is alive but does not answer, MLX
    waits forever and cannot be interrupted. After ``seconds`` this function prints a message to
    standard error and ends the process with status 70. That closes its connections, which ends the
    other ranks. An incomplete checkpoint never replaces the one before it.

    Put everything that waits inside: the ``mx.eval`` of a step, ``save_checkpoint``.

    Args:
        seconds: The limit. It must exceed the longest step, including the first one's compilation
            and other work of the slowest rank, such as a checkpoint. Default 300.

    Raises:
        LostRankError: The connection to another rank was lost.
        ValueError: ``seconds`` is not above 0.

    Example:
        >>> import mlx.core as mx
        >>> from mlx_maxfactor import bounded_wait
        >>> with bounded_wait(60):
        ...     mx.eval(mx.distributed.all_sum(mx.ones(2)))
    """
    check_number("seconds", seconds, 0.0, ends="()")
    timer = threading.Timer(seconds, _end, (seconds,))
    timer.daemon = True
    timer.start()
    try:
        yield
    except RuntimeError as problem:
        if not re.match(r"\[(ring|jaccl|mpi|nccl)\]", str(problem)):
            raise
        raise LostRankError(
            f"{_here()}: another rank has ended ({problem}); start all ranks again from the last "
            "checkpoint"
        ) from problem
    finally:
        timer.cancel()


def _end(seconds: float) -> None:
    print(
        f"{_here()}: no answer from the other ranks in {seconds:g} s: one has stalled or ended; "
        "start all ranks again from the last checkpoint",
        file=sys.stderr,
        flush=True,
    )
    _exit(STALLED)


def _here() -> str:
    group = mx.distributed.init()
    return f"rank {group.rank()} of {group.size()}"


class OwnedArray(NamedTuple):
    """An array that one rank has.

    Attributes:
        shape: Its shape.
        dtype: Its dtype.
        owner: The rank that has it.
        own: The array, on that rank.
    """

    shape: tuple[int, ...]
    dtype: mx.Dtype
    owner: int
    own: mx.array | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class OrderedCollectives:
    """Collectives that run one after the other, in the same order on all ranks.

    MLX runs them in the order of the graph, which differs between ranks that update different
    parameters. Two ranks in two different collectives would wait for each other, or exchange the
    wrong arrays.

    Args:
        group: The ranks.
    """

    def __init__(self, group: mx.distributed.Group):
        self._group = group
        self.rank, self.size = group.rank(), group.size()
        self._last: list[mx.array] = []

    def all_sum(self, x: mx.array) -> mx.array:
        """The sum over the ranks."""
        return self._next(mx.distributed.all_sum, x)

    def all_gather(self, x: mx.array) -> mx.array:
        """The arrays of all ranks along a new first axis."""
        return self._next(mx.distributed.all_gather, x).reshape(self.size, *x.shape)

    def _next(self, collective: Any, x: mx.array) -> mx.array:
        if self._last:
            x = mx.depends([x], self._last)[0]
        self._last = [collective(x, group=self._group)]
        return self._last[0]

    def averaged(self, arrays: Sequence[mx.array]) -> list[mx.array]:
        """The mean of each array over the ranks, sent in few messages, last arrays first."""
        means = list(arrays)
        for message in _messages(arrays):
            flat = mx.concatenate([arrays[i].reshape(-1) for i in message])
            mean = self.all_sum(flat) / self.size
            start = 0
            for i in message:
                stop = start + arrays[i].size
                means[i] = mean[start:stop].reshape(arrays[i].shape)
                start = stop
        return means

    def gathered(self, arrays: Mapping[str, OwnedArray]) -> dict[str, mx.array]:
        """Gather every array, in few messages of equal size.

        For each dtype, a rank joins its arrays into one long buffer. Shorter buffers are padded
        with zeros. A message is the same section of every rank's buffer.
        """
        found: dict[str, mx.array] = {}
        for dtype in {array.dtype: None for array in arrays.values()}:
            chosen = {name: array for name, array in arrays.items() if array.dtype == dtype}
            offsets, length = _offsets(chosen, self.size)
            own = [
                (offsets[name], array.own.reshape(-1))
                for name, array in chosen.items()
                if array.owner == self.rank and array.own is not None
            ]
            size = max(1, MESSAGE_BYTES // dtype.size)
            messages = [
                self.all_gather(_section(own, start, min(start + size, length), dtype))
                for start in range(0, length, size)
            ]
            for name, array in chosen.items():
                start, stop = offsets[name], offsets[name] + array.size
                parts = [*_received(messages, size, array.owner, start, stop)]
                found[name] = mx.concatenate(parts).reshape(array.shape)
        return found


def _messages(arrays: Sequence[mx.array]) -> list[list[int]]:
    """Indices of the arrays in each message, last array first. A message has one dtype."""
    messages: list[list[int]] = []
    open_messages: dict[mx.Dtype, tuple[list[int], int]] = {}
    for i in reversed(range(len(arrays))):
        x = arrays[i]
        if not x.size or not mx.issubdtype(x.dtype, mx.floating):
            continue
        message, size = open_messages.get(x.dtype, ([], 0))
        if not message:
            messages.append(message)
        message.append(i)
        size += x.nbytes
        open_messages[x.dtype] = (message, size) if size < MESSAGE_BYTES else ([], 0)
    return messages


def _offsets(arrays: Mapping[str, OwnedArray], ranks: int) -> tuple[dict[str, int], int]:
    """Where each array starts in its rank's buffer, and the length of the longest buffer."""
    lengths = [0] * ranks
    offsets = {}
    for name, array in arrays.items():
        offsets[name] = lengths[array.owner]
        lengths[array.owner] += array.size
    return offsets, max(lengths)


def _section(
    own: Sequence[tuple[int, mx.array]], start: int, stop: int, dtype: mx.Dtype
) -> mx.array:
    """This rank's buffer from ``start`` to ``stop``, with zeros after its end."""
    parts, end = [], start
    for offset, x in own:
        low, high = max(start, offset), min(stop, offset + x.size)
        if low < high:
            parts.append(x[low - offset : high - offset])
            end = high
    if end < stop:
        parts.append(mx.zeros(stop - end, dtype))
    return mx.concatenate(parts)


def _received(
    messages: Sequence[mx.array], size: int, rank: int, start: int, stop: int
) -> Iterator[mx.array]:
    """A rank's buffer from ``start`` to ``stop``, message by message."""
    for i in range(start // size, -(-stop // size)):
        low, high = max(start - i * size, 0), min(stop - i * size, messages[i].shape[1])
        yield messages[i][rank, low:high]
