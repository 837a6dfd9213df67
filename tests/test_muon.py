"""Muon: its twin, and what MLX's Muon gets wrong."""

import mlx.core as mx
import numpy as np
import pytest
from trajectories import assert_follows, label, parameter

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


def test_convolution_is_scaled_as_a_matrix():
    # MLX's Muon takes the scale from the kernel axes, not from the orthogonalized matrix.
    p, g = mx.zeros((64, 3, 3, 4)), mx.array(parameter((64, 3, 3, 4)))
    optimizer = Muon(1.0, scale="spectral", layout="conv", method="polar_express", steps=8)
    moved = optimizer.apply_gradients({"w": g}, {"w": p})["w"]
    spectral_norm = np.linalg.norm(np.array(moved).reshape(64, 36), ord=2)
    # Eight steps reach 1 within the float32 rounding of a 36 × 36 Gram matrix.
    assert spectral_norm == pytest.approx(np.sqrt(64 / 36), rel=1e-4)


def test_weight_decay_is_not_orthogonalized():
    # MLX's Muon adds decay to the gradient, and orthogonalization discards its magnitude.
    zero, p = mx.zeros((4, 3)), mx.full((4, 3), 2.0)
    moved = Muon(0.1, weight_decay=0.5).apply_gradients({"w": zero}, {"w": p})["w"]
    assert np.allclose(np.array(moved), 2.0 * (1 - 0.1 * 0.5))


def test_each_expert_is_orthogonalized_separately():
    # MLX's Muon flattens (E, m, n) into one matrix.
    g = parameter((3, 8, 5)) * np.array([1e-3, 1.0, 1e3], np.float32)[:, None, None]
    optimizer = Muon(1.0, method="polar_express", steps=8, layout="experts")
    moved = optimizer.apply_gradients({"w": mx.array(g)}, {"w": mx.zeros((3, 8, 5))})["w"]
    values = np.linalg.svd(np.array(moved), compute_uv=False)
    assert np.allclose(values, 1.0, atol=1e-4)


@pytest.mark.parametrize("magnitude", [6e4, 1e-7])
def test_fp16_gradients_do_not_overflow_or_underflow(magnitude):
    # MLX's Muon computes the norm in fp16: large gradients give no update, tiny ones NaN.
    g = mx.full((16, 16), magnitude, mx.float16)
    moved = Muon(1.0).apply_gradients({"w": g}, {"w": mx.zeros((16, 16), mx.float16)})["w"]
    assert mx.all(mx.isfinite(moved)).item()
    assert np.linalg.norm(np.array(moved.astype(mx.float32)), ord=2) > 0.5


@pytest.mark.parametrize("given", [{"layout": "transposed"}, {}], ids=["option", "path"])
def test_transposed_lora_matrix_is_scaled_by_its_true_shape(given):
    # LoRALinear stores A as (in, r), so MLX's Muon confuses rows and columns.
    a = mx.array(parameter((64, 4)))  # A is a (4, 64) matrix: its scale is √max(1, 4/64) = 1
    optimizer = Muon(1.0, scale="spectral", method="polar_express", steps=8, **given)
    if not given:
        optimizer.layouts["lora_a"] = "transposed"
    moved = optimizer.apply_gradients({"lora_a": a}, {"lora_a": mx.zeros((64, 4))})["lora_a"]
    assert np.linalg.norm(np.array(moved), ord=2) == pytest.approx(1.0, rel=1e-4)


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
