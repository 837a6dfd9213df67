"""OrthoMaxFactor: its twin, matrices that start at zero, blocks, options, names, checkpoints."""

from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from models import CASES, Table
from trajectories import BOUND, SHAPES, assert_follows, label, parameter, trajectory

from mlx_maxfactor import (
    Adafactor,
    CheckpointError,
    MaxFactor,
    Muon,
    OrthoMaxFactor,
    create_optimizer,
    load_checkpoint,
    newton_schulz,
    reference,
    save_checkpoint,
)
from mlx_maxfactor import functional as f

Float32Momentum = partial(OrthoMaxFactor, state_dtype="float32")
MATRICES = [shape for shape in SHAPES if len(shape) > 1]

VARIANTS = [
    {},
    {"momentum": 0},
    {"block": 4},
    {"block": 1, "momentum": 0.5},
    {"block": None, "nesterov": False},
    {"method": "polar_express", "learning_rate": 0.1},
    {"steps": 3, "weight_decay": 0.5},
    {"min_rms": 0.1},
    {"min_rms": 0},
    {"beta2_decay": -0.5, "beta2_bounds": (0.01, 0.9)},
    {"eps": 1e-3, "learning_rate": lambda step: 0.05 / (step + 1)},
]


@pytest.mark.parametrize("zero", [False, True], ids=["noise", "zero"])
@pytest.mark.parametrize("shape", [*MATRICES, (17, 32), (1, 1)], ids=str)
@pytest.mark.parametrize("options", VARIANTS, ids=label)
def test_optimizer_follows_the_twin(options, shape, zero):
    if zero and options.get("min_rms") == 0:
        pytest.skip("with min_rms=0, zeros stay zeros")
    ours, twin = Float32Momentum(**options), reference.OrthoMaxFactor(**options)
    # After a gradient with a row of zeros u is nearly of rank one, and Newton-Schulz multiplies the
    # rounding of its small singular values by up to 485. Momentum averages such rows away.
    bound = BOUND if ours.momentum else 1e-4
    assert_follows(ours, twin, shape, zero=zero, bound=bound)


@pytest.mark.parametrize("layout", ["batched", "experts", "conv", "transposed"])
@pytest.mark.parametrize("block", [None, 2])
@pytest.mark.parametrize("shape", [(6, 3, 3, 4), (3, 4, 5), (8, 5)], ids=str)
def test_layouts_follow_the_twin(shape, block, layout):
    options = {"block": block, "momentum": 0.5}
    ours, twin = Float32Momentum(**options), reference.OrthoMaxFactor(**options)
    assert_follows(ours, twin, shape, layout)
    assert_follows(Muon(block=block), reference.Muon(block=block), shape, layout)


def test_each_group_of_a_convolution_is_a_matrix():
    for ours, twin in (
        (Float32Momentum(momentum=0.5), reference.OrthoMaxFactor(momentum=0.5)),
        (Muon(), reference.Muon()),
        (Adafactor(), reference.Adafactor()),
        (MaxFactor(momentum=0.5), reference.MaxFactor(momentum=0.5)),
    ):
        assert_follows(ours, twin, (6, 3, 3, 4), "conv/2")
    step = Muon(1.0, weight_decay=0.0, method="polar_express", steps=8, layout="conv")
    step.layouts["w"] = "conv/2"
    zeros, g = {"w": mx.zeros((6, 5, 4))}, {"w": mx.random.normal((6, 5, 4))}
    moved = f.as_matrices(step.apply_gradients(g, zeros)["w"], "conv/2")
    products = moved @ moved.swapaxes(-1, -2)
    assert moved.shape == (2, 3, 20)
    # Polar Express leaves singular values within 2 % of one another.
    assert mx.allclose(products / products[0, 0, 0], mx.eye(3), atol=0.05).item()


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


def test_effective_rate_does_not_depend_on_the_step():
    # The published row-max step would cap it at 1/√t.
    optimizer, tree = OrthoMaxFactor(0.5), {"w": mx.array(parameter((4, 4)))}
    first = optimizer.effective_learning_rates(tree)["w"]
    optimizer.state["step"] = mx.array(10**6, mx.uint64)
    assert optimizer.effective_learning_rates(tree)["w"] == first


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_huge_gradients_are_clamped_to_1e15(momentum):
    g = np.sign(parameter((6, 5))) * np.logspace(13, 30, 30, dtype=np.float32).reshape(6, 5)
    p = {"w": mx.array(parameter((6, 5)))}
    moved = [
        OrthoMaxFactor(momentum=momentum).apply_gradients({"w": mx.array(x)}, p)["w"]
        for x in (g, np.clip(g, -1e15, 1e15))
    ]
    # In float32 the square of 1e15 is not exactly 1e30, so statistics differ by a rounding.
    assert mx.allclose(*moved, rtol=0, atol=1e-6).item()


def test_zero_gradient_only_decays_the_weights():
    p = mx.array(parameter((6, 4)))
    optimizer = OrthoMaxFactor(0.1, weight_decay=0.5)
    moved = optimizer.apply_gradients({"w": mx.zeros((6, 4))}, {"w": p})["w"]
    assert mx.array_equal(moved, p * mx.array(1 - 0.1 * 0.5)).item()


def test_expert_without_gradient_does_not_move():
    p, shares = mx.array(parameter((3, 6, 5))), mx.array([1.0, 0.0, 1.0])[:, None, None]
    g = shares * mx.array(parameter((3, 6, 5), 1))
    optimizer = OrthoMaxFactor(0.01, layout="experts", weight_decay=0.0)
    moved = optimizer.apply_gradients({"w": g}, {"w": p})["w"]
    sizes = f.rms(moved - p, (-2, -1)) / f.rms(p, (-2, -1))
    # Differences of parameters of size 1, rounded to 6e-8, for steps of 0.01.
    assert sizes.flatten().tolist() == pytest.approx([0.01, 0.0, 0.01], rel=1e-4)


HARD = {
    "rank one": np.outer(parameter((6,)), parameter((5,), 1)),
    "one row": parameter((6, 5)) * (np.arange(6) == 2)[:, None],
    "one column": parameter((6, 5)) * (np.arange(5) == 2),
    "1e-25": parameter((6, 5)) * 1e-25,
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


@pytest.mark.parametrize(
    ("shape", "layout", "inputs"),
    [
        ((8, 5), "batched", 5),
        ((8, 3, 3, 4), "conv", 36),
        ((3, 8, 5), "experts", 5),
        ((16, 4), "transposed", 16),  # A of LoRA, stored as (in, r)
        ((4, 16), "transposed", 4),  # B of LoRA, stored as (r, out)
    ],
    ids=str,
)
def test_min_rms_defaults_to_the_rms_of_a_new_linear(shape, layout, inputs):
    optimizer = OrthoMaxFactor(0.01)
    optimizer.layouts["w"] = layout
    rate = optimizer.effective_learning_rates({"w": mx.zeros(shape)})["w"]
    assert rate == pytest.approx(0.01 / np.sqrt(3 * inputs), rel=1e-5)
    for floor in (0, 0.5):
        optimizer = OrthoMaxFactor(0.01, min_rms=floor)
        rate = optimizer.effective_learning_rates({"w": mx.zeros(shape)})["w"]
        assert rate == pytest.approx(0.01 * floor)


def test_default_min_rms_does_not_change_the_rate_of_standard_weights():
    mx.random.seed(0)
    for inputs, outputs in ((64, 256), (256, 64), (512, 512)):
        tree = {"w": nn.Linear(inputs, outputs).weight}
        rates = [
            OrthoMaxFactor(min_rms=floor).effective_learning_rates(tree)["w"]
            for floor in ("init", 0)
        ]
        assert rates[0] == pytest.approx(rates[1], rel=0.01)


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


class AdaLNZero(nn.Module):
    """Blocks that are shifted, scaled and gated by a projection that starts at zero."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 32)
        self.modulation = [nn.Linear(8, 96) for _ in range(2)]
        self.mlp = [nn.Linear(32, 32) for _ in range(2)]
        self.norm = nn.LayerNorm(32, affine=False)
        self.head = nn.Linear(32, 4)
        for layer in self.modulation:
            layer.weight, layer.bias = mx.zeros_like(layer.weight), mx.zeros_like(layer.bias)

    def __call__(self, x):
        y = self.first(x)
        for modulation, mlp in zip(self.modulation, self.mlp, strict=True):
            shift, scale, gate = mx.split(modulation(nn.silu(x)), 3, axis=-1)
            y = y + gate * nn.gelu(mlp(self.norm(y) * (1 + scale) + shift))
        return self.head(y)


class Adapter(nn.Module):
    """A frozen layer with two Linears in parallel; the second Linear starts at zero."""

    def __init__(self, a, b, scale):
        super().__init__()
        self.names, self.scale = (a, b), scale
        self.base = nn.Linear(32, 32)
        self[a], self[b] = nn.Linear(32, 8, bias=False), nn.Linear(8, 32, bias=False)
        self[b].weight = mx.zeros_like(self[b].weight)
        self.base.freeze()

    def __call__(self, x):
        a, b = self.names
        return self.base(x) + self.scale * self[b](self[a](x))


class Adapted(nn.Module):
    """Adapters whose names the router does not know; min_rms lets their second Linear learn."""

    adapter = ("reduce", "restore", 1.0)

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(8, 32), nn.Linear(32, 4)
        self.layers = [Adapter(*self.adapter) for _ in range(2)]
        self.first.freeze()
        self.head.freeze()

    def __call__(self, x):
        x = nn.relu(self.first(x))
        for layer in self.layers:
            x = nn.relu(layer(x))
        return self.head(x)


class AdaptedByLora(Adapted):
    """Adapters called as in LoRA, with mlx_lm's scale, for which LoRA's rates were found."""

    adapter = ("lora_a", "lora_b", 20.0)


@pytest.mark.parametrize("build", [ZeroOutputs, AdaLNZero, Adapted, AdaptedByLora])
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
    ours = f.orthogonalize(mx.array(x), method, 5, block)
    twin = reference.orthogonalize_blocks(np.float64(x), method, 5, block)
    # The same bound as for whole matrices: each step amplifies float32 rounding by 3.4 to 8.
    assert np.allclose(np.array(ours), twin, atol=2e-4)


def test_blocks_divide_the_shorter_side():
    x = mx.array(parameter((10, 23)))
    blocks = f.orthogonalize(x, block=4)
    for start in (0, 4, 8):
        rows = x[start : start + 4]
        assert mx.allclose(blocks[start : start + 4], newton_schulz(rows), atol=1e-6).item()
    assert mx.allclose(f.orthogonalize(x.T, block=4), blocks.T, atol=1e-6).item()


def test_muon_with_blocks_keeps_the_scale_of_the_whole_matrix():
    g, p = {"w": mx.array(parameter((64, 16)))}, {"w": mx.zeros((64, 16))}
    options = {"scale": "spectral", "method": "polar_express", "steps": 8}
    sizes = [
        f.rms(Muon(1.0, block=block, **options).apply_gradients(g, p)["w"]).item()
        for block in (None, 4, 100)
    ]
    assert sizes[1:] == pytest.approx([sizes[0]] * 2, rel=1e-3)


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": 0}, "block must be a whole number of at least 1, got 0"),
        ({"steps": 2.5}, "steps must be a whole number of at least 1, got 2.5"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        ({"nesterov": 1}, "nesterov must be True or False, got 1"),
        ({"method": "svd"}, "method must be one of 'newton_schulz', 'polar_express', got 'svd'"),
        ({"min_rms": "zero"}, r"min_rms must be in \[0, inf\), got 'zero'"),
        ({"min_rms": -1}, r"min_rms must be in \[0, inf\), got -1"),
        ({"beta2_bounds": (0.9, 0.1)}, r"beta2_bounds must rise, got \(0.9, 0.1\)"),
        ({"eps": 0}, r"eps must be in \[1e-15, inf\), got 0"),
    ],
    ids=str,
)
def test_invalid_options_are_refused(options, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        OrthoMaxFactor(**options)
    with pytest.raises(ValueError, match="block must be a whole number of at least 1, got -1"):
        Muon(block=-1)


@pytest.mark.parametrize("shape", [(), (1,), (7,)], ids=str)
def test_vectors_are_refused(shape):
    message = "orthogonalizes matrices and cannot take shape .* route it to another optimizer"
    with pytest.raises(ValueError, match=message):
        OrthoMaxFactor().init({"w": mx.zeros(shape)})


STEP_WAS_REMOVED = "the orthogonal step is OrthoMaxFactor.{5}, and MaxFactor takes the row-max step"


def test_removed_option_step_names_its_replacement():
    with pytest.raises(ValueError, match=f"^MaxFactor has no option 'step': {STEP_WAS_REMOVED}$"):
        MaxFactor(step="orthogonal")
    for name in ("maxfactor", "orthomaxfactor"):
        with pytest.raises(ValueError, match=f"^{name} has no option 'step': {STEP_WAS_REMOVED}$"):
            create_optimizer(Table(), name, step="row_max")


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "cautious": True}], ids=str)
def test_each_name_stands_for_one_class_with_its_own_defaults(options):
    members = create_optimizer(Table(), "maxfactor", **options).optimizers
    assert type(members[0]) is MaxFactor
    assert type(create_optimizer(Table()).optimizers[0]) is OrthoMaxFactor
    gradients = [parameter((12, 8), seed) for seed in range(20)]
    bare = trajectory(MaxFactor(**options), parameter((12, 8)), gradients)
    model = Table()
    model.linear1.weight = mx.array(parameter((12, 8)))
    routed = create_optimizer(model, "maxfactor", **options)
    for g, p in zip(gradients, bare, strict=True):
        routed.update(model, {"linear1": {"weight": mx.array(g)}})
        assert np.array_equal(np.array(model.linear1.weight), p)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_model_is_updated(case):
    mx.random.seed(0)
    model = case.build()
    optimizer = create_optimizer(model, block=3, learning_rate=0.01)
    before = dict(tree_flatten(model.parameters()))
    tree = model.trainable_parameters()
    optimizer.update(model, tree)
    after = dict(tree_flatten(model.parameters()))
    for entry in optimizer.plan:
        if entry.optimizer == "orthomaxfactor" and mx.any(before[entry.path] != 0).item():
            assert mx.all(mx.isfinite(after[entry.path])).item()
            assert not mx.array_equal(before[entry.path], after[entry.path]).item()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"steps": 3}, "steps is 5 in the file, 3 here"),
        ({"method": "polar_express"}, "method is 'newton_schulz' in the file, 'polar_express'"),
        ({"block": None}, "block is 128 in the file, None here"),
        ({"min_rms": 0.1}, "min_rms is 'init' in the file, 0.1 here"),
        ({"state_dtype": "int8"}, "state_dtype is 'int4' in the file, 'int8' here"),
        ({"hidden": "maxfactor"}, "OrthoMaxFactor in the file, MaxFactor here"),
    ],
    ids=str,
)
def test_checkpoint_with_other_options_is_refused(option, message, tmp_path):
    model, path = Table(), tmp_path / "run.safetensors"
    save_checkpoint(path, model, create_optimizer(model))
    load_checkpoint(path, model, create_optimizer(model))
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path, model, create_optimizer(model, **option))


def test_muon_checkpoint_with_another_block_is_refused(tmp_path):
    model, path = Table(), tmp_path / "run.safetensors"
    save_checkpoint(path, model, create_optimizer(model, "muon", block=16))
    with pytest.raises(CheckpointError, match="block is 16 in the file, 8 here"):
        load_checkpoint(path, model, create_optimizer(model, "muon", block=8))


@pytest.mark.parametrize("scale", [1e-3, 1e-6, 1e-8, 1e6])
def test_step_does_not_depend_on_the_scale_of_gradients(scale):
    gradients = [parameter((24, 40), seed) for seed in range(3)]
    start = mx.array(parameter((24, 40), 9))

    def moved(factor):
        optimizer, p = OrthoMaxFactor(0.1, state_dtype="float32", weight_decay=0.0), start
        for g in gradients:
            p = optimizer.apply_gradients({"w": mx.array(factor * g)}, {"w": p})["w"]
        return p - start

    one, other = moved(1.0), moved(scale)
    # Newton-Schulz multiplies a relative rounding error of 1e-7 by up to 3.4445^5.
    assert mx.linalg.norm(one - other).item() <= 1e-4 * mx.linalg.norm(one).item()
