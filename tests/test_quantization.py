"""Momentum in 8 bits: between neighbours, unbiased, in blocks; small, seeded, resumed."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from models import Table
from trajectories import parameter

from mlx_maxfactor import (
    MaxFactor,
    Muon,
    create_optimizer,
    load_checkpoint,
    save_checkpoint,
)
from mlx_maxfactor import functional as f

KEY = mx.random.key(5)


def coded(x, key=KEY):
    return np.array(f.dequantize(*f.quantize(mx.array(x), key)))


def neighbours(x, peak):
    """The two values around each x that a code stands for."""
    place = np.sqrt(np.abs(np.float64(x)) / peak) * 127
    low, high = np.floor(place - 1e-4), np.ceil(place + 1e-4)  # float32 may find either side
    return peak * (low / 127) ** 2, peak * (high / 127) ** 2


@pytest.mark.parametrize("shape", [(), (1,), (7,), (256,), (257,), (40, 33), (3, 5, 60)], ids=str)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e15])
def test_it_rounds_to_a_neighbour(shape, scale):
    x = np.asarray(parameter(shape) * np.float32(scale))
    codes, scales = f.quantize(mx.array(x), KEY)
    assert (codes.dtype, codes.shape) == (mx.int8, x.shape)
    assert (scales.dtype, scales.shape) == (mx.float32, (-(-x.size // 256),))
    back, flat = coded(x).reshape(-1), x.reshape(-1)
    for block in range(scales.size):
        part = slice(256 * block, 256 * (block + 1))
        peak = np.max(np.abs(flat[part]))
        assert scales[block].item() == peak
        low, high = neighbours(flat[part], peak)
        size = np.abs(back[part])
        # The value of a code is rounded to float32 a few times: 127 quanta hold 16129 of them.
        assert np.all((size >= low * (1 - 1e-6)) & (size <= high * (1 + 1e-6)))
        assert np.all((back[part] == 0) | (np.sign(back[part]) == np.sign(flat[part])))


def test_it_is_unbiased():
    x = parameter((40, 33)) * np.logspace(-3, 0, 33, dtype=np.float32)
    draws = 2000
    values = np.stack([coded(x, key) for key in mx.random.split(KEY, draws)]).astype(np.float64)
    flat = np.pad(x.reshape(-1), (0, -x.size % 256)).reshape(-1, 256)
    peaks = np.repeat(np.max(np.abs(flat), axis=1), 256)[: x.size].reshape(x.shape)
    low, high = neighbours(x, peaks)
    # The mean of n draws of two values: 6 standard errors of at most half their distance.
    assert np.all(np.abs(values.mean(axis=0) - x) <= 6 * 0.5 * (high - low) / np.sqrt(draws))
    assert np.any(np.abs(values[0] - x) > 0), "nothing was rounded: the test cannot fail"


def test_each_element_draws_by_itself():
    x = mx.where(mx.arange(1024) % 256 == 0, 1.0, 0.3)
    blocks = f.quantize(x, KEY)[0].reshape(4, 256)[:, 1:].tolist()
    assert len(set(map(tuple, blocks))) == 4
    assert all(len(set(block)) == 2 for block in blocks)


def test_what_a_code_stands_for_stays():
    codes = mx.arange(-127, 128).astype(mx.int8)
    x = f.dequantize(codes, mx.array([3.0]))
    again, scale = f.quantize(x, KEY)
    assert scale.item() == 3.0
    # A code rounds to itself but for float32's error of its square, one part in 2^23 of 16129.
    assert np.max(np.abs(np.array(again).astype(int) - np.arange(-127, 128))) <= 1
    assert np.mean(np.array(again) == np.arange(-127, 128)) > 0.98
    zero, scale = f.quantize(mx.zeros((300,)), KEY)
    assert not mx.any(zero).item()
    assert scale.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("magnitude", [1e-44, 1e-37, 3e38])
def test_any_finite_buffer_stays_finite(magnitude):
    x = np.float32(magnitude) * np.sign(parameter((300,)))
    assert np.all(np.isfinite(coded(x)))


def test_it_costs_at_most_0_14_of_adamw():
    model = Table()
    hidden = lambda plan: sum(e.state_bytes for e in plan if e.role == "hidden")  # noqa: E731
    full = sum(8 * np.prod(e.shape) for e in create_optimizer(model).plan if e.role == "hidden")
    for name in ("maxfactor", "muon"):
        optimizer = create_optimizer(model, name, momentum=0.9, state_dtype=mx.int8)
        assert hidden(optimizer.plan) <= 0.14 * full


def test_it_is_as_good_as_float32_on_average():
    # A steady small gradient beside a large one: rounding to nearest would never see it.
    g = np.full((1, 256), 1e-5, np.float32)
    g[0, 0] = 1.0
    for kind in (MaxFactor, Muon):
        optimizer = kind(momentum=0.9, nesterov=False, state_dtype=mx.int8)
        seen = np.zeros(256)
        tree = {"w": mx.array(parameter((1, 256)))}
        for step in range(400):
            tree = optimizer.apply_gradients({"w": mx.array(g)}, tree)
            state = optimizer.state["w"]
            if step >= 100:
                seen += np.array(f.dequantize(state["m"], state["m_scale"]))[0] / 300
        expected = g[0] * (10 if kind is Muon else 1)
        assert seen[1:].mean() == pytest.approx(expected[1], rel=0.2)


@pytest.mark.parametrize("state_dtype", [mx.bfloat16, mx.int8], ids=str)
@pytest.mark.parametrize("kind", [MaxFactor, Muon])
def test_a_step_uses_momentum_before_it_is_rounded(kind, state_dtype):
    p, g = {"w": mx.array(parameter((20, 20)))}, {"w": mx.array(parameter((20, 20), 1))}
    moved = [
        kind(momentum=0.9, state_dtype=dtype).apply_gradients(g, p)["w"]
        for dtype in (mx.float32, state_dtype)
    ]
    assert mx.array_equal(*moved).item()


def test_each_step_and_each_parameter_draws_anew():
    optimizer = MaxFactor(momentum=0.9, state_dtype=mx.int8)
    tree = {name: mx.array(parameter((20, 20))) for name in "ab"}
    keys = set()
    for _ in range(3):
        optimizer.apply_gradients(tree, tree)
        keys |= {tuple(optimizer.state[name]["key"].tolist()) for name in "ab"}
    assert len(keys) == 6


def test_momentum_and_parameter_draw_apart(monkeypatch):
    keys = []
    for name in ("quantize", "stochastic_round"):
        draw = getattr(f, name)
        spy = lambda *args, draw=draw: keys.append(tuple(args[-2].tolist())) or draw(*args)  # noqa: E731
        monkeypatch.setattr(f, name, spy)
    tree = {"w": mx.array(parameter((20, 20))).astype(mx.bfloat16)}
    optimizer = Muon(state_dtype=mx.int8, rounding="stochastic")
    for _ in range(2):
        optimizer.apply_gradients(tree, tree)
    assert len(keys) == len(set(keys)) == 4


def test_two_seeds_differ_and_one_repeats():
    def moved(seed):
        optimizer = MaxFactor(0.1, momentum=0.9, state_dtype=mx.int8, seed=seed)
        tree = {"w": mx.array(parameter((20, 20)))}
        for t in range(5):
            tree = optimizer.apply_gradients({"w": mx.array(parameter((20, 20), t))}, tree)
        return np.array(tree["w"])

    assert np.array_equal(moved(0), moved(0))
    assert not np.array_equal(moved(0), moved(1))


@pytest.mark.parametrize("name", ["maxfactor", "muon"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_it_resumes_bit_for_bit(name, rounding, tmp_path):
    def built():
        mx.random.seed(0)
        model = Table()
        model.set_dtype(mx.bfloat16)
        options = {"momentum": 0.9, "state_dtype": mx.int8, "rounding": rounding}
        return model, create_optimizer(model, name, **options)

    def train(model, optimizer, steps):
        for seed in steps:
            mx.random.seed(seed)
            optimizer.update(model, {"linear1": {"weight": mx.random.normal((128, 64))}})
        mx.eval(model.state, optimizer.state)

    model, optimizer = built()
    train(model, optimizer, range(3))
    save_checkpoint(tmp_path / "a.safetensors", model, optimizer)
    train(model, optimizer, range(3, 6))
    again, other = built()
    load_checkpoint(tmp_path / "a.safetensors", again, other)
    train(again, other, range(3, 6))
    for tree, twin in ((model.parameters(), again.parameters()), (optimizer.state, other.state)):
        for (path, a), (same, b) in zip(tree_flatten(tree), tree_flatten(twin), strict=True):
            assert (path, a.dtype) == (same, b.dtype)
            assert mx.array_equal(a, b).item(), path


def test_only_momentum_has_8_bits():
    state = {}
    MaxFactor(momentum=0.9, state_dtype=mx.int8).init_single(mx.zeros((6, 5)), state)
    dtypes = {key: str(array.dtype).removeprefix("mlx.core.") for key, array in state.items()}
    assert dtypes == {
        "row": "float32",
        "column": "float32",
        "m": "int8",
        "m_scale": "float32",
        "key": "uint32",
    }
    with pytest.raises(ValueError, match=r"state_dtype must be one of .*int8, got .*uint8"):
        MaxFactor(state_dtype=mx.uint8)
