"""AdamW: its twin, low precision, layers unfrozen late."""

import mlx.core as mx
import numpy as np
import pytest
from trajectories import SHAPES, assert_follows, label

from mlx_maxfactor import AdamW, reference

OPTIONS = [
    {},
    {"bias_correction": False},
    {"betas": (0.0, 0.999), "eps": 1e-6, "weight_decay": 0.0},
    {"learning_rate": lambda step: 0.05 / (step + 1)},
]


@pytest.mark.parametrize("zero", [False, True], ids=["noise", "zero"])
@pytest.mark.parametrize("shape", [*SHAPES, ()], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=label)
def test_optimizer_follows_the_twin(options, shape, zero):
    assert_follows(AdamW(**options), reference.AdamW(**options), shape, zero=zero)


def test_second_moment_of_a_bf16_parameter_decays():
    # In bf16, 0.999 rounds to 1, so the v of MLX's AdamW only grows.
    optimizer, tree = AdamW(betas=(0.9, 0.999)), {"w": mx.ones((4,), mx.bfloat16)}
    for g in [1.0, *[0.0] * 20]:
        tree = optimizer.apply_gradients({"w": mx.full((4,), g, mx.bfloat16)}, tree)
    assert np.allclose(np.array(optimizer.state["w"]["v"]), 0.001 * 0.999**20, rtol=1e-5)


def test_bias_correction_of_a_layer_unfrozen_late_uses_its_own_step_count():
    optimizer = AdamW(0.1, weight_decay=0.0)
    a, b = mx.zeros(2), mx.zeros(2)
    for _ in range(50):
        a = optimizer.apply_gradients({"a": mx.ones(2)}, {"a": a})["a"]
    moved = optimizer.apply_gradients({"a": mx.ones(2), "b": mx.ones(2)}, {"a": a, "b": b})["b"]
    # Its first step is a full step; with the global count it would be 0.1 · (0.1 / √0.05).
    assert np.allclose(np.array(moved), -0.1, rtol=1e-5)


@pytest.mark.parametrize("state_dtype", ["int4", "int8"])
def test_rows_without_gradients_stay_finite_if_beta1_squared_exceeds_beta2(state_dtype):
    # The bound on m grows without end there, and inf times a second moment of zero is a NaN.
    optimizer = AdamW(1e-3, betas=(0.9, 0.5), state_dtype=state_dtype)
    g = {"w": mx.concatenate([mx.ones(64), mx.zeros(64)])}
    p = {"w": mx.ones(128)}
    optimizer.init(p)
    optimizer.state["w"]["count"] = mx.array(8000, mx.uint32)
    assert mx.all(mx.isfinite(optimizer.apply_gradients(g, p)["w"])).item()
