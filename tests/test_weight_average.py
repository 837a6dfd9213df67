"""Averages of the weights: their values, compiled steps, checkpoints, applying and restoring."""

import arrays
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from arrays import same
from mlx.utils import tree_flatten

from mlx_maxfactor import (
    CheckpointError,
    WeightAverage,
    create_optimizer,
    load_checkpoint,
    save_checkpoint,
)


def points(steps=30):
    rng = np.random.default_rng(0)
    return [rng.normal(size=(4, 3)).astype(np.float32) for _ in range(steps)]


def averaged(values, **options):
    model = nn.Linear(3, 4, bias=False)
    average = WeightAverage(model, **options)
    for value in values:
        model.weight = mx.array(value)
        average.update(model)
    return np.array(average.state["weights"]["weight"].astype(mx.float32))


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999])
def test_exponential_average_equals_its_weighted_sum(decay):
    values = points()
    weights = decay ** np.arange(len(values))[::-1].astype(np.float64)
    exact = sum(w * x for w, x in zip(weights, values, strict=True)) / weights.sum()
    # 30 float32 roundings of numbers near 1; 1 - 0.999^t is only accurate to 1e-4.
    assert np.allclose(averaged(values, decay=decay), exact, atol=1e-4)


def test_decay_one_gives_the_plain_mean_since_start():
    values = points()
    assert np.allclose(averaged(values, decay=1), np.mean(values, axis=0), atol=1e-6)
    late = averaged(values, decay=1, start=20)
    assert np.allclose(late, np.mean(values[20:], axis=0), atol=1e-6)


def test_average_equals_the_current_weights_until_start():
    values = points(5)
    assert np.array_equal(averaged(values, decay=0.9, start=10), values[-1])


def test_bfloat16_average_is_close_to_float32():
    # Steps of 1/1000 are below bf16's spacing at 1: rounding to nearest would lose them all.
    model = nn.Linear(64, 64, bias=False)
    model.weight = mx.zeros((64, 64))
    average = WeightAverage(model, 0.999, dtype=mx.bfloat16)
    exact = WeightAverage(model, 0.999)
    for t in range(200):
        model.weight = mx.full((64, 64), 1.0 + 0.01 * t)
        average.update(model)
        exact.update(model)
    low = average.state["weights"]["weight"]
    assert low.dtype == mx.bfloat16
    mean = mx.mean(low.astype(mx.float32)).item()
    assert mean == pytest.approx(mx.mean(exact.state["weights"]["weight"]).item(), rel=2e-3)


def training(compiled, dtype=mx.float32):
    mx.random.seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
    model.layers[0].freeze(keys="bias")
    optimizer, average = create_optimizer(model), WeightAverage(model, 0.9, dtype=dtype)
    state = [model.state, optimizer.state, average.state]
    traces = []

    def step(x):
        traces.append(1)
        _, gradients = nn.value_and_grad(model, lambda x: mx.mean(model(x) ** 2))(x)
        optimizer.update(model, gradients)
        average.update(model)

    return model, optimizer, average, mx.compile(step, state, state) if compiled else step, traces


def run(step, model, optimizer, average, steps, first=0):
    for i in range(first, first + steps):
        step(mx.random.normal((4, 8), key=mx.random.key(i)))
        mx.eval(model.state, optimizer.state, average.state)


def flat(average):
    return arrays.flat(average.state["weights"])


@pytest.mark.compiled
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_compiled_step_updates_the_average_and_is_traced_once(dtype):
    results = []
    for compiled in (False, True):
        model, optimizer, average, step, traces = training(compiled, dtype)
        run(step, model, optimizer, average, 5)
        results.append(flat(average))
        assert len(traces) == (1 if compiled else 5)
    for path, x in results[0].items():
        assert np.allclose(x, results[1][path], atol=1e-2 if dtype == mx.bfloat16 else 1e-6)


def test_only_trainable_weights_are_averaged():
    model, optimizer, average, step, _ = training(compiled=False)
    assert "layers.0.bias" not in average.state["weights"]
    run(step, model, optimizer, average, 2)
    model.layers[0].unfreeze()
    run(step, model, optimizer, average, 1)
    assert "layers.0.bias" in average.state["weights"]


def test_weights_are_restored_after_an_error_inside_applied():
    model, optimizer, average, step, _ = training(compiled=False)
    run(step, model, optimizer, average, 4)
    own = arrays.flat(model.parameters())

    def failing_validation():
        with average.applied(model) as applied:
            path, x = tree_flatten(applied.trainable_parameters())[0]
            assert np.array_equal(np.array(x), flat(average)[path])
            assert not np.array_equal(np.array(x), own[path])
            raise RuntimeError("the validation fails")

    with pytest.raises(RuntimeError, match="validation"):
        failing_validation()
    assert same(arrays.flat(model.parameters()), own)


@pytest.mark.compiled
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_resumed_average_equals_the_uninterrupted_one(dtype, tmp_path):
    path = tmp_path / "run.safetensors"
    model, optimizer, average, step, _ = training(True, dtype)
    run(step, model, optimizer, average, 3)
    save_checkpoint(path, model, optimizer, average=average, epoch=1)
    run(step, model, optimizer, average, 3, first=3)
    whole = flat(average)
    model, optimizer, average, step, _ = training(True, dtype)
    run(step, model, optimizer, average, 1)  # the load must also reach a compiled step
    assert load_checkpoint(path, model, optimizer, average=average) == {"epoch": 1}
    run(step, model, optimizer, average, 3, first=3)
    assert same(flat(average), whole)


def test_checkpoint_with_and_without_average_do_not_mix(tmp_path):
    path = tmp_path / "run.safetensors"
    model, optimizer, average, *_ = training(False)
    save_checkpoint(path, model, optimizer, average=average)
    with pytest.raises(CheckpointError, match=r"average\.weights\.layers\.0\.weight"):
        load_checkpoint(path, model, optimizer)
    load_checkpoint(path, model, optimizer, strict=False)
    save_checkpoint(path, model, optimizer)
    with pytest.raises(CheckpointError, match=r"average.*missing in the file"):
        load_checkpoint(path, model, optimizer, average=average)


def test_names_of_digits_and_dots_are_averaged():
    model = nn.Module()
    model.heads = {"0": nn.Linear(2, 2), "a.b": nn.Linear(2, 2)}
    average = WeightAverage(model, 0.5)
    own = mx.array(model.heads["a.b"].weight)
    average.update(model)
    with average.applied(model):
        assert mx.allclose(model.heads["a.b"].weight, own).item()
