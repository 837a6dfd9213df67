"""What AdamW, Adafactor, Muon and SignSGD must do beside following their twins."""

import mlx.core as mx
import numpy as np
import pytest
from trajectories import parameter

from mlx_maxfactor import Adafactor, AdamW, Muon, OrthoMaxFactor, SignSGD


@pytest.mark.parametrize(
    "make",
    [lambda: AdamW(0.1, weight_decay=0.0), lambda: Adafactor(0.1, clip_threshold=1e9)],
    ids=["AdamW", "Adafactor"],
)
def test_layer_unfrozen_late_uses_its_own_step_count(make):
    optimizer, tree = make(), {"a": mx.ones(2)}
    for _ in range(50):
        optimizer.apply_gradients(tree, tree)
    late = {"a": mx.ones(2), "b": mx.zeros(2)}
    moved = optimizer.apply_gradients({"a": mx.ones(2), "b": mx.ones(2)}, late)["b"]
    # Its first step is a full step; with the global count, AdamW's would be 0.1 · (0.1 / √0.05),
    # and Adafactor's 4.8 times as long.
    assert np.allclose(np.array(moved), -0.1, rtol=1e-5)


@pytest.mark.parametrize("kind", [Muon, OrthoMaxFactor])
@pytest.mark.parametrize("shape", [(), (1,), (7,)], ids=str)
def test_vectors_are_refused(kind, shape):
    # MLX's Muon silently uses plain SGD for vectors.
    message = "orthogonalizes matrices and cannot take shape .* route it to another optimizer"
    with pytest.raises(ValueError, match=message):
        kind().init({"w": mx.zeros(shape)})


# AdamW


def test_second_moment_of_a_bf16_parameter_decays():
    # In bf16, 0.999 rounds to 1, so the v of MLX's AdamW only grows.
    optimizer, tree = AdamW(betas=(0.9, 0.999)), {"w": mx.ones((4,), mx.bfloat16)}
    for g in [1.0, *[0.0] * 20]:
        tree = optimizer.apply_gradients({"w": mx.full((4,), g, mx.bfloat16)}, tree)
    assert np.allclose(np.array(optimizer.state["w"]["v"]), 0.001 * 0.999**20, rtol=1e-5)


@pytest.mark.parametrize("state_dtype", ["int4", "int8"])
def test_rows_without_gradients_stay_finite_if_beta1_squared_exceeds_beta2(state_dtype):
    # The bound on m grows without end there, and inf times a second moment of zero is a NaN.
    optimizer = AdamW(1e-3, betas=(0.9, 0.5), state_dtype=state_dtype)
    g = {"w": mx.concatenate([mx.ones(64), mx.zeros(64)])}
    p = {"w": mx.ones(128)}
    optimizer.init(p)
    optimizer.state["w"]["count"] = mx.array(8000, mx.uint32)
    assert mx.all(mx.isfinite(optimizer.apply_gradients(g, p)["w"])).item()


# Adafactor


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


# SignSGD


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


# Muon


@pytest.mark.parametrize("magnitude", [6e4, 1e-7])
def test_fp16_gradients_do_not_overflow_or_underflow(magnitude):
    # MLX's Muon computes the norm in fp16: large gradients give no update, tiny ones NaN.
    g = mx.full((16, 16), magnitude, mx.float16)
    moved = Muon(1.0).apply_gradients({"w": g}, {"w": mx.zeros((16, 16), mx.float16)})["w"]
    assert mx.all(mx.isfinite(moved)).item()
    assert np.linalg.norm(np.array(moved.astype(mx.float32)), ord=2) > 0.5


def test_one_error_names_all_refused_parameters():
    optimizer = Muon()
    tree = {"w": mx.zeros((3, 3)), "norm": {"weight": mx.zeros(3)}, "b": mx.zeros(2)}
    with pytest.raises(ValueError, match=r"norm.weight: (.|\n)*b: "):
        optimizer.init(tree)
    assert set(optimizer.state) == {"step", "learning_rate"}, "the refused tree left a state"
