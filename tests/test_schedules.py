"""Schedules: their twins, edge cases, and use in an optimizer."""

import mlx.core as mx
import numpy as np
import pytest
import twins

from mlx_maxfactor import SignSGD, adaptive_schedule, warmup_cosine
from mlx_maxfactor.engine.schedules import scaled

STEPS = [0, 1, 5, 10, 11, 50, 99, 100, 101, 10_000]


@pytest.mark.parametrize("warmup", [0, 1, 10, 100])
@pytest.mark.parametrize("options", [{}, {"min_ratio": 0.0, "start_ratio": 0.1}], ids=str)
def test_warmup_cosine_equals_its_twin(warmup, options):
    schedule = warmup_cosine(3e-3, 100, warmup, **options)
    for step in STEPS:
        exact = twins.warmup_cosine(step, 3e-3, 100, warmup, **options)
        assert schedule(step).item() == pytest.approx(exact, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("warmup", [0, 1, 10, 5000])
def test_adaptive_schedule_equals_its_twin(warmup):
    schedule = adaptive_schedule(2e-3, warmup, 0.2)
    for step in STEPS:
        exact = twins.adaptive_schedule(step, 2e-3, warmup, 0.2)
        assert schedule(step).item() == pytest.approx(exact, rel=1e-5)


def test_warmup_cosine_has_the_documented_values():
    values = [warmup_cosine(1e-4, 10_000)(s).item() for s in (0, 1000, 2000, 6000, 10_000, 20_000)]
    assert np.allclose(values, [0, 5e-5, 1e-4, 5.5e-5, 1e-5, 1e-5], rtol=1e-5, atol=0)


def test_first_update_uses_the_rate_of_step_zero():
    tree = {"b": mx.array([0.0])}
    wasted = SignSGD(warmup_cosine(1.0, 100, 10), weight_decay=0.0)
    used = SignSGD(warmup_cosine(1.0, 100, 10, start_ratio=0.1), weight_decay=0.0)
    assert wasted.apply_gradients({"b": mx.array([1.0])}, tree)["b"].item() == 0.0
    assert used.apply_gradients({"b": mx.array([1.0])}, tree)["b"].item() == pytest.approx(-0.1)


def test_peak_is_reached_exactly_once():
    # mlx_lm's build_schedule makes the first update at rate 0 and reaches its peak twice.
    rates = [warmup_cosine(1.0, 1000, 100, start_ratio=0.01)(s).item() for s in range(200)]
    assert min(rates) > 0
    assert sum(rate == 1.0 for rate in rates) == 1


def test_scaled_schedule_has_a_peak_and_a_repr():
    half = scaled(warmup_cosine(0.02, 100, 10), 0.5)
    assert half.peak == 0.01
    assert half(10).item() == pytest.approx(0.01)
    assert repr(half) == "0.5 * warmup_cosine(0.02, 100, 10, 0.1)"
    assert scaled(lambda step: step, 2.0).peak is None


@pytest.mark.compiled
@pytest.mark.parametrize("schedule", [warmup_cosine(1e-2, 20, 5), adaptive_schedule(1e-2, 5)])
def test_compiled_step_follows_the_schedule(schedule):
    optimizer, tree = SignSGD(schedule, weight_decay=0.0), {"b": mx.zeros(1)}
    optimizer.init(tree)
    step = mx.compile(optimizer.apply_gradients, inputs=optimizer.state, outputs=optimizer.state)
    for t in range(25):
        moved = step({"b": mx.ones(1)}, {"b": mx.zeros(1)})["b"]
        assert -moved.item() == pytest.approx(schedule(t).item(), rel=1e-6)
