"""MaxFactor: the defects of the published versions, its options."""

import mlx.core as mx
import numpy as np
import pytest
from trajectories import hard_gradients, parameter
from twins import PRESETS

from mlx_maxfactor import MaxFactor, reference

# The published defects


def test_vector_moves_against_its_gradient():
    # The hub and speech versions square the gradient in place before they use it: its sign is lost.
    g = np.array([1.0, -2.0, 0.5, -0.1], np.float32)
    optimizer = MaxFactor(weight_decay=0.0)
    moved = optimizer.apply_gradients({"b": mx.array(g)}, {"b": mx.zeros(4)})["b"]
    assert np.array_equal(np.sign(np.array(moved)), -np.sign(g))


def test_vector_state_is_a_moving_average_of_squares():
    # The published versions overwrite the state with the update.
    optimizer, tree = MaxFactor(gamma=0.9), {"b": mx.ones(2)}
    for g in (1.0, 2.0, 3.0):
        tree = optimizer.apply_gradients({"b": mx.full((2,), g)}, tree)
    expected = 0.1 * (0.81 * 1 + 0.9 * 4 + 9)
    assert np.allclose(np.array(optimizer.state["b"]["v"]), expected, rtol=1e-6)


def test_every_parameter_of_a_tree_moves():
    # The hub version returns inside its loop over groups, so the second group never moves.
    tree = {"a": {"w": mx.ones((3, 4))}, "b": [{"w": mx.ones((4, 3))}, {"b": mx.ones(5)}]}
    moved = MaxFactor().apply_gradients(tree, tree)
    for p in (moved["a"]["w"], moved["b"][0]["w"], moved["b"][1]["b"]):
        assert mx.all(p < 1).item()


STATE_SIZES = [
    ((48, 32), "batched", 80),
    ((3, 48, 32), "experts", 240),
    ((16, 3, 3, 8), "conv", 88),
    ((48,), "batched", 48),
    ((), "batched", 1),
    ((1, 1), "batched", 1),  # as a single number
]


@pytest.mark.parametrize(("shape", "layout", "floats"), STATE_SIZES, ids=str)
def test_state_of_a_matrix_is_its_row_and_column_statistics(shape, layout, floats):
    # All three published versions keep a full second moment for every matrix, and never use it.
    state = {}
    MaxFactor().init_single(mx.zeros(shape), state, layout)
    assert sum(x.size for x in state.values()) == floats
    assert all(x.dtype == mx.float32 for x in state.values())


def test_momentum_adds_one_buffer():
    state = {}
    MaxFactor(momentum=0.9, nesterov=True, cautious=True).init_single(mx.zeros((48, 32)), state)
    assert sum(x.size for x in state.values()) == 80 + 48 * 32


def test_clip_threshold_limits_the_update():
    # The speech version clips the .grad of the update, which has none.
    g, p = {"w": mx.array(parameter((8, 8)))}, {"w": mx.zeros((8, 8))}
    options = {"max_norm": False, "weight_decay": 0.0, "eps": (1e-10, 1.0), "learning_rate": 1.0}
    free = MaxFactor(**options).apply_gradients(g, p)["w"]
    clipped = MaxFactor(clip_threshold=0.5, **options).apply_gradients(g, p)["w"]
    assert np.linalg.norm(np.array(free)) > 1
    assert np.linalg.norm(np.array(clipped)) == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("scale", [1e-3, 1e5, 1e14])
def test_step_does_not_depend_on_the_gradient_scale(scale):
    # The published versions multiply R and C before they divide: from 1e10 on that is inf, so
    # nothing moves.
    g, p = parameter((6, 5)), {"w": mx.zeros((6, 5))}
    plain, scaled = (
        MaxFactor().apply_gradients({"w": mx.array(g * np.float32(s))}, p)["w"]
        for s in (1.0, scale)
    )
    # Scaling by a number that is not a power of two rounds each gradient once.
    assert np.allclose(np.array(scaled), np.array(plain), rtol=1e-5, atol=0)


# Step size and options


def test_effective_learning_rate_is_the_size_of_the_next_update():
    optimizer = MaxFactor(lambda step: 0.03 / (step + 1), weight_decay=0.0)
    tree = {"w": mx.array(parameter((6, 5))), "b": mx.zeros(5)}
    for g in hard_gradients((6, 5), steps=4):
        rates = optimizer.effective_learning_rates(tree)
        moved = optimizer.apply_gradients({"w": mx.array(g), "b": mx.ones(5)}, tree)
        for key in tree:
            step = mx.max(mx.abs(moved[key] - tree[key])).item()
            # A difference of parameters near 1, each rounded to 6e-8; steps are 1e-2.
            assert step == pytest.approx(rates[key], rel=2e-5)
        tree = moved


@pytest.mark.parametrize("name", ["early", "hub", "speech"])
def test_presets_have_the_published_options(name):
    ours, twin = vars(MaxFactor.preset(name)), vars(reference.MaxFactor(**PRESETS[name]))
    assert {k: ours[k] for k in twin if k in ours} == {k: twin[k] for k in twin if k in ours}
    assert set(twin) - set(ours) <= {"learning_rate", "step", "t"}


def test_error_for_an_unknown_preset_lists_the_presets():
    with pytest.raises(ValueError, match="'early', 'hub', 'speech', got 'late'"):
        MaxFactor.preset("late")
    assert MaxFactor.preset("speech", weight_decay=0.5).weight_decay == 0.5
