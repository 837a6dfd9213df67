"""The orthogonal step against its twin; blocks; what it refuses; by name."""

import mlx.core as mx
import numpy as np
import pytest
import reference
from mlx.utils import tree_flatten
from models import CASES, Table
from trajectories import SHAPES, assert_follows, parameter

from mlx_maxfactor import (
    CheckpointError,
    FrequencyAdaptiveMomentum,
    MaxFactor,
    Muon,
    Orthogonal,
    create_optimizer,
    load_checkpoint,
    newton_schulz,
    save_checkpoint,
)
from mlx_maxfactor import functional as f

VARIANTS = [
    {"step": "orthogonal"},
    {"step": {"block": 4}},
    {"step": {"block": 1}},
    {"step": {"method": "polar_express"}, "learning_rate": 0.1},
    {"step": {"steps": 3, "capped": False}, "learning_rate": 0.1},
    {"step": {"capped": False}, "min_lr": 0.02},
    {"step": {"capped": False}, "relative_step": True},
    {"step": "orthogonal", "momentum": 0.8},
    {"step": {"block": 5}, "momentum": 0.8, "nesterov": True},
    {"step": "orthogonal", "maximize": True, "weight_decay": 0.5},
    {"step": "orthogonal", "min_rms": 0.1},
    {"step": "orthogonal", "full_matrix": True},
    {"step": "orthogonal", "relative_step": True, "vector_sign": True},
    {"step": "orthogonal", "eps": (1e-3, 0.1), "learning_rate": lambda step: 0.05 / (step + 1)},
]


@pytest.mark.parametrize("shape", [*SHAPES, (17, 32), ()], ids=str)
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_it_follows_the_twin(options, shape):
    assert_follows(MaxFactor(**options), reference.MaxFactor(**options), shape)


@pytest.mark.parametrize("layout", ["batched", "experts", "conv", "transposed"])
@pytest.mark.parametrize("block", [None, 2])
@pytest.mark.parametrize("shape", [(6, 3, 3, 4), (3, 4, 5), (8, 5)], ids=str)
def test_layouts_follow_the_twin(shape, block, layout):
    options = {"step": {"block": block}, "momentum": 0.5, "nesterov": True}
    assert_follows(MaxFactor(**options), reference.MaxFactor(**options), shape, layout)
    assert_follows(Muon(block=block), reference.Muon(block=block), shape, layout)


@pytest.mark.parametrize("layout", ["experts", "batched", "conv", "transposed"])
def test_a_step_has_the_size_that_the_rate_says(layout):
    # RMS 1 of each matrix, whatever the gradients' scales: an expert's step is its own.
    shape = (3, 6, 5)
    g = parameter(shape) * np.array([1e-3, 1.0, 1e3], np.float32)[:, None, None]
    p = np.ones(shape, np.float32) * np.array([1.0, 2.0, 4.0], np.float32)[:, None, None]
    optimizer = MaxFactor(0.01, step="orthogonal", weight_decay=0.0)
    optimizer.layouts["w"] = layout
    rate = optimizer.effective_learning_rates({"w": mx.array(p)})["w"]
    moved = np.array(optimizer.apply_gradients({"w": mx.array(g)}, {"w": mx.array(p)})["w"]) - p
    sizes = np.sqrt(np.mean(moved**2, axis=(1, 2)))
    # Differences of parameters up to 4, each rounded to 2.4e-7, for steps of 0.01.
    if layout == "experts":
        assert sizes == pytest.approx([0.01, 0.02, 0.04], rel=1e-4)
    elif layout == "conv":
        assert np.sqrt(np.mean(moved**2)) == pytest.approx(rate, rel=1e-4)
    else:
        assert sizes == pytest.approx([0.01 * np.sqrt(7)] * 3, rel=1e-4)
    assert np.sqrt(np.mean(sizes)) > 0
    assert rate == pytest.approx(0.01 * (7 / 3 if layout == "experts" else np.sqrt(7)), rel=1e-5)


def test_the_cap_is_an_option():
    tree = {"w": mx.array(parameter((4, 4)))}
    rates = []
    for capped in (True, False):
        optimizer = MaxFactor(0.5, step=Orthogonal(capped=capped))
        optimizer.state["step"] = mx.array(99, mx.uint64)
        rates.append(optimizer.effective_learning_rates(tree)["w"])
    assert rates[1] / rates[0] == pytest.approx(0.5 / 0.1)


@pytest.mark.parametrize("shape", [(1, 1), (4,), ()], ids=str)
def test_vectors_and_single_numbers_are_always_capped(shape):
    optimizer = MaxFactor(0.5, step={"capped": False})
    optimizer.state["step"] = mx.array(99, mx.uint64)
    rate = optimizer.effective_learning_rates({"w": mx.ones(shape)})["w"]
    assert rate == pytest.approx(0.1)


def test_the_cap_leaves_decay_alone():
    p = mx.array(parameter((6, 4)))
    optimizer = MaxFactor(0.5, step="orthogonal", weight_decay=0.5)
    optimizer.state["step"] = mx.array(99, mx.uint64)
    moved = optimizer.apply_gradients({"w": mx.zeros((6, 4))}, {"w": p})["w"]
    assert mx.array_equal(moved, p * mx.array(1 - 0.5 * 0.5)).item()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_gradient_beyond_the_limit_counts_as_the_limit(momentum):
    g = np.sign(parameter((6, 5))) * np.logspace(13, 30, 30, dtype=np.float32).reshape(6, 5)
    p = {"w": mx.array(parameter((6, 5)))}
    moved = [
        MaxFactor(step="orthogonal", momentum=momentum).apply_gradients({"w": mx.array(x)}, p)["w"]
        for x in (g, np.clip(g, -1e15, 1e15))
    ]
    # In float32 the square of 1e15 is not 1e30: statistics differ by a rounding.
    assert mx.allclose(*moved, rtol=0, atol=1e-6).item()


def test_a_zero_gradient_moves_nothing_but_decay():
    p = mx.array(parameter((6, 4)))
    optimizer = MaxFactor(0.1, step="orthogonal", weight_decay=0.5)
    moved = optimizer.apply_gradients({"w": mx.zeros((6, 4))}, {"w": p})["w"]
    assert mx.array_equal(moved, p * mx.array(1 - 0.1 * 0.5)).item()


def test_an_expert_without_gradient_stays_and_the_others_step():
    p, shares = mx.array(parameter((3, 6, 5))), mx.array([1.0, 0.0, 1.0])[:, None, None]
    g = shares * mx.array(parameter((3, 6, 5), 1))
    optimizer = MaxFactor(0.01, step="orthogonal", layout="experts", weight_decay=0.0)
    moved = optimizer.apply_gradients({"w": g}, {"w": p})["w"]
    sizes = f.rms(moved - p, (-2, -1)) / f.rms(p, (-2, -1))
    # Differences of parameters of size 1, rounded to 6e-8, for steps of 0.01.
    assert sizes.flatten().tolist() == pytest.approx([0.01, 0.0, 0.01], rel=1e-4)


HARD = {
    "rank one": np.outer(parameter((6,)), parameter((5,), 1)),
    "one row": parameter((6, 5)) * (np.arange(6) == 2)[:, None],
    "one column": parameter((6, 5)) * (np.arange(5) == 2),
    "1e-37": parameter((6, 5)) * 1e-37,
    "1e30": parameter((6, 5)) * 1e30,
    "equal": np.full((6, 5), 3e38),
}


@pytest.mark.parametrize("block", [None, 2])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("kind", HARD)
def test_hard_gradients_give_a_step_of_the_right_size(kind, momentum, block):
    optimizer = MaxFactor(0.01, step={"block": block}, momentum=momentum, weight_decay=0.0)
    p = mx.array(parameter((6, 5)))
    g = mx.array(HARD[kind].astype(np.float32))
    for sign in (1, -1, 1):
        rate = optimizer.effective_learning_rates({"w": p})["w"]
        moved = optimizer.apply_gradients({"w": sign * g}, {"w": p})["w"]
        # Differences of parameters of size 1, rounded to 6e-8, for steps of 0.01.
        assert f.rms(moved - p).item() == pytest.approx(rate, rel=1e-4)
        p = moved


def test_the_state_is_rows_and_columns():
    state = {}
    MaxFactor(step="orthogonal").init_single(mx.zeros((48, 32)), state)
    assert sum(x.nbytes for x in state.values()) == 4 * (48 + 32)
    state = {}
    Muon(momentum=0).init_single(mx.zeros((48, 32)), state)
    assert state == {}


# Blocks


@pytest.mark.parametrize("method", ["newton_schulz", "polar_express"])
@pytest.mark.parametrize("block", [1, 3, 4, 5, 7, 100])
@pytest.mark.parametrize("shape", [(10, 23), (23, 10), (3, 7, 7), (2, 2, 4, 9)], ids=str)
def test_blocks_equal_the_twin(shape, block, method):
    x = parameter(shape)
    ours = f.orthogonalize(mx.array(x), method, 5, block)
    twin = reference.orthogonalize_blocks(np.float64(x), method, 5, block)
    # As for whole matrices: Gram matrices in float32, amplified by 3.4 to 8 a step.
    assert np.allclose(np.array(ours), twin, atol=2e-4)


def test_a_block_is_rows_of_the_shorter_side():
    x = mx.array(parameter((10, 23)))
    blocks = f.orthogonalize(x, block=4)
    for start in (0, 4, 8):
        rows = x[start : start + 4]
        assert mx.allclose(blocks[start : start + 4], newton_schulz(rows), atol=1e-6).item()
    assert mx.array_equal(f.orthogonalize(x.T, block=4), blocks.T).item()


def test_muon_in_blocks_keeps_the_scale_of_the_whole_matrix():
    g, p = {"w": mx.array(parameter((64, 16)))}, {"w": mx.zeros((64, 16))}
    options = {"scale": "spectral", "method": "polar_express", "steps": 8}
    sizes = [
        f.rms(Muon(1.0, block=block, **options).apply_gradients(g, p)["w"]).item()
        for block in (None, 4, 100)
    ]
    assert sizes[1:] == pytest.approx([sizes[0]] * 2, rel=1e-3)


# Options


def test_a_step_is_a_value_a_name_or_its_options():
    assert MaxFactor().orthogonal is None
    assert MaxFactor(step="row_max").orthogonal is None
    assert MaxFactor(step="orthogonal").orthogonal == Orthogonal()
    assert MaxFactor(step={"block": 128}).orthogonal == Orthogonal(block=128)
    assert MaxFactor(step=Orthogonal(128)).orthogonal == Orthogonal(block=128)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Orthogonal(block=0), "block must be a whole number of at least 1, got 0"),
        (lambda: Orthogonal(steps=2.5), "steps must be a whole number"),
        (lambda: Orthogonal(steps=0), "steps must be a whole number of at least 1, got 0"),
        (lambda: Orthogonal(capped=1), "capped must be True or False, got 1"),
        (
            lambda: Orthogonal(method="svd"),
            "method must be one of 'newton_schulz', 'polar_express', got 'svd'",
        ),
        (lambda: Muon(block=-1), "block must be a whole number of at least 1, got -1"),
        (lambda: MaxFactor(step="muon"), "step must be 'row_max', 'orthogonal', .*, got 'muon'"),
        (lambda: MaxFactor(step=None), "step must be 'row_max', 'orthogonal', .*, got None"),
        (
            lambda: MaxFactor(step={"blocks": 2}),
            "step has no option 'blocks' .did you mean 'block'.*; it has block, met",
        ),
        (
            lambda: MaxFactor(step="orthogonal", d=0.5, max_norm=False),
            r"d, max_norm cannot go with the orthogonal step, .*step=\"row_max\"",
        ),
        (lambda: MaxFactor(step="orthogonal", clip_threshold=1.0), "clip_threshold cannot go"),
        (
            lambda: MaxFactor(step="orthogonal", momentum=0.9, cautious=True),
            "cautious cannot go with the orthogonal step",
        ),
        (
            lambda: MaxFactor(step="orthogonal", momentum=FrequencyAdaptiveMomentum()),
            "momentum=FrequencyAdaptiveMomentum cannot go with the orthogonal step",
        ),
    ],
)
def test_options_are_checked_when_it_is_built(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_a_model_gets_it_by_name():
    for step in ("orthogonal", {"block": 16}, Orthogonal(block=16)):
        lead = create_optimizer(Table(), step=step).optimizers[0]
        assert lead.orthogonal == (Orthogonal() if step == "orthogonal" else Orthogonal(block=16))
    assert create_optimizer(Table()).optimizers[0].orthogonal == Orthogonal()
    assert create_optimizer(Table(), step="row_max").optimizers[0].orthogonal is None


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_model_steps_by_it(case):
    mx.random.seed(0)
    model = case.build()
    options = {"momentum": 0.8, "state_dtype": mx.int8}
    optimizer = create_optimizer(model, step={"block": 3}, learning_rate=0.01, **options)
    before = dict(tree_flatten(model.parameters()))
    tree = model.trainable_parameters()
    optimizer.update(model, tree)
    after = dict(tree_flatten(model.parameters()))
    for entry in optimizer.plan:
        if entry.optimizer == "maxfactor" and mx.any(before[entry.path] != 0).item():
            assert mx.all(mx.isfinite(after[entry.path])).item()
            assert not mx.array_equal(before[entry.path], after[entry.path]).item()


def test_a_checkpoint_of_another_step_is_refused(tmp_path):
    model, path = Table(), tmp_path / "run.safetensors"
    save_checkpoint(path, model, create_optimizer(model, step={"block": 16}))
    load_checkpoint(path, model, create_optimizer(model, step=Orthogonal(block=16)))
    others = ({"steps": 3}, {"method": "polar_express"}, {"capped": False})
    for other in ("row_max", "orthogonal", *({"block": 16, **option} for option in others)):
        with pytest.raises(CheckpointError, match="orthogonal is"):
            load_checkpoint(path, model, create_optimizer(model, step=other))


def test_a_checkpoint_of_other_blocks_is_refused(tmp_path):
    model, path = Table(), tmp_path / "run.safetensors"
    save_checkpoint(path, model, create_optimizer(model, "muon", block=16))
    with pytest.raises(CheckpointError, match="block is 16 in the file, 8 here"):
        load_checkpoint(path, model, create_optimizer(model, "muon", block=8))
