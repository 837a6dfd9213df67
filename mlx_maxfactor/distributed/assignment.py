"""Assign parameters to ranks, so that computation, state and communication are even."""

from collections.abc import Iterable
from typing import NamedTuple


class ParameterCost(NamedTuple):
    """A parameter to assign.

    Attributes:
        path: Path of the parameter.
        loads: Operations of its update, bytes of its state, bytes of the parameter.
    """

    path: str
    loads: tuple[float, float, float]


class Assignment:
    """The rank that updates each parameter.

    The largest parameters are assigned first, each to the rank whose largest load stays smallest.
    All ranks compute the same assignment from the same parameters, without communication.

    Args:
        ranks: Number of ranks.

    Attributes:
        owners: Ranks by path.
        loads: For each rank: operations, bytes of state, bytes of parameters.

    Example:
        >>> from mlx_maxfactor.distributed.assignment import Assignment, ParameterCost
        >>> assignment = Assignment(2)
        >>> assignment.add([ParameterCost(path, (n, n, n)) for path, n in (("a", 3), ("b", 9))])
        >>> assignment.owners
        {'b': 0, 'a': 1}
    """

    def __init__(self, ranks: int):
        self.owners: dict[str, int] = {}
        self.loads = [[0.0, 0.0, 0.0] for _ in range(ranks)]

    def add(self, costs: Iterable[ParameterCost]) -> None:
        """Assign more parameters. Paths that are already assigned are skipped."""
        costs = [cost for cost in costs if cost.path not in self.owners]
        given = [sum(rank[i] for rank in self.loads) for i in range(3)]
        totals = [given[i] + sum(cost.loads[i] for cost in costs) or 1.0 for i in range(3)]

        def shares(loads: Iterable[float]) -> list[float]:
            return [load / total for load, total in zip(loads, totals, strict=True)]

        for cost in sorted(costs, key=lambda cost: max(shares(cost.loads)), reverse=True):
            after = [
                shares(a + b for a, b in zip(rank, cost.loads, strict=True)) for rank in self.loads
            ]
            owner = min(range(len(after)), key=lambda rank: (max(after[rank]), sum(after[rank])))
            self.owners[cost.path] = owner
            for i, load in enumerate(cost.loads):
                self.loads[owner][i] += load
