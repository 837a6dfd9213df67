"""Gradient accumulation is exact for unequal micro-batches."""

import re

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from models import llama

from mlx_maxfactor import accumulate_gradients, averaged_gradients


def masked_loss(model, tokens, lengths):
    mask = mx.arange(tokens.shape[1] - 1)[None] < lengths[:, None]
    losses = nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])
    return (losses * mask).sum() / mask.sum()


@pytest.mark.compiled
def test_unequal_micro_batches_give_the_gradient_of_the_whole_batch():
    mx.random.seed(0)
    model = llama()
    tokens = mx.random.randint(0, 50, (6, 12))
    lengths = mx.array([11, 3, 1, 2, 2, 9])
    gradient = nn.value_and_grad(model, lambda *batch: masked_loss(model, *batch))
    _, whole = gradient(tokens, lengths)

    @mx.compile
    def add(gradients, weight, total):
        return accumulate_gradients(gradients, weight, total)

    total, plain = None, None
    for part in (slice(0, 1), slice(1, 4), slice(4, 6)):
        _, g = gradient(tokens[part], lengths[part])
        weight = lengths[part].sum()
        total = add(g, weight, total) if total else accumulate_gradients(g, weight)
        plain = g if plain is None else tree_map(mx.add, plain, g)
    averaged = dict(tree_flatten(averaged_gradients(total)))
    plain = dict(tree_flatten(tree_map(lambda g: g / 3, plain)))
    errors = []
    for path, g in tree_flatten(whole):
        # float32 sums in another order; gradients are at most 1.
        assert np.allclose(np.array(averaged[path]), np.array(g), atol=1e-6), path
        errors.append(np.abs(np.array(plain[path] - g)).max())
    assert max(errors) > 1e-2, "the plain mean is right too: the test cannot fail"


def test_sum_is_float32_and_zero_weight_gives_zero():
    half = {"w": mx.full((2,), 1.0, mx.float16)}
    total = None
    for _ in range(5000):
        total = accumulate_gradients(half, 100, total)
    assert averaged_gradients(total)["w"].dtype == mx.float32
    assert averaged_gradients(total)["w"].tolist() == [1.0, 1.0]
    empty = accumulate_gradients({"w": mx.zeros(2)}, 0)
    assert averaged_gradients(empty)["w"].tolist() == [0.0, 0.0]


def test_nan_is_dropped_with_zero_weight_and_kept_otherwise():
    nan = {"b": mx.array([float("nan"), 1.0])}
    total = accumulate_gradients({"b": mx.array([1.0, 2.0])}, 3)
    assert averaged_gradients(accumulate_gradients(nan, 0, total))["b"].tolist() == [1.0, 2.0]
    assert averaged_gradients(accumulate_gradients(nan, 0))["b"].tolist() == [0.0, 0.0]
    spoiled = averaged_gradients(accumulate_gradients(nan, 1, total))["b"]
    assert mx.isnan(spoiled).tolist() == [True, False]


def test_micro_batches_can_have_different_parameters():
    one, two = mx.array([1.0]), mx.array([2.0])
    both = {"a": one, "l": [{"w": one}, {"w": one}]}
    less = {"a": two, "l": [{"w": two}]}
    other = {"c": {"d": two}}
    for order in ((both, less, other), (other, less, both), (less, other, both)):
        total = None
        for gradients in order:
            total = accumulate_gradients(gradients, 2, total)
        mean = averaged_gradients(total)
        assert mean["a"].item() == mean["l"][0]["w"].item() == 1.0
        assert mean["l"][1]["w"].item() == pytest.approx(1 / 3)
        assert mean["c"]["d"].item() == pytest.approx(2 / 3)


def test_invalid_weights_and_totals_are_refused():
    g = {"b": mx.ones(2)}
    for weight, message in (
        (-1, "weight must be in [0, inf), got -1"),
        (float("nan"), "weight must be in [0, inf), got nan"),
        (mx.ones(2), "weight must be one number, got an array of shape (2,)"),
        ("3", "weight must be in [0, inf), got '3'"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            accumulate_gradients(g, weight)
    assert accumulate_gradients(g, mx.array([3.0]))["weight"].tolist() == 3
    for total in (None, g):
        with pytest.raises(ValueError, match="total must be what accumulate_gradients returned"):
            averaged_gradients(total)
