"""Assign parameters to ranks, so that computation, state and communication are even."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

SMALLEST_CUT = 1 / 16
"""A parameter with less than this share of a rank's load is not cut."""


class ParameterCost(NamedTuple):
    """A parameter to assign.

    Attributes:
        path: Path of the parameter.
        rows: Length of its first axis.
        granularity: The parameter can be cut at multiples of this many rows. 0: it is not cut.
        loads: Operations of its update, bytes of its state, bytes of the parameter.
    """

    path: str
    rows: int
    granularity: int
    loads: tuple[float, float, float]


class RowRange(NamedTuple):
    """Rows ``start`` to ``stop`` of a parameter, which one rank updates."""

    rank: int
    start: int
    stop: int


class Assignment:
    """The row ranges of every parameter, and the rank of each range.

    Parameters that are not cut are assigned first, in order of decreasing size. Each goes to the
    rank whose largest load stays smallest. Then the other parameters are cut so that they even out
    the loads. All ranks compute the same assignment from the same parameters, without
    communication.

    Args:
        ranks: Number of ranks.

    Attributes:
        ranges: Ranges by path, in the order of the rows.
        loads: For each rank: operations, bytes of state, bytes of parameters.

    Example:
        >>> from mlx_maxfactor.distributed.assignment import Assignment, ParameterCost
        >>> assignment = Assignment(2)
        >>> costs = ParameterCost("a", 3, 0, (9, 9, 9)), ParameterCost("b", 9, 1, (27, 27, 27))
        >>> assignment.add(costs)
        >>> assignment.ranges["b"]
        (RowRange(rank=0, start=0, stop=3), RowRange(rank=1, start=3, stop=9))
    """

    def __init__(self, ranks: int):
        self.ranks = ranks
        self.ranges: dict[str, tuple[RowRange, ...]] = {}
        self.loads = [[0.0, 0.0, 0.0] for _ in range(ranks)]

    def add(self, costs: Iterable[ParameterCost]) -> None:
        """Assign more parameters. Paths that are already assigned are skipped."""
        costs = [cost for cost in costs if cost.path not in self.ranges]
        given = [sum(rank[i] for rank in self.loads) for i in range(3)]
        totals = [given[i] + sum(cost.loads[i] for cost in costs) or 1.0 for i in range(3)]

        def parts(cost: ParameterCost) -> list[float]:
            return [load / total for load, total in zip(cost.loads, totals, strict=True)]

        def weight(cost: ParameterCost) -> float:
            return max(parts(cost))

        least = SMALLEST_CUT / self.ranks
        divided = [
            cost for cost in costs if 0 < 2 * cost.granularity <= cost.rows and weight(cost) > least
        ]
        given_whole = [cost for cost in costs if cost not in divided]
        for cost in sorted(given_whole, key=weight, reverse=True):
            self._give_whole(cost, totals)
        for cost in sorted(divided, key=weight, reverse=True):
            self._give_rows(cost, parts(cost).index(weight(cost)))

    def _give_whole(self, cost: ParameterCost, totals: Sequence[float]) -> None:
        def highest(rank: int) -> tuple[float, float]:
            after = [
                (self.loads[rank][i] + cost.loads[i]) / totals[i] for i in range(3) if cost.loads[i]
            ]
            return max(after, default=0.0), sum(after)

        rank = min(range(self.ranks), key=highest)
        self._give(cost, (RowRange(rank, 0, cost.rows),))

    def _give_rows(self, cost: ParameterCost, i: int) -> None:
        """Give each rank rows so that load ``i``, the parameter's largest, is even."""
        level = _level([rank[i] for rank in self.loads], cost.loads[i])
        ranges, start, filled = [], 0, 0.0
        for rank in range(self.ranks):
            filled += max(0.0, level - self.loads[rank][i]) / cost.loads[i]
            stop = round(filled * cost.rows / cost.granularity) * cost.granularity
            stop = cost.rows if rank == self.ranks - 1 else min(stop, cost.rows)
            if stop > start:
                ranges.append(RowRange(rank, start, stop))
            start = max(start, stop)
        self._give(cost, tuple(ranges))

    def _give(self, cost: ParameterCost, ranges: tuple[RowRange, ...]) -> None:
        self.ranges[cost.path] = ranges
        for part in ranges:
            share = (part.stop - part.start) / cost.rows
            for i in range(3):
                self.loads[part.rank][i] += share * cost.loads[i]


def _level(loads: Sequence[float], added: float) -> float:
    """The level that the lowest loads reach when ``added`` is shared out among them."""
    rising = sorted(loads)
    # Too few loads would rise above the next one, and too many include one above the level.
    return min((sum(rising[:n]) + added) / n for n in range(1, len(rising) + 1))
