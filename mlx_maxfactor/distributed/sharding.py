"""Several machines: each rank updates some of the parameters and keeps only their state."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from weakref import ref

import mlx.core as mx

from .. import functional as f
from ..checkpoint.file import CheckpointError
from ..combined import CombinedOptimizer, updates_singly
from ..optimizers.base import Float32Optimizer, flatten
from ..optimizers.update_loop import ParameterSlot, UpdateLoop, UpdateRule, at_path
from ..strategy import UpdateStrategy
from .assignment import Assignment, ParameterCost, RowRange
from .collectives import MESSAGE_BYTES, OrderedCollectives, ShardedArray


class Sharding(UpdateStrategy):
    """The update strategy for several ranks: each rank makes a share of the updates.

    :func:`mlx_maxfactor.create_optimizer` makes it from ``group``. Every rank has the whole model
    and computes the gradients of its own batch. The gradients are averaged. Then each rank updates
    its own parameters, keeps state only for them, and sends them to the others. After a step, all
    ranks have the same bits.

    A parameter belongs to one rank. Its rows are divided among ranks if that makes the loads more
    even and its optimizer allows it (``row_granularity``). That holds for parameters of AdamW and
    SignSGD, for stacks of matrices that are updated one by one, and for matrices that Muon
    orthogonalizes in blocks of rows.

    A step sends ``2(N - 1)/N`` of the gradients' bytes, and ``N - 1`` times the largest share of
    the parameters' bytes, which is about ``(N - 1)/N`` of all of them. The guard sends nothing,
    because every rank has all gradients and makes the same decision.

    All ranks must make the same steps, evaluate the same arrays, and save and load checkpoints
    together. Evaluate other collectives separately from a step.

    Args:
        group: The ranks, from ``mx.distributed.init()``.

    Attributes:
        assignment: What each rank updates.
        stream: Where collectives run. None: MLX's own choice.
    """

    def __init__(self, group: mx.distributed.Group):
        self._group, self.rank, self.ranks = group, group.rank(), group.size()
        self._shapes: dict[str, dict[str, mx.array]] = {}
        """Whole state of each parameter, never evaluated: only shapes and dtypes are used."""
        self._optimizer: Callable[[], Any] = lambda: None
        self.assignment = Assignment(self.ranks)
        self.stream: mx.Stream | None = None
        self._collectives = self._new_collectives()

    # The strategy of an optimizer

    def prepare(self, optimizer: CombinedOptimizer, parameters: dict) -> None:
        """Keep only this rank's share of the state that was just made for these parameters.

        Raises:
            ValueError: A member updates all of its parameters at once.
        """
        if whole := [type(o).__name__ for o in optimizer.optimizers if not updates_singly(o)]:
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
        self.assignment.add([self._cost(path, arrays[path]) for path in new])
        for path, state in states.items():
            rows = self._own_rows(path)
            if rows is None:
                state.clear()
            elif not _is_all(rows, arrays[path]) and self._is_whole(path, state):
                self._cut_state(path, arrays[path], rows)

    def receive(self, slots: list[ParameterSlot]) -> list[ParameterSlot]:
        """The slots, with each gradient averaged over all ranks."""
        self._collectives = self._new_collectives()
        means = self._collectives.averaged([slot.gradient for slot in slots])
        return [slot._replace(gradient=g) for slot, g in zip(slots, means, strict=True)]

    def update(
        self, loop: UpdateLoop, slots: list[ParameterSlot], rule: UpdateRule
    ) -> dict[str, mx.array]:
        """Update this rank's share, and gather the shares of the others."""
        arrays = {
            slot.path: self._update_own_rows(loop, slot, rule)
            for slot in reversed(slots)
            if slot.path in self.assignment.ranges
        }
        return {s.path: s.parameter for s in slots} | self._collectives.gathered(arrays)

    def state_bytes(self) -> dict[str, int]:
        """Bytes of the whole state of each parameter, by path."""
        return {path: _nbytes(arrays) for path, arrays in self._shapes.items()}

    def _new_collectives(self) -> OrderedCollectives:
        return OrderedCollectives(self._group, self.stream)

    def _update_own_rows(
        self, loop: UpdateLoop, slot: ParameterSlot, rule: UpdateRule
    ) -> ShardedArray:
        rows, p = self._own_rows(slot.path), slot.parameter
        if rows is not None and not _is_all(rows, p):
            own = slice(rows.start, rows.stop)
            elements = f.ElementRange(rows.start * (p.size // _rows(p)), p.size)
            slot = slot._replace(gradient=slot.gradient[own], parameter=p[own], elements=elements)
        updated = None if rows is None else loop.update_one(slot, rule)
        return ShardedArray(p.shape, p.dtype, self.assignment.ranges[slot.path], updated)

    # State

    def _state_of(self, path: str) -> dict:
        """The live state of one parameter."""
        return at_path(self._member_of(path).state, path)

    def _member_of(self, path: str) -> Any:
        return self._optimizer().optimizers[self._optimizer().index_of(path)]

    def _cost(self, path: str, parameter: mx.array) -> ParameterCost:
        """The cost of a parameter, and whether it may be cut."""
        optimizer, shape = self._member_of(path), parameter.shape
        flops, granularity = float(parameter.size), 0
        if isinstance(optimizer, Float32Optimizer):
            layout = optimizer.layout_of(path)
            flops = optimizer.flops(shape, layout)
            # A subclass may read all rows where the class that defines the method does not.
            defines_it = "row_granularity" in vars(type(optimizer))
            # Rows of a grouped convolution are no rows of its stack of matrices.
            if shape and defines_it and optimizer.owns(path) and "/" not in layout:
                granularity = optimizer.row_granularity(shape, layout)
        loads = (flops, float(_nbytes(self._shapes[path])), float(parameter.nbytes))
        return ParameterCost(path, _rows(parameter), granularity, loads)

    def _own_rows(self, path: str) -> RowRange | None:
        ranges = self.assignment.ranges.get(path, ())
        return next((rows for rows in ranges if rows.rank == self.rank), None)

    def _is_whole(self, path: str, state: Mapping[str, mx.array]) -> bool:
        """Whether the state still has whole arrays: just made, or after a load was undone."""
        shapes = self._shapes[path]
        return any(
            x.shape == shapes[key].shape
            for key, x in state.items()
            if not self._is_common(path, key)
        )

    def _is_common(self, path: str, key: str) -> bool:
        """Whether every rank that has rows of the parameter keeps the whole of this state array.

        Counts and random keys belong to the whole parameter.
        """
        return key == "key" or self._shapes[path][key].ndim == 0

    def _cut_state(self, path: str, parameter: mx.array, rows: RowRange) -> None:
        """Replace a state by a new one for some rows. A slice would keep the whole alive."""
        optimizer, state = self._member_of(path), self._state_of(path)
        common = {key: x for key, x in state.items() if self._is_common(path, key)}
        state.clear()
        state.update(common)  # includes the random key: init_single must not make another
        shape = (rows.stop - rows.start, *parameter.shape[1:])
        part = mx.zeros(shape, parameter.dtype)
        optimizer.init_single(part, state, *optimizer.layout_argument(path))
        state.update(common)

    # Checkpoints

    def gather(self, own: mx.array) -> mx.array:
        """The arrays of all ranks along a new first axis. All ranks must call it."""
        gathered = self._new_collectives().all_gather(own)
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
        if self._new_collectives().all_sum(failed).item():
            raise problem or CheckpointError("the checkpoint was not written, see the first rank")

    def gather_state(self) -> dict[str, mx.array]:
        """Gather the whole state of every parameter, by name. All ranks must call it.

        Only the first rank gets it. The others hold one message at a time and return nothing.
        """
        whole: dict[str, mx.array] = {}
        batch: dict[str, ShardedArray] = {}
        spread = self.spread_state()
        filled, last = 0, len(spread)
        for i, (name, array) in enumerate(spread.items(), 1):
            own = self._state_of(array.path).get(array.key)
            batch[name] = ShardedArray(
                array.template.shape, array.template.dtype, array.ranges, own
            )
            filled += array.template.nbytes
            if filled >= MESSAGE_BYTES or i == last:
                gathered = self._new_collectives().gathered(batch)
                mx.eval(gathered)
                whole |= gathered if self.rank == 0 else {}
                batch, filled = {}, 0
        return whole

    def spread_state(self) -> dict[str, "StateArray"]:
        """Every state array of the parameters, by name, in the same order on all ranks."""
        spread = {}
        for path, shapes in self._shapes.items():
            parts = self.assignment.ranges[path]
            for key, x in shapes.items():
                ranges = tuple(_state_rows(x, rows, parts[-1].stop) for rows in parts)
                if self._is_common(path, key):  # one rank sends the whole
                    ranges = (RowRange(parts[0].rank, 0, _rows(x)),)
                cut = (r for r in ranges if r.rank == self.rank and not _is_all(r, x))
                name = f"states.{self._optimizer().index_of(path)}.{path}.{key}"
                spread[name] = StateArray(path, key, x, ranges, next(cut, None))
        return spread


class StateArray(NamedTuple):
    """An array of a parameter's state: its whole shape, and which rank sends which rows.

    ``part`` are the rows that this rank keeps. None: it keeps the whole array, or nothing.
    """

    path: str
    key: str
    template: mx.array
    ranges: tuple[RowRange, ...]
    part: RowRange | None

    def own_rows(self, whole: mx.array) -> mx.array:
        """This rank's rows of the whole array."""
        if self.part is None:
            return whole
        return whole[self.part.start : self.part.stop] * 1  # a slice would keep the whole alive


def _state_rows(state: mx.array, rows: RowRange, total: int) -> RowRange:
    """The rows of a state array that belong to ``rows`` of the parameter's ``total`` rows."""
    # A scale belongs to a group of elements. Cuts lie between groups; the last may be short.
    start, stop = (row * _rows(state) // total for row in (rows.start, rows.stop))
    return RowRange(rows.rank, start, stop)


def _is_all(rows: RowRange, x: mx.array) -> bool:
    return rows.stop - rows.start == _rows(x)


def _rows(x: mx.array) -> int:
    return x.shape[0] if x.ndim else 1


def _nbytes(arrays: Mapping[str, mx.array]) -> int:
    return sum(x.nbytes for x in arrays.values())
