"""SignSGD: its twin, and rows without gradient."""

import mlx.core as mx
import numpy as np
import pytest
from trajectories import SHAPES, assert_follows, label

from mlx_maxfactor import SignSGD, reference


@pytest.mark.parametrize("zero", [False, True], ids=["noise", "zero"])
@pytest.mark.parametrize("shape", [*SHAPES, ()], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"sparse_rows": True}, {"learning_rate": lambda step: 0.05 / (step + 1)}],
    ids=label,
)
def test_optimizer_follows_the_twin(options, shape, zero):
    assert_follows(SignSGD(**options), reference.SignSGD(**options), shape, zero=zero)


def test_step_equals_the_documented_example():
    p, g = mx.array([[1.0, 2.0]]), mx.array([[0.5, -3.0]])
    moved = SignSGD(0.1, weight_decay=0.01).apply_gradients({"w": g}, {"w": p})["w"]
    assert np.allclose(np.array(moved), [[0.899, 2.098]], atol=1e-6)


def test_sparse_rows_leaves_rows_without_gradient_unchanged():
    p = mx.array([[1.1, 2.2], [3.3, 4.4]])
    g = mx.array([[0.0, 0.0], [0.0, 1e-30]])
    sparse = SignSGD(sparse_rows=True).apply_gradients({"w": g}, {"w": p})["w"]
    dense = SignSGD().apply_gradients({"w": g}, {"w": p})["w"]
    assert sparse[0].tolist() == p[0].tolist()
    assert sparse[1].tolist() == dense[1].tolist() != p[1].tolist()
    assert dense[0].tolist() != p[0].tolist()


def test_optimizer_keeps_no_state():
    state = {}
    SignSGD().init_single(mx.zeros((3, 4)), state)
    assert state == {}
