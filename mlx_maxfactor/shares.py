"""Which rank of several updates what: level in work, in state and in what is sent."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

WHOLE = 1 / 16
"""Share of a rank's load below which a parameter is not worth a cut."""


class Item(NamedTuple):
    """A parameter to give to a rank.

    Attributes:
        path: Its path.
        rows: Length of its first axis.
        cuts: Of how many rows a multiple may be updated by itself; 0: only the whole.
        loads: Operations of its update, bytes of its state, bytes of itself.
    """

    path: str
    rows: int
    cuts: int
    loads: tuple[float, float, float]


class Piece(NamedTuple):
    """Rows ``start`` to ``stop`` of a parameter, which one rank updates."""

    rank: int
    start: int
    stop: int


class Shares:
    """Each parameter's pieces, given out once; a later parameter finds the earlier ones in place.

    Whole parameters first, the heaviest first, each to the rank where the highest of its three
    loads stays lowest; then those that can be cut in rows level what is uneven. The same parameters
    give the same shares on every rank: nothing is agreed upon.

    Args:
        ranks: How many there are.

    Attributes:
        pieces: By path, in the order of their rows.
        loads: Of each rank: operations, bytes of state, bytes of parameters.

    Example:
        >>> from mlx_maxfactor.shares import Item, Shares
        >>> shares = Shares(2)
        >>> shares.add([Item("a", 3, 0, (9, 9, 9)), Item("b", 9, 1, (27, 27, 27))])
        >>> shares.pieces["b"]
        (Piece(rank=0, start=0, stop=3), Piece(rank=1, start=3, stop=9))
    """

    def __init__(self, ranks: int):
        self.ranks = ranks
        self.pieces: dict[str, tuple[Piece, ...]] = {}
        self.loads = [[0.0, 0.0, 0.0] for _ in range(ranks)]

    def add(self, items: Iterable[Item]) -> None:
        """Give out more parameters; those of a path that has its pieces are left out."""
        items = [item for item in items if item.path not in self.pieces]
        given = [sum(rank[i] for rank in self.loads) for i in range(3)]
        totals = [given[i] + sum(item.loads[i] for item in items) or 1.0 for i in range(3)]

        def parts(item: Item) -> list[float]:
            return [load / total for load, total in zip(item.loads, totals, strict=True)]

        def weight(item: Item) -> float:
            return max(parts(item))

        least = WHOLE / self.ranks
        divided = [
            item for item in items if 0 < 2 * item.cuts <= item.rows and weight(item) > least
        ]
        given_whole = [item for item in items if item not in divided]
        for item in sorted(given_whole, key=weight, reverse=True):
            self._give_whole(item, totals)
        for item in sorted(divided, key=weight, reverse=True):
            self._give_rows(item, parts(item).index(weight(item)))

    def _give_whole(self, item: Item, totals: Sequence[float]) -> None:
        def highest(rank: int) -> tuple[float, float]:
            after = [
                (self.loads[rank][i] + item.loads[i]) / totals[i] for i in range(3) if item.loads[i]
            ]
            return max(after, default=0.0), sum(after)

        rank = min(range(self.ranks), key=highest)
        self._give(item, (Piece(rank, 0, item.rows),))

    def _give_rows(self, item: Item, i: int) -> None:
        """Rows to each rank, so that all have the same of the load that it is the most of."""
        level = _level([rank[i] for rank in self.loads], item.loads[i])
        pieces, start, filled = [], 0, 0.0
        for rank in range(self.ranks):
            filled += max(0.0, level - self.loads[rank][i]) / item.loads[i]
            stop = round(filled * item.rows / item.cuts) * item.cuts
            stop = item.rows if rank == self.ranks - 1 else min(stop, item.rows)
            if stop > start:
                pieces.append(Piece(rank, start, stop))
            start = max(start, stop)
        self._give(item, tuple(pieces))

    def _give(self, item: Item, pieces: tuple[Piece, ...]) -> None:
        self.pieces[item.path] = pieces
        for piece in pieces:
            share = (piece.stop - piece.start) / item.rows
            for i in range(3):
                self.loads[piece.rank][i] += share * item.loads[i]


def _level(loads: Sequence[float], added: float) -> float:
    """How high all loads stand once the lowest are filled up with what is added."""
    rising = sorted(loads)
    for n in range(1, len(rising) + 1):
        level = (sum(rising[:n]) + added) / n
        if n == len(rising) or level <= rising[n]:
            return level
    raise AssertionError  # of no rank at all
