"""The tutorial of NOTES.md: a custom optimizer works by name, compiled and guarded."""

import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from arrays import flat

from mlx_maxfactor import (
    OPTIMIZERS,
    Muon,
    OrthoMaxFactor,
    SignSGD,
    create_optimizer,
    register_optimizer,
)
from mlx_maxfactor import functional as f

NOTES = (Path(__file__).parent.parent / "NOTES.md").read_text()
TUTORIAL = re.search(r"## Write your own.*?```python\n(.*?)```", NOTES, re.S)


@pytest.fixture
def lion():
    assert TUTORIAL
    names: dict[str, Any] = {}
    exec(TUTORIAL[1], names)
    yield names["Lion"]
    del OPTIMIZERS["lion"]


def make(**options):
    mx.random.seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    return model, create_optimizer(model, "lion", "lion", learning_rate=0.01, **options)


def train(model, optimizer, steps, compiled=False, bad=()):
    def loss_of(x):
        return mx.mean(mx.square(model(x)))

    def step(x):
        loss, gradients = nn.value_and_grad(model, loss_of)(x)
        optimizer.update(model, gradients)
        return loss

    state = [model.state, optimizer.state]
    run = mx.compile(step, inputs=state, outputs=state) if compiled else step
    for i in range(steps):
        mx.eval(run(mx.full((3, 4), float("nan")) if i in bad else mx.ones((3, 4))), state)


def test_tutorial_is_short_and_follows_the_paper(lion):
    assert TUTORIAL
    code = [line for line in TUTORIAL[1].splitlines() if line and "import" not in line]
    assert len(code) <= 25
    p, m, rng = np.ones((2, 3)), np.zeros((2, 3)), np.random.default_rng(0)
    optimizer, tree = lion(0.01), {"p": mx.ones((2, 3))}
    for _ in range(20):
        g = rng.normal(size=(2, 3)).astype(np.float32)
        tree = optimizer.apply_gradients({"p": mx.array(g)}, tree)
        p = p * (1 - 0.01 * 0.1) - 0.01 * np.sign(0.9 * m + 0.1 * np.float64(g))
        m = 0.99 * m + 0.01 * np.float64(g)
    assert np.allclose(np.array(tree["p"]), p, atol=1e-6)  # numbers near 1 are rounded 20 times


@pytest.mark.compiled
def test_tutorial_optimizer_works_by_name_compiled_and_guarded(lion):
    eager, compiled, skipped = make(), make(), make(skip_nonfinite=True)
    train(*eager, 5)
    train(*compiled, 5, compiled=True)
    train(*skipped, 7, compiled=True, bad=(1, 3))
    assert skipped[1].skipped.item() == 2
    for path, x in flat(eager[0].parameters()).items():
        for other in (compiled[0], skipped[0]):
            assert np.allclose(x, flat(other.parameters())[path], atol=1e-6)
    plan = {entry.path: entry.optimizer for entry in eager[1].plan}
    assert plan["layers.1.weight"] == "lion"
    assert plan["layers.1.bias"] == "lion, no decay"


def test_unknown_options_of_a_registered_optimizer_are_refused(lion):
    model, optimizer = make(betas=(0.95, 0.98))
    assert optimizer.optimizers[0].betas == (0.95, 0.98)
    with pytest.raises(ValueError, match=r"lion has no option 'beta' \(did you mean 'betas'"):
        create_optimizer(model, "lion", beta=0.9)


class WithoutKey(SignSGD):
    """It forgets the state of its base class."""

    def init_single(self, parameter, state, layout=None):
        state["m"] = mx.zeros(parameter.shape)


def test_state_without_a_random_key_is_explained():
    p = {"w": mx.ones((2, 2), mx.bfloat16)}
    with pytest.raises(ValueError, match=r"must call super\(\).init_single\(parameter, state\)"):
        WithoutKey(rounding="stochastic").apply_gradients(p, p)


INVALID_REGISTRATIONS = [
    (("not a name", SignSGD, 0.1), "name must be an identifier"),
    (("mine", dict, 0.1), "kind must be a subclass of Float32Optimizer"),
    (("muon", SignSGD, 0.1), "'muon' is already the name of mlx_maxfactor.*Muon"),
    (("muon", type("Muon", (SignSGD,), {}), 0.1), "'muon' is already the name of mlx_maxf"),
    (("rest", SignSGD, 0.1), "'rest' has another meaning in rules"),
    (("mine", SignSGD, -1.0), "learning_rate must be in"),
]


@pytest.mark.parametrize(("arguments", "message"), INVALID_REGISTRATIONS, ids=str)
def test_invalid_registrations_are_refused(arguments, message):
    before = dict(OPTIMIZERS)
    with pytest.raises(ValueError, match=message):
        register_optimizer(*arguments)
    assert before == OPTIMIZERS


@pytest.mark.parametrize("kind", [Muon, OrthoMaxFactor])
@pytest.mark.parametrize("block", [None, 4])
def test_orthogonalization_method_can_be_a_function(kind, block):
    def method(x):
        return f.newton_schulz(x, 3)

    p, g = {"w": mx.ones((6, 8))}, {"w": mx.random.normal((6, 8))}
    own = kind(0.1, method=method, block=block).apply_gradients(g, p)["w"]
    named = kind(0.1, steps=3, block=block).apply_gradients(g, p)["w"]
    # With blocks, the named method shares Gram matrices.
    assert mx.allclose(own, named, atol=1e-5).item()
    assert not mx.allclose(own, kind(0.1, block=block).apply_gradients(g, p)["w"], atol=1e-5).item()


class ListState(SignSGD):
    """Its state is a list and a dictionary of arrays, and a plain number."""

    def init_single(self, parameter, state, layout=None):
        state["buffers"] = [mx.zeros(parameter.shape), {"m": mx.zeros(parameter.shape)}]
        state["count"] = 0

    def apply_single(self, gradient, parameter, state, layout=None):
        first, second = state["buffers"]
        state["count"] += 1
        state["buffers"] = [first + 1, {"m": second["m"] + gradient}]
        return parameter - gradient


def test_lists_in_a_state_are_guarded_and_counted_and_a_number_takes_no_bytes():
    model = nn.Linear(3, 2, bias=False)
    optimizer = create_optimizer(model, ListState(0.1), ListState(0.1), skip_nonfinite=True)
    assert optimizer.plan.state_bytes == 2 * model.weight.nbytes
    for factor in (1.0, float("nan")):
        optimizer.update(model, {"weight": factor * mx.ones((2, 3))})
    assert optimizer.plan.state_bytes == 2 * model.weight.nbytes
    first, second = optimizer.optimizers[1].state["weight"]["buffers"]
    assert first.tolist() == second["m"].tolist() == [[1.0] * 3] * 2
