"""Several machines: each rank updates some of the parameters and keeps only their state."""

from collections.abc import Callable, Mapping
from typing import Any
from weakref import ref

import mlx.core as mx

from ..checkpoint.file import CheckpointError
from ..engine.step import ParameterSlot
from ..engine.trees import at, flatten
from ..optimizers.foreign import as_member
from ..routing.combined import CombinedOptimizer, UpdateStrategy
from .assignment import Assignment
from .collectives import MESSAGE_BYTES, OrderedCollectives, OwnedArray


class Sharding(UpdateStrategy):
    """The update strategy for several ranks: each rank makes a share of the updates.

    :func:`mlx_maxfactor.create_optimizer` makes it from ``group``. Every rank has the whole model
    and computes the gradients of its own batch. The gradients are averaged. Then each rank updates
    its own parameters, keeps state only for them, and sends them to the others. After a step, all
    ranks have the same bits.

    A step sends ``2(N - 1)/N`` of the gradients' bytes, and ``N - 1`` times the largest share of
    the parameters' bytes, which is about ``(N - 1)/N`` of all of them. The guard sends nothing,
    because every rank has all gradients and makes the same decision.

    All ranks must make the same steps, evaluate the same arrays, and save and load checkpoints
    together. Evaluate other collectives separately from a step.

    Args:
        group: The ranks, from ``mx.distributed.init()``.

    Attributes:
        assignment: What each rank updates.
    """

    def __init__(self, group: mx.distributed.Group):
        self._group, self.rank, self.ranks = group, group.rank(), group.size()
        self._shapes: dict[str, dict[str, mx.array]] = {}
        """Whole state of each parameter, never evaluated: only shapes and dtypes are used."""
        self._optimizer: Callable[[], Any] = lambda: None
        self.assignment = Assignment(self.ranks)
        self._collectives = OrderedCollectives(self._group)

    # The strategy of an optimizer

    def prepare(self, optimizer: CombinedOptimizer, parameters: dict) -> None:
        """Keep only this rank's share of the state that was just made for these parameters.

        Raises:
            ValueError: A member updates all of its parameters at once.
        """
        at_once = [o for o in optimizer.optimizers if as_member(o).updates_at_once]
        if whole := [type(o).__name__ for o in at_once]:
            raise ValueError(
                f"{', '.join(whole)} updates all of its parameters at once and cannot be shared "
                "among ranks: give its members to create_optimizer"
            )
        self._optimizer = ref(optimizer)  # weak: a cycle would keep its state alive
        # The whole state was made, so that random keys are numbered as usual. It is not evaluated.
        arrays = {
            path: x
            for path, x in flatten(parameters).items()
            if optimizer.index_of(path) is not None and mx.issubdtype(x.dtype, mx.floating)
        }
        states = {path: self._state_of(path) for path in arrays}
        new = [path for path, x in arrays.items() if path not in self._shapes and x.size]
        for path in new:
            self._shapes[path] = {k: mx.zeros(x.shape, x.dtype) for k, x in states[path].items()}
        self.assignment.add({path: self._loads(path, arrays[path]) for path in new})
        for path, state in states.items():
            if self.assignment.owners.get(path) != self.rank:
                state.clear()

    def average_gradients(self, slots: list[ParameterSlot]) -> list[ParameterSlot]:
        """The slots, with each gradient averaged over all ranks."""
        self._collectives = OrderedCollectives(self._group)
        means = self._collectives.averaged([slot.gradient for slot in slots])
        return [slot._replace(gradient=g) for slot, g in zip(slots, means, strict=True)]

    def update(
        self,
        slots: list[ParameterSlot],
        step: Callable[[list[ParameterSlot]], dict[str, mx.array]],
    ) -> dict[str, mx.array]:
        """Update this rank's share, and gather the shares of the others."""
        owners = self.assignment.owners
        own = step([s for s in slots if owners.get(s.path) == self.rank])
        shared = {
            s.path: OwnedArray(
                s.parameter.shape, s.parameter.dtype, owners[s.path], own.get(s.path)
            )
            for s in reversed(slots)
            if s.path in owners
        }
        return {s.path: s.parameter for s in slots} | self._collectives.gathered(shared)

    def state_bytes(self) -> dict[str, int]:
        """Bytes of the whole state of each parameter, by path."""
        return {path: _nbytes(arrays) for path, arrays in self._shapes.items()}

    # State

    def _state_of(self, path: str) -> dict:
        """The live state of one parameter."""
        return at(self._member_of(path).state, path.split("."))

    def _member_of(self, path: str) -> Any:
        return as_member(self._optimizer().optimizers[self._optimizer().index_of(path)])

    def _loads(self, path: str, parameter: mx.array) -> tuple[float, int, int]:
        """What it costs to own a parameter: operations, bytes of state, its own bytes."""
        member = self._member_of(path)
        flops = member.flops(parameter.shape, member.layout_of(path))
        return flops, _nbytes(self._shapes[path]), parameter.nbytes

    # Checkpoints

    def gather(self, own: mx.array) -> mx.array:
        """The arrays of all ranks along a new first axis. All ranks must call it."""
        gathered = OrderedCollectives(self._group).all_gather(own)
        mx.eval(gathered)  # here, because only one rank reads it
        return gathered

    def with_whole_state(self, write: Callable[[dict[str, mx.array]], None]) -> None:
        """Call ``write`` with the whole state, on the first rank. All ranks must call it.

        Raises:
            CheckpointError: The first rank could not write it. All ranks raise.
        """
        whole, problem = self.gather_state(), None
        if self.rank == 0:
            try:
                write(whole)
            except Exception as error:  # any error: the other ranks wait for the result
                problem = error
        failed = mx.array(int(problem is not None))
        if OrderedCollectives(self._group).all_sum(failed).item():
            raise problem or CheckpointError("the checkpoint was not written, see the first rank")

    def gather_state(self) -> dict[str, mx.array]:
        """Gather the whole state of every parameter, by name. All ranks must call it.

        Only the first rank gets it. The others hold one message at a time and return nothing.
        """
        whole: dict[str, mx.array] = {}
        batch: dict[str, OwnedArray] = {}
        names = self.spread_state()
        filled, last = 0, len(names)
        for i, (name, template) in enumerate(names.items(), 1):
            _, _, rest = name.split(".", 2)
            path, _, key = rest.rpartition(".")
            owner, own = self.assignment.owners[path], self._state_of(path).get(key)
            batch[name] = OwnedArray(template.shape, template.dtype, owner, own)
            filled += template.nbytes
            if filled >= MESSAGE_BYTES or i == last:
                gathered = OrderedCollectives(self._group).gathered(batch)
                mx.eval(gathered)
                whole |= gathered if self.rank == 0 else {}
                batch, filled = {}, 0
        return whole

    def spread_state(self) -> dict[str, mx.array]:
        """A template of every state array of the parameters, by name, in one order on all ranks."""
        return {
            f"states.{self._optimizer().index_of(path)}.{path}.{key}": template
            for path, templates in self._shapes.items()
            for key, template in templates.items()
        }


def _nbytes(arrays: Mapping[str, mx.array]) -> int:
    return sum(x.nbytes for x in arrays.values())
