"""Who makes the updates of a step: this machine, or several that share them."""

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx

from ..step import ParameterSlot


class UpdateStrategy:
    """This machine makes all updates and holds all state. A subclass shares both among ranks.

    Attributes:
        rank: Number of this rank.
        ranks: Number of ranks.
    """

    rank, ranks = 0, 1

    def prepare(self, optimizer: Any, parameters: dict) -> None:
        """Called when the optimizer has made the state of these parameters."""

    def average_gradients(self, slots: list[ParameterSlot]) -> list[ParameterSlot]:
        """The slots, each with the mean of all ranks' gradients."""
        return slots

    def update(
        self,
        slots: list[ParameterSlot],
        step: Callable[[list[ParameterSlot]], dict[str, mx.array]],
    ) -> dict[str, mx.array]:
        """Every parameter by path, updated by ``step``."""
        return step(slots)

    def state_bytes(self) -> dict[str, int]:
        """Bytes of whole states, by path, where this machine holds only parts of them."""
        return {}

    # Checkpoints. All ranks must call these methods together.

    def gather(self, own: mx.array) -> mx.array:
        """The arrays of all ranks along a new first axis. One machine's array is unchanged."""
        return own

    def spread_state(self) -> Mapping[str, mx.array]:
        """Templates of the arrays that are spread over ranks, by their names on one machine."""
        return {}

    def with_whole_state(self, write: Callable[[dict[str, mx.array]], None]) -> None:
        """Call ``write`` on one rank, with the spread arrays whole. If it fails, all raise."""
        write({})
