"""Muon against its twin, and what mlx's own gets wrong."""

import mlx.core as mx
import numpy as np
import pytest
import reference
from trajectories import assert_follows, parameter

from mlx_maxfactor import Muon

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
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_follows_the_twin(options, shape, zero):
    assert_follows(Muon(**options), reference.Muon(**options), shape, zero=zero)


@pytest.mark.parametrize("layout", ["batched", "experts", "conv", "transposed"])
@pytest.mark.parametrize("scale", [None, "spectral", "rms"])
@pytest.mark.parametrize("shape", [(6, 3, 3, 4), (3, 4, 5), (8, 5)], ids=str)
def test_layouts_follow_the_twin(shape, scale, layout):
    assert_follows(Muon(scale=scale), reference.Muon(scale=scale), shape, layout)


def test_a_convolution_is_scaled_as_the_matrix_it_is():
    # mlx's takes its scale from the kernel axes, not from the matrix that it orthogonalized.
    p, g = mx.zeros((64, 3, 3, 4)), mx.array(parameter((64, 3, 3, 4)))
    optimizer = Muon(1.0, scale="spectral", layout="conv", method="polar_express", steps=8)
    moved = optimizer.apply_gradients({"w": g}, {"w": p})["w"]
    spectral_norm = np.linalg.norm(np.array(moved).reshape(64, 36), ord=2)
    # Eight steps reach 1 to float32 rounding of a 36 × 36 Gram matrix.
    assert spectral_norm == pytest.approx(np.sqrt(64 / 36), rel=1e-4)


def test_decay_is_not_orthogonalized_away():
    # mlx's adds decay to the gradient, whose magnitude orthogonalization then discards.
    zero, p = mx.zeros((4, 3)), mx.full((4, 3), 2.0)
    moved = Muon(0.1, weight_decay=0.5).apply_gradients({"w": zero}, {"w": p})["w"]
    assert np.allclose(np.array(moved), 2.0 * (1 - 0.1 * 0.5))


def test_each_expert_is_orthogonalized_by_itself():
    # mlx's flattens (E, m, n) into one matrix.
    g = parameter((3, 8, 5)) * np.array([1e-3, 1.0, 1e3], np.float32)[:, None, None]
    optimizer = Muon(1.0, method="polar_express", steps=8, layout="experts")
    moved = optimizer.apply_gradients({"w": mx.array(g)}, {"w": mx.zeros((3, 8, 5))})["w"]
    values = np.linalg.svd(np.array(moved), compute_uv=False)
    assert np.allclose(values, 1.0, atol=1e-4)


@pytest.mark.parametrize("magnitude", [6e4, 1e-7])
def test_fp16_gradients_neither_overflow_nor_underflow(magnitude):
    # mlx's norm is fp16: large gradients give no update, tiny ones NaN.
    g = mx.full((16, 16), magnitude, mx.float16)
    moved = Muon(1.0).apply_gradients({"w": g}, {"w": mx.zeros((16, 16), mx.float16)})["w"]
    assert mx.all(mx.isfinite(moved)).item()
    assert np.linalg.norm(np.array(moved.astype(mx.float32)), ord=2) > 0.5


def test_lora_is_scaled_as_the_matrix_it_stands_for():
    # LoRALinear stores A as (in, r): mlx's takes rows for columns.
    a = mx.array(parameter((64, 4)))  # as the (4, 64) matrix that it is, √max(1, 4/64) = 1
    optimizer = Muon(1.0, scale="spectral", method="polar_express", steps=8)
    optimizer.layouts["lora_a"] = "transposed"
    moved = optimizer.apply_gradients({"lora_a": a}, {"lora_a": mx.zeros((64, 4))})["lora_a"]
    assert np.linalg.norm(np.array(moved), ord=2) == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("shape", [(), (7,)], ids=str)
def test_vectors_are_refused(shape):
    # mlx's falls to plain SGD without a word.
    with pytest.raises(ValueError, match=r"cannot take shape .*; route it"):
        Muon().init_single(mx.zeros(shape), {})


def test_everything_refused_is_named_at_once():
    optimizer = Muon()
    tree = {"w": mx.zeros((3, 3)), "norm": {"weight": mx.zeros(3)}, "b": mx.zeros(2)}
    with pytest.raises(ValueError, match=r"norm.weight: (.|\n)*b: "):
        optimizer.init(tree)
    assert set(optimizer.state) == {"step", "learning_rate"}, "a refused tree leaves no state"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": 2.0}, r"momentum must be in \[0, 1\), got 2.0"),
        ({"learning_rate": -0.1}, "learning_rate must be in"),
        ({"weight_decay": -0.1}, "weight_decay must be in"),
        ({"scale": "frobenius"}, "scale must be one of None, 'spectral', 'rms', got 'frobenius'"),
        ({"method": "svd"}, "method must be one of 'newton_schulz', 'polar_express', got 'svd'"),
        ({"steps": 0}, "steps must be a whole number of at least 1, got 0"),
        ({"steps": 2.5}, "steps must be a whole number"),
        ({"nesterov": None}, "nesterov must be True or False, got None"),
    ],
    ids=str,
)
def test_options_are_checked_when_it_is_built(options, message):
    with pytest.raises(ValueError, match=message):
        Muon(**options)
