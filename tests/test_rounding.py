"""Stochastic rounding is unbiased, returns a neighbour and is seeded; momentum in bf16."""

from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from models import Table
from trajectories import parameter

from mlx_maxfactor import OPTIMIZERS, MaxFactor, Muon, create_optimizer
from mlx_maxfactor import functional as f

DTYPES = [mx.bfloat16, mx.float16]


def neighbours(x, dtype):
    """The nearest value of the dtype to each float32, and the spacing of values there."""
    near = np.array(mx.array(x).astype(dtype).astype(mx.float32))
    spacing = {
        mx.bfloat16: np.float32(2.0) ** (np.floor(np.log2(np.abs(x))) - 7),
        mx.float16: np.maximum(np.float32(2.0) ** (np.floor(np.log2(np.abs(x))) - 10), 2.0**-24),
    }[dtype]
    return near, spacing


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1e-7, 3e-5, 1e-3, 1.0, 777.0, 1e4])
def test_stochastic_rounding_is_unbiased_and_returns_a_neighbour(scale, dtype):
    x = (parameter((64,)) * scale).astype(np.float32)
    x = x[np.abs(x) > 2.0**-22]
    near, spacing = neighbours(x, dtype)
    draws = 4096
    drawn = mx.broadcast_to(mx.array(x), (draws, x.size))
    rounded = f.stochastic_round(drawn, dtype, mx.random.key(3))
    assert rounded.dtype == dtype
    values = np.array(rounded.astype(mx.float32)).astype(np.float64)
    assert np.all(np.abs(values - x) <= spacing)
    assert np.all(np.abs(values - near) <= spacing)
    # A draw has a standard deviation of at most half a spacing; allow 6 standard errors.
    assert np.all(np.abs(values.mean(axis=0) - x) <= 6 * 0.5 * spacing / np.sqrt(draws))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_values_are_kept_and_overflow_rounds_to_nearest(dtype):
    held = mx.array([0.0, -0.0, 1.0, -2.5, 65504.0 if dtype == mx.float16 else 3.3895e38, 2.0**-14])
    held = held.astype(dtype).astype(mx.float32)
    kept = f.stochastic_round(held, dtype, mx.random.key(0)).astype(mx.float32)
    assert kept.tolist() == held.tolist()
    beyond = mx.array([float("inf"), -float("inf"), 3.4e38])
    rounded = f.stochastic_round(beyond, dtype, mx.random.key(0))
    assert rounded.tolist() == beyond.astype(dtype).tolist()
    assert mx.isnan(f.stochastic_round(mx.array(float("nan")), dtype, mx.random.key(0))).item()


@pytest.mark.filterwarnings("ignore:learning_rate 2e-05 is small")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_small_updates_are_right_on_average(name, dtype):
    # With rounding to nearest they vanish: 1 - 1e-4 is 1 in bf16 and in fp16.
    p, g = ({"w": mx.ones((64, 64), dtype)} for _ in range(2))
    # Muon moves each element of a rank-one 64 × 64 matrix by 1/64 of its rate.
    rate = 2e-5 * (8 if name == "muon" else 1)
    options = {"learning_rate": rate, "weight_decay": 0.0}
    exact = OPTIMIZERS[name].kind(**options)
    reference, nearest, stochastic = {"w": mx.ones((64, 64))}, p, p
    kind = OPTIMIZERS[name].kind
    one, two = kind(**options), kind(rounding="stochastic", **options)
    for _ in range(200):
        reference = exact.apply_gradients({"w": mx.ones((64, 64))}, reference)
        nearest = one.apply_gradients(g, nearest)
        stochastic = two.apply_gradients(g, stochastic)
    ideal = 1 - mx.mean(reference["w"]).item()
    moved = 1 - mx.mean(stochastic["w"].astype(mx.float32)).item()
    assert ideal > 0
    assert mx.all(nearest["w"] == 1).item()
    # The mean over 4096 elements, each a sum of draws of one spacing (2^-9 below 1 in bf16).
    spread = np.sqrt(ideal * 2.0**-8 / 4096)
    assert abs(moved - ideal) < 6 * spread


def train(seed, compiled=False, steps=20):
    model = Table()
    model.set_dtype(mx.bfloat16)
    model.apply(lambda p: mx.ones_like(p))
    optimizer = create_optimizer(model, learning_rate=2e-3, rounding="stochastic", seed=seed)
    state = [model.state, optimizer.state]

    def step():
        optimizer.update(model, {"linear1": {"weight": mx.ones((128, 64), mx.bfloat16)}})

    run_step = mx.compile(step, inputs=state, outputs=state) if compiled else step
    points = []
    for _ in range(steps):
        run_step()
        points.append(np.array(model.linear1.weight.astype(mx.float32)))
    return np.stack(points)


@pytest.mark.compiled
def test_rounding_is_reproducible_with_a_seed():
    assert np.array_equal(train(1), train(1))
    assert not np.array_equal(train(1), train(2))
    assert np.array_equal(train(1), train(1, compiled=True))


@pytest.mark.compiled
def test_every_compiled_step_draws_new_numbers():
    # If mx.compile does not capture the random state, every call draws the same numbers.
    points = train(1, compiled=True)
    steps = np.diff(points, axis=0) != 0
    assert not any(np.array_equal(a, b) for a, b in pairwise(steps) if a.any())


def test_every_parameter_has_its_own_random_key():
    model = Table()
    optimizer = create_optimizer(model, rounding="stochastic")
    keys = [tuple(a.tolist()) for path, a in tree_flatten(optimizer.state) if path.endswith("key")]
    assert len(keys) == len(set(keys)) == len(optimizer.plan)


def test_float32_parameters_are_not_rounded():
    g, p = {"w": mx.array(parameter((4, 3)))}, {"w": mx.array(parameter((4, 3), 1))}
    plain = MaxFactor().apply_gradients(g, p)["w"]
    assert mx.array_equal(MaxFactor(rounding="stochastic").apply_gradients(g, p)["w"], plain).item()


def test_bf16_momentum_is_rounded_once_per_step():
    optimizer, tree = Muon(momentum=0.9, state_dtype=mx.bfloat16), {"w": mx.zeros((16, 16))}
    first, second = mx.array(parameter((16, 16))), mx.array(parameter((16, 16), 1))
    for g in (first, second):
        optimizer.apply_gradients({"w": g}, tree)
    once = 0.9 * first.astype(mx.bfloat16).astype(mx.float32) + second
    assert mx.array_equal(optimizer.state["w"]["m"], once.astype(mx.bfloat16)).item()
