"""The puzzles: they depend on their seed, a Sudoku has one solution, held-out data is separate."""

from itertools import product

import numpy as np
import pytest
from puzzles import (
    KINDS,
    RULE_SIDE,
    SIDE,
    SYMBOLS,
    Rules,
    Sudoku,
    draw_puzzle,
    fill_forced,
    solutions,
)

pytestmark = pytest.mark.examples


@pytest.fixture(scope="module")
def sudoku():
    return Sudoku(24)


@pytest.fixture(scope="module")
def drawn():
    random = np.random.default_rng(5)
    return [draw_puzzle(random) for _ in range(40)]


@pytest.mark.parametrize("kind", KINDS)
def test_puzzles_depend_only_on_their_seed(kind):
    one, same, other = (KINDS[kind](2, seed) for seed in (1, 1, 2))
    assert one.digest == same.digest != other.digest
    batches = [one.training(20, np.random.default_rng(seed)) for seed in (3, 3, 4)]
    assert all(np.array_equal(a, b) for a, b in zip(batches[0], batches[1], strict=True))
    assert not np.array_equal(batches[0].answers, batches[2].answers)
    for examples in (*batches, one.held_out):
        assert examples.identities.max() < one.identities
        assert set(np.unique(examples.answers)) == set(range(SYMBOLS))


# Rules


def test_held_out_inputs_cover_every_rule_and_are_never_trained_on():
    rules = Rules(30)
    assert sorted(set(rules.held_out.identities)) == list(range(30))
    batch = rules.training(2000, np.random.default_rng(1))
    held_out = {q.tobytes() for q in rules.held_out.questions}
    assert len(held_out) == len(rules.held_out.questions)
    assert not held_out & {q.tobytes() for q in batch.questions}
    for examples in (batch, rules.held_out):
        for identity, question, answer in list(zip(*examples, strict=True))[:100]:
            square = question.reshape(RULE_SIDE, -1)
            assert np.array_equal(rules.rules[identity](square).ravel(), answer)
    assert rules.baselines["unchanged"]["exact match"] < 0.05


# Sudoku


def is_solved(grid):
    """Whether rows, columns and boxes of two by three hold each digit once."""
    square = np.reshape(grid, (SIDE, SIDE))
    boxes = [square[r : r + 2, c : c + 3].ravel() for r, c in product((0, 2, 4), (0, 3))]
    return all({*unit} == set(range(1, SIDE + 1)) for unit in (*square, *square.T, *boxes))


def test_puzzle_has_one_solution_and_no_redundant_given(drawn):
    for puzzle, grid in drawn[:10]:
        assert is_solved(grid)
        assert solutions(puzzle, 2) == [grid]
        for i in np.flatnonzero(puzzle):
            fewer = list(puzzle)
            fewer[i] = 0
            assert len(solutions(fewer, 2)) == 2


@pytest.mark.parametrize("hidden", [False, True])
def test_fill_forced_is_right_and_leaves_no_forced_cell(hidden, drawn, sudoku):
    hard = [(q.tolist(), (a + 1).tolist()) for _, q, a in zip(*sudoku.held_out, strict=True)]
    ends = []
    for puzzle, grid in [*drawn, *hard]:
        filled = fill_forced(puzzle, hidden)
        assert all(f in (0, g) for f, g in zip(filled, grid, strict=True))
        assert all(f == p for f, p in zip(filled, puzzle, strict=True) if p)
        ends.append(filled == grid)
    # Singles solve most puzzles with the fewest givens, but none of the puzzles that are kept.
    assert np.mean(ends[: len(drawn)]) > (0.8 if hidden else 0.3)
    assert not any(ends[len(drawn) :])


def test_forced_cells_alone_solve_no_held_out_puzzle(sudoku):
    naked, both = sudoku.baselines.values()
    assert naked["exact match"] <= both["exact match"] <= 0.2
    assert naked["cells"] < both["cells"] < 1


def numbered_by_first_use(grid):
    names = {}
    return tuple(names.setdefault(digit, len(names)) for digit in grid)


def test_no_held_out_grid_is_a_training_grid_with_its_digits_renamed(sudoku):
    batch = sudoku.training(20_000, np.random.default_rng(1))
    trained = {numbered_by_first_use(grid) for grid in batch.answers.tolist()}
    held_out = {numbered_by_first_use(grid) for grid in sudoku.held_out.answers.tolist()}
    assert len(trained) > 1000
    assert not trained & held_out


def test_training_puzzles_have_exactly_one_solution(sudoku):
    batch = sudoku.training(60, np.random.default_rng(2))
    pairs = zip(batch.questions.tolist(), (batch.answers + 1).tolist(), strict=True)
    for question, answer in pairs:
        assert solutions(question, 2) == [answer]
        assert fill_forced(question, hidden=True) != answer
