"""OrthoMaxFactor: the size of its steps, matrices that start at zero, blocks."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from models import Adapted
from trajectories import parameter

from mlx_maxfactor import OrthoMaxFactor, create_optimizer, reference
from mlx_maxfactor import functional as f


@pytest.mark.parametrize("layout", ["experts", "batched", "conv", "transposed"])
def test_step_size_equals_the_effective_learning_rate(layout):
    # Each matrix is normalized on its own, so the scale of its gradient does not matter.
    shape = (3, 6, 5)
    g = parameter(shape) * np.array([1e-3, 1.0, 1e3], np.float32)[:, None, None]
    p = np.ones(shape, np.float32) * np.array([1.0, 2.0, 4.0], np.float32)[:, None, None]
    optimizer = OrthoMaxFactor(0.01, weight_decay=0.0)
    optimizer.layouts["w"] = layout
    rate = optimizer.effective_learning_rates({"w": mx.array(p)})["w"]
    moved = np.array(optimizer.apply_gradients({"w": mx.array(g)}, {"w": mx.array(p)})["w"]) - p
    # Differences of parameters up to 4, each rounded to 2.4e-7, for steps of 0.01.
    if layout == "conv":
        assert np.sqrt(np.mean(moved**2)) == pytest.approx(0.01 * np.sqrt(7), rel=1e-4)
        assert rate == pytest.approx(0.01 * np.sqrt(7), rel=1e-5)
    else:
        sizes = np.sqrt(np.mean(moved**2, axis=(1, 2)))
        assert sizes == pytest.approx([0.01, 0.02, 0.04], rel=1e-4)
        assert rate == pytest.approx(0.01 * 7 / 3, rel=1e-5)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_huge_gradients_give_steps_of_the_usual_size(momentum, dtype):
    g = np.sign(parameter((6, 5))) * np.logspace(13, 38, 30, dtype=np.float32).reshape(6, 5)
    g[2, 2] = np.inf
    p = {"w": mx.array(parameter((6, 5))).astype(dtype)}
    optimizer = OrthoMaxFactor(momentum=momentum, weight_decay=0.0)
    for _ in range(3):
        new = optimizer.apply_gradients({"w": mx.array(g).astype(dtype)}, p)["w"]
        step = (new - p["w"]).astype(mx.float32)
        assert f.rms(step).item() == pytest.approx(0.02 * f.rms(p["w"]).item(), rel=0.2)
    # A mean of squares counts as 1e30 at most, a moment as 1e15.
    assert optimizer.state["w"]["row"].max().item() <= 1e30


@pytest.mark.parametrize("state_dtype", ["int4", "float32"])
@pytest.mark.parametrize("none", [0.0, 1e-25])  # the square of 1e-25 is no float32 number
def test_expert_without_gradient_does_not_move(none, state_dtype):
    p, g = (mx.array(parameter((3, 6, 5), seed)) for seed in (0, 1))
    optimizer = OrthoMaxFactor(0.01, layout="experts", weight_decay=0.0, state_dtype=state_dtype)
    for moving in (1.0, none, 1.0):  # the momentum of the second expert is not zero
        shares = mx.array([1.0, moving, 1.0])[:, None, None]
        moved = optimizer.apply_gradients({"w": shares * g}, {"w": p})["w"]
        sizes = f.rms(moved - p, (-2, -1)) / f.rms(p, (-2, -1))
        # Differences of parameters of size 1, rounded to 6e-8, for steps of 0.01.
        expected = [0.01, 0.01 * (moving == 1), 0.01]
        assert sizes.flatten().tolist() == pytest.approx(expected, rel=1e-4)
        p = moved


HARD = {
    "rank one": np.outer(parameter((6,)), parameter((5,), 1)),
    "one row": parameter((6, 5)) * (np.arange(6) == 2)[:, None],
    "one column": parameter((6, 5)) * (np.arange(5) == 2),
    "1e30": parameter((6, 5)) * 1e30,
    "equal": np.full((6, 5), 3e38),
}


@pytest.mark.parametrize("block", [None, 2])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("kind", HARD)
def test_hard_gradients_give_a_step_of_the_effective_rate(kind, momentum, block):
    optimizer = OrthoMaxFactor(0.01, block=block, momentum=momentum, weight_decay=0.0)
    p = mx.array(parameter((6, 5)))
    g = mx.array(HARD[kind].astype(np.float32))
    for sign in (1, -1, 1):
        rate = optimizer.effective_learning_rates({"w": p})["w"]
        moved = optimizer.apply_gradients({"w": sign * g}, {"w": p})["w"]
        # Differences of parameters of size 1, rounded to 6e-8, for steps of 0.01.
        assert f.rms(moved - p).item() == pytest.approx(rate, rel=1e-4)
        p = moved


# Matrices that start at zero


ZEROS = [
    ((8, 5), "batched", 5),
    ((8, 3, 3, 4), "conv", 36),
    ((3, 8, 5), "experts", 5),
    ((16, 4), "transposed", 16),  # A of LoRA, stored as (in, r)
    ((4, 16), "transposed", 4),  # B of LoRA, stored as (r, out)
]


@pytest.mark.parametrize(("shape", "layout", "inputs"), ZEROS, ids=str)
def test_min_rms_defaults_to_the_rms_of_a_new_linear(shape, layout, inputs):
    optimizer = OrthoMaxFactor(0.01)
    optimizer.layouts["w"] = layout
    rate = optimizer.effective_learning_rates({"w": mx.zeros(shape)})["w"]
    assert rate == pytest.approx(0.01 / np.sqrt(3 * inputs), rel=1e-5)
    for floor in (0, 0.5):
        optimizer = OrthoMaxFactor(0.01, min_rms=floor)
        rate = optimizer.effective_learning_rates({"w": mx.zeros(shape)})["w"]
        assert rate == pytest.approx(0.01 * floor)


class ZeroOutputs(nn.Module):
    """Residual blocks whose output projections start at zero."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 32)
        self.up = [nn.Linear(32, 64) for _ in range(2)]
        self.down = [nn.Linear(64, 32) for _ in range(2)]
        self.head = nn.Linear(32, 4)
        for layer in self.down:
            layer.weight = mx.zeros_like(layer.weight)

    def __call__(self, x):
        x = self.first(x)
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(nn.relu(up(x)))
        return self.head(x)


def with_adapters(a, b, scale):
    """Frozen layers, each with two Linears in parallel; the second one starts at zero."""
    layers = [Adapted(a, b, "linears", inputs=32, outputs=32, scale=scale) for _ in range(2)]
    first, head = nn.Linear(8, 32), nn.Linear(32, 4)
    first.freeze()
    head.freeze()
    return nn.Sequential(first, nn.ReLU(), layers[0], nn.ReLU(), layers[1], nn.ReLU(), head)


@pytest.mark.parametrize(
    "build",
    [
        ZeroOutputs,
        # The router does not know these names; min_rms lets the second Linear learn.
        lambda: with_adapters("reduce", "restore", 1.0),
        # Called as in LoRA, with mlx_lm's scale, for which LoRA's rates were found.
        lambda: with_adapters("lora_a", "lora_b", 20.0),
    ],
    ids=["outputs", "adapters", "LoRA"],
)
def test_matrices_initialized_to_zero_learn(build):
    def decrease(name):
        mx.random.seed(0)
        model, teacher = build(), nn.Sequential(nn.Linear(8, 48), nn.Tanh(), nn.Linear(48, 4))
        optimizer = create_optimizer(model, name, total_steps=200)
        losses = []
        for seed in range(200):
            x = mx.random.normal((64, 8), key=mx.random.key(seed))
            y = 3 * teacher(x)

            def loss_of(model, x=x, y=y):
                return mx.mean(mx.square(model(x) - y))

            loss, gradients = nn.value_and_grad(model, loss_of)(model)
            optimizer.update(model, gradients)
            losses.append(loss.item())
        return np.mean(losses[:3]) - np.mean(losses[-20:])

    ours, adamw = decrease("orthomaxfactor"), decrease("adamw")
    assert ours >= 0.9 * adamw


# Blocks


@pytest.mark.parametrize("method", ["newton_schulz", "polar_express"])
@pytest.mark.parametrize("block", [1, 3, 4, 5, 7, 100])
@pytest.mark.parametrize("shape", [(10, 23), (23, 10), (3, 7, 7), (2, 2, 4, 9)], ids=str)
def test_blocks_equal_the_twin(shape, block, method):
    x = parameter(shape)
    ours, _ = f.orthogonalize(mx.array(x), method, 5, block)
    twin = reference.orthogonalize_blocks(np.float64(x), method, 5, block)
    # The same bound as for whole matrices: each step amplifies float32 rounding by 3.4 to 8.
    assert np.allclose(np.array(ours), twin, atol=2e-4)
