"""Adafactor: its twin, and the two defects of the published port."""

import mlx.core as mx
import numpy as np
import pytest
from trajectories import SHAPES, assert_follows, label, parameter

from mlx_maxfactor import Adafactor, reference

OPTIONS = [
    {},
    {"learning_rate": 0.05, "weight_decay": 0.1},
    {"learning_rate": 0.05, "clip_threshold": 2.0},
    {"clip_threshold": 0.3, "decay_rate": -0.5},
    {"learning_rate": lambda step: 0.05 / (step + 1)},
]


@pytest.mark.parametrize("zero", [False, True], ids=["noise", "zero"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=label)
def test_optimizer_follows_the_twin(options, shape, zero):
    assert_follows(Adafactor(**options), reference.Adafactor(**options), shape, zero=zero)


@pytest.mark.parametrize("layout", ["batched", "experts", "conv", "transposed"])
@pytest.mark.parametrize("shape", [(6, 3, 3, 4), (3, 4, 5), (8, 5)], ids=str)
def test_layouts_follow_the_twin(shape, layout):
    assert_follows(Adafactor(), reference.Adafactor(), shape, layout)


def test_second_moment_is_divided_by_the_mean_of_the_row_statistics():
    # The published port divides by their sum, so V is m times too small; its clip hides this.
    g, p = {"w": mx.array(parameter((8, 5)))}, {"w": mx.zeros((8, 5))}
    step = Adafactor(1.0, clip_threshold=1e9).apply_gradients(g, p)["w"]
    # At t = 1, V and g² have the same mean, so u has an RMS near 1, not near √8.
    assert 0.8 < np.sqrt(np.mean(np.square(np.array(step)))) < 1.25


@pytest.mark.parametrize("threshold", [0.25, 4.0])
def test_clip_scales_the_update_to_its_threshold(threshold):
    # The published port scales by 1 / (RMS · clip), the paper by clip / RMS.
    optimizer, tree = Adafactor(1.0, clip_threshold=threshold), {"b": mx.zeros(6)}
    for scale in (1.0, 1e3, 1e3):
        before = tree["b"]
        g = mx.array(parameter((6,))) * scale
        tree = optimizer.apply_gradients({"b": g}, tree)
    rms = np.sqrt(np.mean(np.square(np.array(tree["b"] - before))))
    exact = 1.0 if threshold > 1 else threshold  # an unclipped update has RMS near 1
    assert rms == pytest.approx(exact, rel=0.2 if threshold > 1 else 1e-5)


def test_statistics_still_change_late_in_a_bf16_run():
    # MLX's Adafactor computes 1 - t^-0.8 in the parameter's dtype: in bf16, 1 from step 2500 on.
    optimizer, p = Adafactor(), {"w": mx.ones((4, 4), mx.bfloat16)}
    optimizer.init(p)
    optimizer.state["w"]["count"] = mx.array(5000, mx.uint32)
    optimizer.apply_gradients({"w": mx.ones((4, 4), mx.bfloat16)}, p)
    assert np.allclose(np.array(optimizer.state["w"]["row"]), 5001**-0.8, rtol=1e-5)


def test_layer_unfrozen_late_uses_its_own_step_count():
    optimizer, tree = Adafactor(0.1, clip_threshold=1e9), {"a": mx.ones(2)}
    for _ in range(50):
        optimizer.apply_gradients(tree, tree)
    late = {"a": mx.ones(2), "b": mx.zeros(2)}
    moved = optimizer.apply_gradients({"a": mx.ones(2), "b": mx.ones(2)}, late)["b"]
    assert np.allclose(
        np.array(moved), -0.1, rtol=1e-5
    )  # the global count would give 4.8 times this step
