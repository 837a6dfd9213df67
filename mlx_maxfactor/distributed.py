"""Several machines: each rank updates its share of the parameters and keeps the state of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from . import functional as f
from .collectives import MESSAGE_BYTES, Entry, Line
from .guard import is_single
from .optimizers._base import Float32Optimizer, flatten
from .optimizers._turns import Leaf, Turns, Way
from .roles import Parameter
from .routing import Member, Plan, RoutedOptimizer
from .sealed import CheckpointError
from .shares import Item, Piece, Shares


class ShardedOptimizer(RoutedOptimizer):
    """A routed optimizer of which each rank of a group makes a share of the updates.

    Made by :func:`mlx_maxfactor.create_optimizer` with ``group``. Every rank has the whole model
    and hands in the gradients of its own batch; what counts is their mean. Each rank then updates
    its own parameters, keeps state for these alone, and sends them to the others: all ranks end a
    step with the same bits.

    A parameter belongs to one rank, or is cut in rows where that levels the ranks and its optimizer
    says how (``cuts``): what AdamW and SignSGD update, stacks of matrices that are updated one by
    one, matrices that Muon orthogonalizes in blocks of rows. A subclass says so by itself or is not
    asked.

    A step sends ``2(N - 1)/N`` of the gradients' bytes, and ``N - 1`` times those of the largest
    share of the parameters, which is about ``(N - 1)/N`` of all. The guards send nothing: every
    rank has all gradients, and decides alike.

    Every rank must make the same steps, evaluate the same arrays, and save and load checkpoints
    with the others. Collectives of one's own must be evaluated apart from a step.

    Args:
        group: The ranks, as ``mx.distributed.init()`` gives them.
        model, parameters, members, routes, max_grad_norm, skip_nonfinite, max_skipped: As for
            ``RoutedOptimizer``.

    Attributes:
        shares: What each rank updates.
        communication_stream: Where collectives run. None: MLX's choice.

    Raises:
        ValueError: A member updates all of its parameters at once.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Sequence[Parameter],
        members: Sequence[Member],
        routes: Mapping[str, int],
        *,
        group: mx.distributed.Group,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        max_skipped: int | None = None,
    ):
        if whole := [member.label for member in members if not is_single(member.optimizer)]:
            raise ValueError(
                f"{', '.join(whole)} cannot be shared among ranks, as it updates all of its "
                "parameters at once: give what it is made of to create_optimizer"
            )
        self._group = group
        self._line: Line | None = None
        self._shapes: dict[str, dict[str, mx.array]] = {}
        self.shares = Shares(group.size())
        self.communication_stream: mx.Stream | None = None
        super().__init__(
            model,
            parameters,
            members,
            routes,
            max_grad_norm=max_grad_norm,
            skip_nonfinite=skip_nonfinite,
            max_skipped=max_skipped,
        )

    @property
    def plan(self) -> Plan:
        """Who updates what; the bytes of state are those of one machine."""
        sizes = {path: _nbytes(arrays) for path, arrays in self._shapes.items()}
        return Plan([replace(e, state_bytes=sizes.get(e.path, 0)) for e in super().plan])

    # State

    def init(self, parameters: dict) -> None:
        """Make the state of this rank's share of every parameter that has none yet."""
        super().init(parameters)
        # Made whole, so that random keys are numbered as ever; nothing of it is evaluated.
        arrays = {path: x for path, x in flatten(parameters).items() if path in self._prepared}
        states = {path: self._state_of(path) for path in arrays}
        new = [path for path, x in arrays.items() if path not in self._shapes and x.size]
        for path in new:
            # Of shapes alone: what is held here must not be what is evaluated elsewhere.
            self._shapes[path] = {k: mx.zeros(x.shape, x.dtype) for k, x in states[path].items()}
        self.shares.add([self._item(path, arrays[path]) for path in new])
        for path, state in states.items():
            piece = self._own_piece(path)
            if piece is None:
                state.clear()
            elif piece.stop - piece.start < _rows(arrays[path]) and self._is_whole(path, state):
                self._cut_state(path, arrays[path], piece)

    def _state_of(self, path: str) -> dict:
        """The live state of one parameter."""
        state: Any = self.optimizers[self._routes[path]].state
        for key in path.split("."):
            state = state[int(key) if isinstance(state, list) else key]
        return state

    def _item(self, path: str, parameter: mx.array) -> Item:
        """What a parameter weighs, and whether it may be cut."""
        optimizer, shape = self.optimizers[self._routes[path]], parameter.shape
        work, cuts = float(parameter.size), 0
        if isinstance(optimizer, Float32Optimizer):
            layout = optimizer.layout_of(path)
            work = optimizer.work(shape, layout)
            # A subclass may take from all rows what the class that has `cuts` does not.
            if shape and "cuts" in vars(type(optimizer)) and optimizer.owns(path):
                cuts = optimizer.cuts(shape, layout)
        loads = (work, float(_nbytes(self._shapes[path])), float(parameter.nbytes))
        return Item(path, _rows(parameter), cuts, loads)

    def _own_piece(self, path: str) -> Piece | None:
        rank = self._group.rank()
        return next((p for p in self.shares.pieces.get(path, ()) if p.rank == rank), None)

    def _is_whole(self, path: str, state: Mapping[str, mx.array]) -> bool:
        """Whether state was just made, for the first time or after a load that was undone."""
        shapes = self._shapes[path]
        return any(
            x.shape == shapes[key].shape
            for key, x in state.items()
            if not self._is_common(path, key)
        )

    def _is_common(self, path: str, key: str) -> bool:
        """Whether all who have a piece of a parameter have this of its state whole.

        Counts and random keys are of the parameter as such.
        """
        return self._shapes[path][key].dtype == mx.uint32

    def _cut_state(self, path: str, parameter: mx.array, piece: Piece) -> None:
        """Leave a piece's state: made anew, as a slice would keep the whole alive."""
        optimizer, state = self.optimizers[self._routes[path]], self._state_of(path)
        assert isinstance(optimizer, Float32Optimizer)
        common = {key: x for key, x in state.items() if self._is_common(path, key)}
        state.clear()
        state.update(common)  # its random key, or it would be given another
        shape = (piece.stop - piece.start, *parameter.shape[1:])
        optimizer.init_single(mx.zeros(shape), state, optimizer.layout_of(path))
        state.update(common)

    # Updates

    def _received(self, leaves: list[Leaf]) -> list[Leaf]:
        if not f.can_wait():
            raise ValueError("a step of several ranks cannot be compiled with shapeless=True")
        self._line = Line(self._group, self.communication_stream)
        means = self._line.averaged([leaf.gradient for leaf in leaves])
        return [leaf._replace(gradient=g) for leaf, g in zip(leaves, means, strict=True)]

    def _take_all(self, turns: Turns, gradients: dict, leaves: list[Leaf], way: Way) -> dict:
        line, self._line = self._line, None
        assert line is not None
        entries = {
            leaf.path: Entry(
                leaf.parameter.shape,
                leaf.parameter.dtype,
                self.shares.pieces[leaf.path],
                self._take(turns, leaf, way),
            )
            for leaf in reversed(leaves)
            if leaf.path in self.shares.pieces
        }
        whole = line.gathered(entries)
        each = (whole.get(leaf.path, leaf.parameter) for leaf in leaves)
        return tree_map(lambda _: next(each), gradients)

    def _take(self, turns: Turns, leaf: Leaf, way: Way) -> mx.array | None:
        """This rank's piece of a parameter, updated."""
        piece, found = self._own_piece(leaf.path), way(leaf)
        if piece is None or found is None:
            return None
        p, optimizer = leaf.parameter, self.optimizers[self._routes[leaf.path]]
        if piece.stop - piece.start == _rows(p):
            return turns.take(leaf, *found)
        assert isinstance(optimizer, Float32Optimizer)
        rows = slice(piece.start, piece.stop)
        cut = leaf._replace(gradient=leaf.gradient[rows], parameter=p[rows])
        optimizer.part = f.Part(piece.start * (p.size // _rows(p)), p.size)
        try:
            return turns.take(cut, *found)
        finally:
            optimizer.part = None

    # Checkpoints

    described_as = RoutedOptimizer
    """What a checkpoint calls it: the number of ranks is of no account there."""

    @property
    def rank_and_size(self) -> tuple[int, int]:
        """Which rank this is, and of how many."""
        return self._group.rank(), self._group.size()

    def of_all(self, own: mx.array) -> mx.array:
        """What each rank has, along a new first axis. All ranks must call it."""
        return Line(self._group, self.communication_stream).all_gather(own)

    def with_whole_state(self, write: Callable[[dict[str, mx.array]], None]) -> None:
        """Write what is spread over the ranks, on the first of them. All ranks must call it.

        Raises:
            CheckpointError: The first rank could not write it; all ranks say so.
        """
        whole, problem = self.gather_state(), None
        if self._group.rank() == 0:
            try:
                write(whole)
            except Exception as error:  # whatever it is, the others wait to hear of it
                problem = error
        failed = mx.array(int(problem is not None))
        if Line(self._group).all_sum(failed).item():
            raise problem or CheckpointError("the checkpoint was not written, see the first rank")

    def gather_state(self) -> dict[str, mx.array]:
        """What is spread over the ranks, by name, as one machine has it. All ranks must call it.

        Only the first rank gets it; the others hold a message at a time, and get nothing.
        """
        whole: dict[str, mx.array] = {}
        entries: dict[str, Entry] = {}
        spread = self.spread_state()
        filled, last = 0, len(spread)
        for i, (name, array) in enumerate(spread.items(), 1):
            pieces = array.pieces[:1] if array.is_common else array.pieces
            own = self._state_of(array.path).get(array.key)
            entries[name] = Entry(array.shape.shape, array.shape.dtype, pieces, own)
            filled += array.shape.nbytes
            if filled >= MESSAGE_BYTES or i == last:
                gathered = Line(self._group, self.communication_stream).gathered(entries)
                mx.eval(gathered)
                whole |= gathered if self._group.rank() == 0 else {}
                entries, filled = {}, 0
        return whole

    def spread_state(self) -> dict[str, "SpreadArray"]:
        """Every array of the parameters' state by name, in the same order on all ranks."""
        spread, rank = {}, self._group.rank()
        for path, shapes in self._shapes.items():
            shape = self._parameters[path].shape
            for key, x in shapes.items():
                is_common = self._is_common(path, key)
                held = tuple(
                    Piece(piece.rank, 0, _rows(x))
                    if is_common
                    else _span(x, piece, shape[0] if shape else 1)
                    for piece in self.shares.pieces[path]
                )
                name = f"states.{self._routes[path]}.{path}.{key}"
                spread[name] = SpreadArray(path, key, x, held, rank, is_common)
        return spread


class SpreadArray(NamedTuple):
    """An array of a parameter's state: where it is, its shape when whole, and who has what.

    What is common, all have whole who have a piece of the parameter.
    """

    path: str
    key: str
    shape: mx.array
    pieces: tuple[Piece, ...]
    rank: int
    is_common: bool

    def own(self, whole: mx.array) -> mx.array:
        """This rank's rows of the whole array."""
        piece = next(piece for piece in self.pieces if piece.rank == self.rank)
        if self.is_common or piece.stop - piece.start == _rows(whole):
            return whole
        return whole[piece.start : piece.stop] * 1  # a slice would keep the whole alive


def _span(state: mx.array, piece: Piece, rows: int) -> Piece:
    """What of an array of the state the owner of a piece has, in rows of that array."""
    # A scale for so many elements each: rounded up at the end, where the last may not be full.
    start, stop = (row * _rows(state) // rows for row in (piece.start, piece.stop))
    return Piece(piece.rank, start, stop)


def _rows(x: mx.array) -> int:
    return x.shape[0] if x.ndim else 1


def _nbytes(arrays: Mapping[str, mx.array]) -> int:
    return sum(x.nbytes for x in arrays.values())
