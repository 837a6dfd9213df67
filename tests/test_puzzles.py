"""The puzzles: rules do what they say, a Sudoku has one solution, held-out data is separate."""

from itertools import permutations, product

import numpy as np
import pytest
from puzzles import (
    COLUMN_ORDERS,
    KINDS,
    ROW_ORDERS,
    RULE_SIDE,
    SIDE,
    SYMBOLS,
    UNITS,
    Rule,
    Rules,
    Sudoku,
    draw_puzzle,
    draw_rules,
    fill_forced,
    is_held_out,
    renamed,
    solutions,
)

pytestmark = pytest.mark.examples

CELLS = SIDE * SIDE


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


def test_rule_applies_its_shift_symmetry_and_colours():
    grid = np.arange(RULE_SIDE**2).reshape(RULE_SIDE, RULE_SIDE) % SYMBOLS
    assert np.array_equal(Rule()(grid), grid)
    top = Rule(shift=(1, 2))(grid)
    assert top[0, 0] == grid[-1, -2], "a shift must wrap around"
    colours = Rule((1, 2, 3, 4, 5, 0))(grid)
    assert np.array_equal(colours, (grid + 1) % SYMBOLS)
    # The eight symmetries differ and keep the centre of the square.
    marked = np.arange(RULE_SIDE**2).reshape(RULE_SIDE, -1)
    identity = tuple(range(RULE_SIDE**2))
    turned = [Rule(identity, symmetry)(marked) for symmetry in range(8)]
    corners = {tuple(t[[0, 0, -1, -1], [0, -1, 0, -1]].tolist()) for t in turned}
    assert len(corners) == 8
    assert {int(t[2, 2]) for t in turned} == {12}
    both = Rule((5, 4, 3, 2, 1, 0), 3, (2, 4))(grid)
    one_by_one = Rule((5, 4, 3, 2, 1, 0))(Rule(shift=(2, 4))(Rule(symmetry=3)(grid)))
    assert np.array_equal(both, one_by_one)


def test_drawn_rules_differ_and_have_one_to_three_parts():
    rules = draw_rules(100, np.random.default_rng(0))
    marked = np.arange(RULE_SIDE**2).reshape(RULE_SIDE, -1)
    moves = {(r.colours, r._replace(colours=tuple(range(25)))(marked).tobytes()) for r in rules}
    assert len(moves) == len(rules) == 100
    plain = Rule()
    parts = [sum(a != b for a, b in zip(rule, plain, strict=True)) for rule in rules]
    assert parts.count(0) == 0
    assert min(parts.count(n) for n in (1, 2, 3)) >= 10


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
    return all({grid[i] for i in unit} == set(range(1, SIDE + 1)) for unit in UNITS)


def as_sorted_lists(unit_of):
    return sorted(map(sorted, unit_of))


def test_units_are_rows_columns_and_two_by_three_boxes():
    square = np.arange(CELLS).reshape(SIDE, SIDE)
    boxes = [square[r : r + 2, c : c + 3].ravel() for r, c in product((0, 2, 4), (0, 3))]
    assert as_sorted_lists(UNITS) == as_sorted_lists([*square, *square.T, *boxes])


def test_search_finds_every_solution(drawn):
    _, grid = drawn[0]
    # Without two rows of a band, each column lacks two digits, which have two possible orders.
    cells = [0] * 12 + grid[12:]
    lacks = [sorted({*range(1, SIDE + 1)} - {*grid[12 + c :: SIDE]}) for c in range(SIDE)]
    orders = product(*(permutations(two) for two in lacks))
    tried = [[*next(rows), *next(rows), *grid[12:]] for rows in (iter(zip(*o)) for o in orders)]  # noqa: B905
    fits = [cells for cells in tried if is_solved(cells)]
    assert len(tried) == 64
    assert len(fits) > 1
    assert sorted(solutions(cells, 10**6)) == sorted(fits)
    assert len(solutions(cells, 2)) == 2
    impossible = [0, 2, 3, 4, 5, 6, 1] + [0] * 29
    assert solutions(impossible, 1) == []


def test_puzzle_has_one_solution_and_no_redundant_given(drawn):
    for puzzle, grid in drawn[:10]:
        assert is_solved(grid)
        assert solutions(puzzle, 2) == [grid]
        for i in np.flatnonzero(puzzle):
            fewer = list(puzzle)
            fewer[i] = 0
            assert len(solutions(fewer, 2)) == 2


def forced(cells, hidden):
    """The cells forced by a single (a hidden one too, if asked), found with sets."""
    left = [
        set(range(1, SIDE + 1)) - {cells[j] for unit in UNITS if i in unit for j in unit}
        if not cells[i]
        else set()
        for i in range(CELLS)
    ]
    found = {i for i in range(CELLS) if len(left[i]) == 1}
    for unit in UNITS if hidden else ():
        for digit in range(1, SIDE + 1):
            places = [i for i in unit if digit in left[i]]
            found |= set(places) if len(places) == 1 else set()
    return found


@pytest.mark.parametrize("hidden", [False, True])
def test_fill_forced_is_right_and_leaves_no_forced_cell(hidden, drawn, sudoku):
    hard = [(q.tolist(), (a + 1).tolist()) for _, q, a in zip(*sudoku.held_out, strict=True)]
    ends = []
    for puzzle, grid in [*drawn, *hard]:
        filled = fill_forced(puzzle, hidden)
        assert all(f in (0, g) for f, g in zip(filled, grid, strict=True))
        assert all(f == p for f, p in zip(filled, puzzle, strict=True) if p)
        assert not forced(filled, hidden)
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


def test_renamed_digits_give_the_same_grid(drawn):
    grids = np.array([grid for _, grid in drawn])
    names = np.array([0, 4, 2, 6, 1, 3, 5])
    assert np.array_equal(renamed(names[grids]), renamed(grids))
    assert np.array_equal(is_held_out(names[grids]), is_held_out(grids))
    assert {tuple(r) for r in renamed(grids).tolist()} == {
        numbered_by_first_use(g) for g in grids.tolist()
    }


def test_no_held_out_grid_is_a_training_grid_with_its_digits_renamed(sudoku):
    batch = sudoku.training(20_000, np.random.default_rng(1))
    trained = {numbered_by_first_use(grid) for grid in batch.answers.tolist()}
    held_out = {numbered_by_first_use(grid) for grid in sudoku.held_out.answers.tolist()}
    assert len(trained) > 1000
    assert not trained & held_out


def test_training_puzzles_have_exactly_one_solution(sudoku):
    batch = sudoku.training(60, np.random.default_rng(2))
    for question, answer in zip(
        batch.questions.tolist(), (batch.answers + 1).tolist(), strict=True
    ):
        assert solutions(question, 2) == [answer]
        assert fill_forced(question, hidden=True) != answer


def test_every_order_of_lines_keeps_the_boxes():
    for orders, lines, count in ((ROW_ORDERS, 2, 48), (COLUMN_ORDERS, 3, 72)):
        assert len({tuple(order) for order in orders}) == len(orders) == count
        bands = orders.reshape(count, -1, lines) // lines
        assert (bands == bands[..., :1]).all()
        assert (np.sort(orders, axis=1) == np.arange(SIDE)).all()
