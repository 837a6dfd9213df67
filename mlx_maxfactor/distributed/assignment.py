"""Assign parameters to ranks, so that computation, state and communication are even."""

from collections.abc import Mapping, Sequence

import numpy as np


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
        >>> from mlx_maxfactor.distributed.assignment import Assignment
        >>> assignment = Assignment(2)
        >>> assignment.add({path: (n, n, n) for path, n in (("a", 3), ("b", 9))})
        >>> assignment.owners
        {'b': 0, 'a': 1}
    """

    def __init__(self, ranks: int):
        self.owners: dict[str, int] = {}
        self.loads = np.zeros((ranks, 3))

    def add(self, loads: Mapping[str, Sequence[float]]) -> None:
        """Assign more parameters, by path: operations of an update, bytes of state, own bytes.

        Paths that are already assigned are skipped.
        """
        new = {path: np.array(load) for path, load in loads.items() if path not in self.owners}
        total = np.maximum(sum(new.values(), self.loads.sum(axis=0)), 1.0)
        for path, load in sorted(new.items(), key=lambda x: max(x[1] / total), reverse=True):
            after = (self.loads + load) / total
            owner = min(range(len(after)), key=lambda i: (after[i].max(), after[i].sum()))
            self.owners[path] = owner
            self.loads[owner] += load
