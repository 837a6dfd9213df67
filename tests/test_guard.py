"""Guards against bad batches: clipping by the global norm and skipped steps, eager and compiled."""

import copy
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as mlx_optimizers
import numpy as np
import pytest
from arrays import dtypes, flat, random_gradients, same, snapshot
from mlx.utils import tree_map
from models import Table
from trajectories import parameter

from mlx_maxfactor import OPTIMIZERS, GuardedOptimizer, MaxFactor, SignSGD, create_optimizer
from mlx_maxfactor import functional as f


def routed(model, name):
    options = {"max_grad_norm": 1.0, "skip_nonfinite": True, "rounding": "stochastic"}
    return create_optimizer(model, name, **options)


BUILDERS = {
    **{name: partial(routed, name=name) for name in OPTIMIZERS},
    "maxfactor bare": lambda model: GuardedOptimizer(MaxFactor(momentum=0.9), max_grad_norm=1.0),
    "mlx AdamW": lambda model: GuardedOptimizer(mlx_optimizers.AdamW(1e-2), max_grad_norm=1.0),
    "mlx in a router": lambda model: create_optimizer(
        model, mlx_optimizers.Adam(1e-2), mlx_optimizers.Adam(1e-2), skip_nonfinite=True
    ),
}


def gradients_of(model, seed=0, poison=None):
    tree = random_gradients(model, seed)
    if poison is not None:
        weight = tree["linear1"]["weight"]
        tree["linear1"]["weight"] = mx.where(mx.arange(weight.shape[1]) == 3, poison, weight)
    return tree


NAN, INF = float("nan"), float("inf")
# The guard sees the gradients before the optimizer: one optimizer is enough for inf.
SKIPS = [
    *((name, NAN, False) for name in BUILDERS),
    *(("orthomaxfactor", poison, False) for poison in (INF, -INF)),
    *(
        pytest.param(name, NAN, True, marks=pytest.mark.compiled)
        for name in ("orthomaxfactor", "maxfactor bare", "mlx in a router")
    ),
]


@pytest.mark.parametrize(("name", "poison", "compiled"), SKIPS)
def test_skipped_step_changes_nothing(name, poison, compiled):
    model = Table()
    model.set_dtype(mx.bfloat16)
    optimizer = BUILDERS[name](model)
    optimizer.init(model.trainable_parameters())
    state = [model.state, optimizer.state]
    traces = []

    def step(gradients):
        traces.append(None)
        optimizer.update(model, gradients)

    run = mx.compile(step, inputs=state, outputs=state) if compiled else step
    for seed in range(2):
        run(gradients_of(model, seed))
    before = snapshot(model, optimizer)
    run(gradients_of(model, 7, mx.array(poison, mx.bfloat16)))
    after = snapshot(model, optimizer)
    assert optimizer.skipped.item() == 1
    for path, array in before.items():
        assert "skipped" in path or np.array_equal(array, after[path]), path
    run(gradients_of(model, 8))
    assert optimizer.skipped.item() == 1
    assert optimizer.step.item() == 3
    moved = snapshot(model, optimizer)
    assert not np.array_equal(moved["0.linear1.weight"], before["0.linear1.weight"])
    assert not compiled or len(traces) == 1


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
def test_global_norm_is_computed_in_float32(dtype):
    # MLX's clip_grad_norm returns 16 for a thousand ones in bf16, instead of 31.6.
    peak, norm = f.scaled_global_norm([mx.ones(500, dtype), mx.ones((20, 25), dtype), mx.zeros(0)])
    assert (peak * norm).item() == pytest.approx(np.sqrt(1000), rel=1e-6)


@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 1e30])
def test_clipping_scales_gradients_of_any_magnitude_to_the_limit(magnitude):
    g = {"a": mx.array(parameter((4, 3)) * np.float32(magnitude)), "b": mx.array(parameter((5,)))}
    optimizer = GuardedOptimizer(mlx_optimizers.SGD(1.0), max_grad_norm=0.5)
    moved = optimizer.apply_gradients(g, tree_map(mx.zeros_like, g))
    exact = np.concatenate([np.float64(g[k]).ravel() for k in g])
    exact *= 0.5 / np.linalg.norm(exact)
    ours = -np.concatenate([np.array(moved[k]).ravel() for k in g])
    assert np.allclose(ours, exact, rtol=1e-5, atol=1e-12)


def test_gradients_below_the_limit_are_not_changed():
    g = {"a": mx.array(parameter((4,)))}
    optimizer = GuardedOptimizer(mlx_optimizers.SGD(1.0), max_grad_norm=100.0)
    assert mx.array_equal(optimizer.apply_gradients(g, {"a": mx.zeros(4)})["a"], -g["a"]).item()
    zero = {"a": mx.zeros(4)}
    assert optimizer.apply_gradients(zero, zero)["a"].tolist() == [0.0] * 4


def test_infinite_element_without_skipping_leaves_the_others_finite():
    # A plain factor would turn the gradients into NaN and zeros.
    options = {"max_grad_norm": 1.0, "skip_nonfinite": False}
    optimizer = GuardedOptimizer(SignSGD(1.0, weight_decay=0.0), **options)
    g = {"a": mx.array([float("inf"), 1.0, -2.0])}
    assert optimizer.apply_gradients(g, {"a": mx.zeros(3)})["a"].tolist() == [-1.0, -1.0, 1.0]
    assert optimizer.skipped.item() == 0


def test_huge_finite_gradients_are_not_skipped():
    optimizer = GuardedOptimizer(MaxFactor(), max_grad_norm=1.0)
    moved = optimizer.apply_gradients({"w": mx.full((50, 50), 3e38)}, {"w": mx.ones((50, 50))})
    assert optimizer.skipped.item() == 0
    assert mx.all(moved["w"] < 1).item()


def test_count_of_skipped_steps_is_part_of_the_state():
    optimizer, other = GuardedOptimizer(SignSGD(), max_skipped=2), GuardedOptimizer(SignSGD())
    optimizer.apply_gradients({"a": mx.array([float("nan"), 1.0])}, {"a": mx.ones(2)})
    other.state = copy.deepcopy(optimizer.state)
    assert other.skipped.item() == 1
    optimizer.state = {"states": optimizer.state["states"]}  # of a program without a guard
    assert optimizer.skipped.item() == 0


def test_guard_passes_on_rates_and_steps():
    optimizer = GuardedOptimizer(MaxFactor(0.1))
    optimizer.learning_rate = 0.2
    assert optimizer.learning_rate.item() == pytest.approx(0.2)
    assert optimizer.optimizers[0].learning_rate.item() == pytest.approx(0.2)
    model = nn.Linear(3, 2)
    optimizer.update(model, tree_map(mx.ones_like, model.parameters()))
    assert optimizer.step.item() == 1


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: SignSGD(1e-2),
        lambda: mlx_optimizers.Adam(1e-2, bias_correction=True, eps=1e-12),
        lambda: mlx_optimizers.MultiOptimizer([mlx_optimizers.Adam(1e-2, eps=1e-12)], []),
    ],
    ids=["ours", "mlx", "mlx, many in one"],
)
def test_layer_with_tiny_gradients_moves_after_clipping(make, dtype):
    """Another layer with 1e3 makes the clip scale 2e-5 to 1e-8, which fp16 would round to 0."""
    optimizer = GuardedOptimizer(make(), max_grad_norm=1.0)
    p = {"loud": mx.ones(8, dtype), "quiet": mx.ones(8, dtype)}
    g = {"loud": mx.full(8, 1e3, dtype), "quiet": mx.full(8, 2e-5, dtype)}
    optimizer.init(p)
    before = dtypes(optimizer.state)
    optimizer.apply_gradients(g, p)
    new = optimizer.apply_gradients(g, p)
    assert new["quiet"].dtype == dtype
    assert dtypes(optimizer.state) == before
    assert (new["quiet"] < 1).all().item()


def test_guard_handles_both_parts_of_a_complex_gradient():
    def step(gradient, **options):
        optimizer = GuardedOptimizer(mlx_optimizers.SGD(1.0), **options)
        p = {"z": mx.zeros(2, mx.complex64)}
        return optimizer, optimizer.apply_gradients({"z": mx.array(gradient)}, p)["z"].tolist()

    assert step([0.1 + 0.2j, 0j])[1] == pytest.approx([-0.1 - 0.2j, 0j])
    assert step([3j, 4 + 0j], max_grad_norm=1.0)[1] == pytest.approx([-0.6j, -0.8 + 0j])
    for bad in (complex(0, float("nan")), complex(float("inf"), 0)):
        optimizer, new = step([bad, 1 + 1j])
        assert (new, optimizer.skipped.item()) == ([0j, 0j], 1)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.compiled)])
def test_too_many_skipped_steps_in_a_row_raise_one_error(compiled):
    model = Table()
    optimizer = create_optimizer(model, skip_nonfinite=True, max_skipped=3)
    state = [model.state, optimizer.state]
    good, bad = gradients_of(model), gradients_of(model, poison=float("nan"))

    def step(gradients):
        optimizer.update(model, gradients)

    if compiled:
        step = mx.compile(step, inputs=state, outputs=state)
    for gradients in (bad, bad, good, bad, bad):
        step(gradients)
        mx.eval(state)
    assert optimizer.skipped.item() == 4
    step(bad)
    message = "3 steps in a row were skipped: .* a NaN; the model is as it was after update 1"
    if not compiled:  # an eager loop raises though nobody reads the count
        with pytest.raises(FloatingPointError, match=message):
            step(bad)
    with pytest.raises(FloatingPointError, match=message):
        _ = optimizer.skipped
    assert "max_skipped=3" in repr(optimizer)
    with pytest.raises(ValueError, match="max_skipped limits the skipped steps: set skip_n"):
        create_optimizer(model, max_skipped=3)


@pytest.mark.parametrize("limit", [None, 1.0])
@pytest.mark.parametrize("kind", [mlx_optimizers.SGD, mlx_optimizers.Adam])
def test_float32_gradient_changes_no_dtype(kind, limit):
    optimizer = GuardedOptimizer(kind(0.1), max_grad_norm=limit)
    p = {"w": mx.ones(2, mx.bfloat16)}
    optimizer.init(p)
    before = dtypes(optimizer.state)
    for first in (1.0, float("nan")):
        p = optimizer.apply_gradients({"w": mx.array([first, 1.0])}, p)
    assert p["w"].dtype == mx.bfloat16
    assert dtypes(optimizer.state) == before


class Updating(mlx_optimizers.Optimizer):
    """It sets its state with ``update``, in one of two ways."""

    def __init__(self):
        super().__init__()
        self.learning_rate = 0.1

    def init_single(self, parameter, state):
        state["m"] = mx.zeros(parameter.shape)

    def apply_single(self, gradient, parameter, state):
        state.update(m=gradient)
        state |= {"m": state["m"] + gradient}
        return parameter - state["m"]


def test_state_set_with_update_is_kept_in_a_skipped_step():
    optimizer = GuardedOptimizer(Updating())
    p = {"w": mx.ones(2)}
    for factor in (1.0, float("nan")):
        p = optimizer.apply_gradients({"w": factor * mx.ones(2)}, p)
    assert optimizer.skipped.item() == 1
    assert p["w"].tolist() == [-1.0, -1.0]
    assert optimizer.state["states"][0]["w"]["m"].tolist() == [2.0, 2.0]


class Broken(mlx_optimizers.SGD):
    on = False

    def apply_single(self, gradient, parameter, state):
        if Broken.on:
            raise RuntimeError("broken")
        return super().apply_single(gradient, parameter, state)


def test_failed_update_restores_the_state_of_nested_members(monkeypatch):
    p = {"a": mx.ones((2, 2)), "b": mx.ones(2)}
    members = [mlx_optimizers.Adam(0.1), Broken(0.1)]
    nested = mlx_optimizers.MultiOptimizer(members, [lambda path, _: path == "a"])
    for inner in (Broken(0.1), nested):
        optimizer = GuardedOptimizer(inner, max_grad_norm=1.0)
        optimizer.apply_gradients(p, p)
        before = flat(optimizer.state)
        monkeypatch.setattr(Broken, "on", True)
        with pytest.raises(RuntimeError, match="broken"):
            optimizer.apply_gradients(p, p)
        monkeypatch.setattr(Broken, "on", False)
        assert same(flat(optimizer.state), before)


def test_guarded_multi_optimizer_counts_steps_and_takes_a_state():
    parts = [mlx_optimizers.Adam(1e-2), mlx_optimizers.Adam(1e-3)]
    inner = mlx_optimizers.MultiOptimizer(parts, [lambda path, _: path == "weight"])
    optimizer = GuardedOptimizer(inner, max_skipped=1)
    model = nn.Linear(3, 2)
    gradients = tree_map(mx.ones_like, model.parameters())
    optimizer.update(model, gradients)
    saved = tree_map(mx.array, optimizer.state)  # copies
    optimizer.update(model, gradients)
    assert optimizer.step.item() == 2
    optimizer.state = saved
    assert optimizer.step.item() == 1
    assert [part.step.item() for part in parts] == [1, 1]
    gradients["bias"] = gradients["bias"] * float("nan")
    optimizer.update(model, gradients)
    with pytest.raises(FloatingPointError, match="after update 1"):
        optimizer.update(model, gradients)
