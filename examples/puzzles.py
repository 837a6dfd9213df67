"""Generated puzzles: rules as in ARC, and Sudoku with six digits.

In *rules*, each puzzle is a hidden transformation of small grids. The transformation permutes the
colours, turns or mirrors the grid, shifts it around its edges, or combines these. The model must
learn it from examples. The held-out data are new inputs of known puzzles. In *Sudoku*, each puzzle
has one solution, and filling forced cells does not find it. A held-out grid never equals a training
grid, even if its digits are renamed.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from itertools import permutations, product
from typing import NamedTuple, Protocol
from zlib import crc32

import numpy as np
from tqdm import tqdm

SYMBOLS = 6  # colours, or digits
SIDE = 6  # side of a Sudoku; its boxes have two rows and three columns
RULE_SIDE = 5  # side of a grid in rules
HELD_OUT_INPUTS = 4  # per rule
HELD_OUT_CLASSES = 3  # a third of the classes; a class is a grid up to renamed digits


class Examples(NamedTuple):
    """Puzzles: identities (n,), given cells (n, cells), answers below SYMBOLS (n, cells)."""

    identities: np.ndarray
    questions: np.ndarray
    answers: np.ndarray


class Puzzles(Protocol):
    """One kind of puzzles: endless training puzzles, and held-out ones."""

    held_out: Examples
    identities: int  # how many puzzles have their own embedding

    @property
    def digest(self) -> str:
        """Identifies these puzzles."""
        ...

    @property
    def baselines(self) -> Mapping[str, Mapping[str, float]]:
        """Shares of held-out puzzles and cells that simple methods solve."""
        ...

    def training(self, count: int, random: np.random.Generator) -> Examples:
        """Random training puzzles."""
        ...


def shares(answers: np.ndarray, right: np.ndarray) -> dict[str, float]:
    """Shares of completely correct puzzles and of correct cells."""
    cells = answers == right
    return {"exact match": float(cells.all(axis=1).mean()), "cells": float(cells.mean())}


def digest(examples: Examples) -> str:
    return sha256(b"".join(array.tobytes() for array in examples)).hexdigest()


# Rules


class Rule(NamedTuple):
    """A rule: turn or mirror a grid, shift it, then change its colours."""

    colours: tuple[int, ...] = tuple(range(SYMBOLS))
    symmetry: int = 0  # quarter turns (0 to 3); from 4 on, also mirrored
    shift: tuple[int, int] = (0, 0)  # down and right, around the edges

    def __call__(self, grid: np.ndarray) -> np.ndarray:
        """Transform a grid. The shape stays the same."""
        grid = np.rot90(grid, self.symmetry % 4)
        grid = grid.T if self.symmetry >= 4 else grid
        return np.array(self.colours)[np.roll(grid, self.shift, (0, 1))]


def draw_rules(count: int, random: np.random.Generator) -> list[Rule]:
    """Different rules. The seven combinations of colours, symmetry and shift take turns."""
    rules: dict[Rule, None] = {}
    turn = 0
    while len(rules) < count:
        turn += 1
        parts = turn % 7 + 1
        colours = random.permutation(SYMBOLS) if parts & 1 else np.arange(SYMBOLS)
        symmetry = random.integers(1, 8) if parts & 2 else 0
        down, right = divmod(int(random.integers(1, RULE_SIDE**2)) if parts & 4 else 0, RULE_SIDE)
        rules[Rule(tuple(colours.tolist()), int(symmetry), (down, right))] = None
    return list(rules)


class Rules:
    """Grids before and after a rule. The model sees only the number of the rule."""

    def __init__(self, count: int, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        self.rules = draw_rules(count, random)
        self.identities = count
        self.held_out = self.examples(np.repeat(np.arange(count), HELD_OUT_INPUTS), random)

    @property
    def digest(self) -> str:
        """Identifies these puzzles."""
        return digest(self.held_out)

    @property
    def baselines(self) -> dict[str, dict[str, float]]:
        """The question itself as the answer."""
        return {"unchanged": shares(self.held_out.questions, self.held_out.answers)}

    def training(self, count: int, random: np.random.Generator) -> Examples:
        """New inputs for known rules. There are 6^25 grids, so none repeats."""
        return self.examples(random.integers(self.identities, size=count), random)

    def examples(self, identities: np.ndarray, random: np.random.Generator) -> Examples:
        """A random input for each rule, and its answer."""
        grids = random.integers(SYMBOLS, size=(len(identities), RULE_SIDE, RULE_SIDE))
        answers = [self.rules[i](grid) for i, grid in zip(identities, grids, strict=True)]
        n = len(identities)
        return Examples(identities, grids.reshape(n, -1), np.stack(answers).reshape(n, -1))


# Sudoku. A grid is 36 numbers, row by row. An empty cell is 0.

_row, _column = np.divmod(np.arange(SIDE**2), SIDE)
_UNIT_OF = [_row.tolist(), _column.tolist(), (_row // 2 * 2 + _column // 3).tolist()]
UNITS = [
    [i for i in range(SIDE**2) if unit_of[i] == u] for unit_of in _UNIT_OF for u in range(SIDE)
]
PEERS = [sorted({j for unit in UNITS if i in unit for j in unit} - {i}) for i in range(SIDE**2)]
DIGITS = (1 << SIDE) - 1  # all digits; a set of digits is a bit mask with 1 << (d - 1) for digit d


def solutions(
    cells: list[int], limit: int, random: np.random.Generator | None = None
) -> list[list[int]]:
    """At most `limit` solutions, in random order with `random`. The givens must not conflict."""
    cells, found = list(cells), []
    rows, columns, boxes = ([DIGITS] * SIDE for _ in _UNIT_OF)
    units = list(zip(*_UNIT_OF, strict=True))

    def flip(i: int, bit: int) -> None:
        r, c, b = units[i]
        rows[r] ^= bit
        columns[c] ^= bit
        boxes[b] ^= bit

    for i, digit in enumerate(cells):
        if digit:
            flip(i, 1 << (digit - 1))
    empty = [i for i, digit in enumerate(cells) if not digit]

    def search() -> None:
        if not empty:
            found.append(cells.copy())
            return
        place, choices, least = 0, 0, SIDE + 1
        for k, i in enumerate(empty):
            r, c, b = units[i]
            candidates = rows[r] & columns[c] & boxes[b]
            if (count := candidates.bit_count()) < least:
                place, choices, least = k, candidates, count
                if count < 2:
                    break
        i = empty.pop(place)
        digits = [d for d in range(1, SIDE + 1) if choices >> (d - 1) & 1]
        if random is not None:
            random.shuffle(digits)
        for digit in digits:
            cells[i] = digit
            flip(i, 1 << (digit - 1))
            search()
            flip(i, 1 << (digit - 1))
            if len(found) >= limit:
                break
        cells[i] = 0
        empty.insert(place, i)

    search()
    return found


def draw_puzzle(random: np.random.Generator) -> tuple[list[int], list[int]]:
    """A puzzle and its only solution. No given of the puzzle is redundant."""
    grid = solutions([0] * SIDE**2, 1, random)[0]
    puzzle = list(grid)
    for i in random.permutation(SIDE**2).tolist():
        puzzle[i] = 0
        if len(solutions(puzzle, 2)) > 1:
            puzzle[i] = grid[i]
    return puzzle, grid


def fill_forced(cells: list[int], hidden: bool) -> list[int]:
    """Fill forced cells until there are none.

    A naked single is a cell for which only one digit is left. A hidden single is a digit with only
    one place left in a row, column or box.

    Args:
        cells: A grid.
        hidden: Also fill hidden singles.
    """
    cells = list(cells)
    while True:
        candidates = [
            0 if digit else DIGITS & ~sum({1 << cells[j] >> 1 for j in PEERS[i]})
            for i, digit in enumerate(cells)
        ]
        forced = {i: c for i, c in enumerate(candidates) if c.bit_count() == 1}
        if not forced and hidden:
            for unit, digit in product(UNITS, range(SIDE)):
                places = [i for i in unit if candidates[i] >> digit & 1]
                if len(places) == 1:
                    forced[places[0]] = 1 << digit
                    break
        if not forced:
            return cells
        for i, bit in forced.items():
            cells[i] = bit.bit_length()


def renamed(grids: np.ndarray) -> np.ndarray:
    """Solved grids (n, 36) with digits renamed, so that the first row is 0, 1, 2, 3, 4, 5."""
    names = np.argsort(grids[:, :SIDE], axis=1)
    return np.take_along_axis(names, grids - 1, axis=1)


def is_held_out(grids: np.ndarray) -> np.ndarray:
    """Whether each of the solved grids (n, 36) belongs to a held-out class, (n,)."""
    classes = renamed(grids).astype(np.int8)
    return np.array([crc32(grid.tobytes()) % HELD_OUT_CLASSES == 0 for grid in classes], bool)


def line_orders(lines: int) -> np.ndarray:
    """All orders of rows or columns that keep boxes together, (n, 6). A box has `lines` lines."""
    inside = list(permutations(range(lines)))
    bands = range(SIDE // lines)
    return np.array(
        [
            [
                band * lines + line
                for band, order_inside in zip(order, each, strict=True)
                for line in order_inside
            ]
            for order in permutations(bands)
            for each in product(inside, repeat=len(bands))
        ]
    )


ROW_ORDERS, COLUMN_ORDERS = line_orders(2), line_orders(3)


class Sudoku:
    """Hard puzzles. Filling forced cells (naked and hidden singles) does not solve them."""

    identities = 1  # one embedding for all: the rules are always the same

    def __init__(self, count: int, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        wanted = {False: count, True: max(2, count // 2)}  # False: training, True: held out
        kept: dict[bool, list[tuple[list[int], list[int]]]] = {False: [], True: []}
        with tqdm(total=sum(wanted.values()), desc="puzzles", unit="puzzle", leave=False) as bar:
            while any(len(kept[part]) < wanted[part] for part in wanted):
                puzzle, grid = draw_puzzle(random)
                part = bool(is_held_out(np.array([grid]))[0])
                if len(kept[part]) < wanted[part] and fill_forced(puzzle, hidden=True) != grid:
                    kept[part].append((puzzle, grid))
                    bar.update()
        self.puzzles, self.grids = np.array(kept[False]).swapaxes(0, 1)
        questions, answers = np.array(kept[True]).swapaxes(0, 1)
        self.held_out = Examples(np.zeros(len(questions), int), questions, answers - 1)

    @property
    def digest(self) -> str:
        """Identifies these puzzles."""
        trained = Examples(np.zeros(1), self.puzzles, self.grids)
        return digest(trained) + digest(self.held_out)

    @property
    def baselines(self) -> dict[str, dict[str, float]]:
        """Results of filling naked singles, and naked and hidden singles."""
        questions, answers = self.held_out.questions.tolist(), self.held_out.answers + 1
        filled = {
            "naked singles": [fill_forced(cells, hidden=False) for cells in questions],
            "and hidden ones": [fill_forced(cells, hidden=True) for cells in questions],
        }
        return {name: shares(np.array(cells), answers) for name, cells in filled.items()}

    def training(self, count: int, random: np.random.Generator) -> Examples:
        """Random training puzzles with permuted rows, columns and digits.

        If the result would be a held-out grid, the rows and columns stay in place.
        """
        chosen = random.integers(len(self.grids), size=count)
        puzzles, grids = self.puzzles[chosen], self.grids[chosen]
        rows = ROW_ORDERS[random.integers(len(ROW_ORDERS), size=count)]
        columns = COLUMN_ORDERS[random.integers(len(COLUMN_ORDERS), size=count)]
        order = (SIDE * rows[:, :, None] + columns[:, None, :]).reshape(count, -1)
        moved = np.take_along_axis(grids, order, axis=1)
        order = np.where(is_held_out(moved)[:, None], np.arange(SIDE**2), order)
        names = random.permuted(np.tile(np.arange(1, SIDE + 1), (count, 1)), axis=1)
        names = np.pad(names, ((0, 0), (1, 0)))  # empty cells stay empty
        puzzles, grids = (
            np.take_along_axis(names, np.take_along_axis(array, order, axis=1), axis=1)
            for array in (puzzles, grids)
        )
        return Examples(np.zeros(count, int), puzzles, grids - 1)


KINDS = {"rules": Rules, "sudoku": Sudoku}
