"""What ranks do together: collectives in one order, arrays made whole, a bounded wait."""

import math
import re
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import _exit
from typing import Any, NamedTuple

import mlx.core as mx

from ._validate import check_number
from .shares import Piece

MESSAGE_BYTES = 32 << 20
"""Most that a rank hands to one collective, as in ``mlx.nn.average_gradients``."""

STALLED = 70
"""Exit status of a rank whose wait was ended."""


class LostRankError(RuntimeError):
    """Another rank has ended, or its connection has."""


@contextmanager
def bounded_wait(seconds: float = 300.0) -> Iterator[None]:
    """Evaluate a step within a bounded wait: a rank that died or stalled is an error, not a hang.

    MLX reports most connections that were closed within a second, as a ``RuntimeError``, which
    becomes a :class:`LostRankError` here. Where it misses one, and where a rank lives and does not
    answer, it waits without end, and nothing can interrupt it: after so many seconds a message goes
    to standard error and the process ends with status 70, which closes its connections and so ends
    the other ranks. A checkpoint that is not yet whole leaves the one before it.

    Args:
        seconds: Of the longest step, with the compilation of the first, and of what the slowest
            rank does beside it, such as a checkpoint. Default 300.

    What waits must be inside: the ``mx.eval`` of a step, ``save_checkpoint``.

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


class Entry(NamedTuple):
    """An array of which each rank has some rows, or none."""

    shape: tuple[int, ...]
    dtype: mx.Dtype
    pieces: tuple[Piece, ...]
    own: mx.array | None

    @property
    def row_size(self) -> int:
        """Elements of a row; an array without axes is one row."""
        return math.prod(self.shape[1:])

    def span(self, piece: Piece, place: int) -> tuple[int, int]:
        """Where a piece stands that starts at a place in its rank's row."""
        return place, place + (piece.stop - piece.start) * self.row_size


class Line:
    """Collectives that are made one after the other, in one order on all ranks.

    MLX makes them in the order of the graph, which differs where each rank updates something else:
    two ranks in two collectives would wait for one another, or take what is not theirs.

    Args:
        group: The ranks.
        stream: Where they run. None: MLX's own choice.
    """

    def __init__(self, group: mx.distributed.Group, stream: mx.Stream | None = None):
        self._options: dict[str, Any] = {"group": group, "stream": stream}
        self.rank, self.size = group.rank(), group.size()
        self._last: list[mx.array] = []

    def all_sum(self, x: mx.array) -> mx.array:
        """The sum of what all ranks have."""
        return self._next(mx.distributed.all_sum, x)

    def all_gather(self, x: mx.array) -> mx.array:
        """What all ranks have, along a new first axis."""
        return self._next(mx.distributed.all_gather, x).reshape(self.size, *x.shape)

    def _next(self, collective: Any, x: mx.array) -> mx.array:
        if self._last:
            x = mx.depends([x], self._last)[0]
        self._last = [collective(x, **self._options)]
        return self._last[0]

    def averaged(self, arrays: Sequence[mx.array]) -> list[mx.array]:
        """The mean of each array over the ranks, the last arrays first; in few messages."""
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

    def gathered(self, entries: Mapping[str, Entry]) -> dict[str, mx.array]:
        """Every array whole: the pieces of all ranks, in few messages of equal size.

        Each rank's pieces are one row of numbers, in the order of the entries; a message is the
        same part of every rank's row. What shorter rows lack is zeros.
        """
        whole: dict[str, mx.array] = {}
        for dtype in {entry.dtype: None for entry in entries.values()}:
            names = [name for name, entry in entries.items() if entry.dtype == dtype]
            places, length = _places(entries, names, self.size)
            own = [
                (places[name, piece], entry.own.reshape(-1))
                for name in names
                for entry in [entries[name]]
                for piece in entry.pieces
                if piece.rank == self.rank and entry.own is not None
            ]
            reach = max(1, MESSAGE_BYTES // dtype.size)
            rows = [
                self.all_gather(_section(own, start, min(start + reach, length), dtype))
                for start in range(0, length, reach)
            ]
            for name in names:
                entry = entries[name]
                parts: list[mx.array] = []
                for piece in entry.pieces:
                    span = entry.span(piece, places[name, piece])
                    parts += _parts(rows, reach, piece.rank, *span)
                array = mx.concatenate(parts) if len(parts) > 1 else parts[0]
                whole[name] = array.reshape(entry.shape)
        return whole


def _messages(arrays: Sequence[mx.array]) -> list[list[int]]:
    """Indices of the arrays that go together, from the last to the first, each of one dtype."""
    messages: list[list[int]] = []
    filled: dict[mx.Dtype, tuple[list[int], int]] = {}
    for i in reversed(range(len(arrays))):
        x = arrays[i]
        if not x.size or not mx.issubdtype(x.dtype, mx.floating):
            continue
        message, size = filled.get(x.dtype, ([], 0))
        if not message:
            messages.append(message)
        message.append(i)
        size += x.nbytes
        filled[x.dtype] = (message, size) if size < MESSAGE_BYTES else ([], 0)
    return messages


def _places(
    entries: Mapping[str, Entry], names: Sequence[str], ranks: int
) -> tuple[dict[tuple[str, Piece], int], int]:
    """Where each piece starts in its rank's row of numbers, and the length of the longest row."""
    lengths = [0] * ranks
    places = {}
    for name in names:
        for piece in entries[name].pieces:
            places[name, piece] = lengths[piece.rank]
            _, lengths[piece.rank] = entries[name].span(piece, lengths[piece.rank])
    return places, max(lengths)


def _section(
    own: Sequence[tuple[int, mx.array]], start: int, stop: int, dtype: mx.Dtype
) -> mx.array:
    """What stands from ``start`` to ``stop`` in this rank's row, zeros after its end."""
    parts, end = [], start
    for place, x in own:
        low, high = max(start, place), min(stop, place + x.size)
        if low < high:
            parts.append(x[low - place : high - place])
            end = high
    if end < stop:
        parts.append(mx.zeros(stop - end, dtype))
    return mx.concatenate(parts) if len(parts) > 1 else parts[0]


def _parts(
    rows: Sequence[mx.array], reach: int, rank: int, start: int, stop: int
) -> Iterator[mx.array]:
    """What stands from ``start`` to ``stop`` in a rank's row, message by message."""
    for i in range(start // reach, -(-stop // reach)):
        low, high = max(start - i * reach, 0), min(stop - i * reach, rows[i].shape[1])
        yield rows[i][rank, low:high]
