"""Muon: its twin, and what MLX's Muon gets wrong."""

import mlx.core as mx
import numpy as np
import pytest
from trajectories import assert_follows, label

from mlx_maxfactor import Muon, reference

OPTIONS = [
    {},
    {"nesterov": False, "momentum": 0.5},
    {"scale": "spectral", "weight_decay": 0.1},
    {"scale": "rms", "method": "polar_express"},
    {"method": "polar_express", "steps": 8},
    {"steps": 1, "momentum": 0.0, "weight_decay": 0.1},
    {"learning_rate": lambda step: 0.05 / (step + 1)},
]


@pytest.mark.parametrize("zero", [False, True], ids=["noise", "zero"])
@pytest.mark.parametrize("shape", [(32, 17), (17, 32), (3, 4, 5), (1, 7)], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=label)
def test_optimizer_follows_the_twin(options, shape, zero):
    assert_follows(Muon(**options), reference.Muon(**options), shape, zero=zero)


@pytest.mark.parametrize("layout", ["batched", "experts", "conv", "transposed"])
@pytest.mark.parametrize("scale", [None, "spectral", "rms"])
@pytest.mark.parametrize("shape", [(6, 3, 3, 4), (3, 4, 5), (8, 5)], ids=str)
def test_layouts_follow_the_twin(shape, scale, layout):
    assert_follows(Muon(scale=scale), reference.Muon(scale=scale), shape, layout)


@pytest.mark.parametrize("magnitude", [6e4, 1e-7])
def test_fp16_gradients_do_not_overflow_or_underflow(magnitude):
    # MLX's Muon computes the norm in fp16: large gradients give no update, tiny ones NaN.
    g = mx.full((16, 16), magnitude, mx.float16)
    moved = Muon(1.0).apply_gradients({"w": g}, {"w": mx.zeros((16, 16), mx.float16)})["w"]
    assert mx.all(mx.isfinite(moved)).item()
    assert np.linalg.norm(np.array(moved.astype(mx.float32)), ord=2) > 0.5


@pytest.mark.parametrize("shape", [(), (7,)], ids=str)
def test_vectors_are_refused(shape):
    # MLX's Muon silently uses plain SGD for vectors.
    with pytest.raises(ValueError, match=r"cannot take shape .*; route it"):
        Muon().init_single(mx.zeros(shape), {})


def test_one_error_names_all_refused_parameters():
    optimizer = Muon()
    tree = {"w": mx.zeros((3, 3)), "norm": {"weight": mx.zeros(3)}, "b": mx.zeros(2)}
    with pytest.raises(ValueError, match=r"norm.weight: (.|\n)*b: "):
        optimizer.init(tree)
    assert set(optimizer.state) == {"step", "learning_rate"}, "the refused tree left a state"
