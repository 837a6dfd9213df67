"""Properties that every optimizer of the factory must have, bare and routed."""

import copy
import pickle
import re
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from arrays import dtypes, flat, same
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from models import CASES_BY_NAME, Table
from trajectories import parameter

from mlx_maxfactor import (
    OPTIMIZERS,
    FrequencyAdaptiveMomentum,
    GuardedOptimizer,
    MaxFactor,
    create_optimizer,
    warmup_cosine,
)

DTYPES = [mx.float32, mx.bfloat16, mx.float16]
SHAPES = [(), (1,), (7,), (1, 1), (1, 7), (8, 5), (5, 8), (3, 4, 5), (4, 3, 3, 2)]
KINDS = {name: entry.kind for name, entry in OPTIMIZERS.items()}
VARIANTS = {
    **{name: (kind, {}) for name, kind in KINDS.items()},
    "maxfactor cautious": (MaxFactor, {"momentum": 0.9, "nesterov": True, "cautious": True}),
    "maxfactor fam": (MaxFactor, {"momentum": FrequencyAdaptiveMomentum(bands=3)}),
    "maxfactor early": (MaxFactor.preset, {"name": "early"}),
    "maxfactor speech": (MaxFactor.preset, {"name": "speech"}),
    "maxfactor plain": (MaxFactor, {"max_norm": False, "full_matrix": True, "clip_threshold": 1.0}),
    "adafactor rate": (KINDS["adafactor"], {"learning_rate": 0.01, "weight_decay": 0.1}),
    "orthomaxfactor no momentum": (KINDS["orthomaxfactor"], {"momentum": 0}),
    "orthomaxfactor blocks": (KINDS["orthomaxfactor"], {"block": 3, "state_dtype": "float32"}),
    "maxfactor 8 bits": (MaxFactor, {"momentum": 0.8, "state_dtype": mx.int8}),
    "maxfactor 4 bits": (MaxFactor, {"momentum": 0.8, "state_dtype": "int4"}),
    "muon no momentum": (KINDS["muon"], {"momentum": 0.0}),
    "muon 8 bits": (KINDS["muon"], {"block": 3, "state_dtype": mx.int8}),
    "muon polar": (KINDS["muon"], {"method": "polar_express", "scale": "rms"}),
    "adamw 8 bits": (KINDS["adamw"], {"learning_rate": 1e-3, "state_dtype": mx.int8}),
    "adamw factored": (KINDS["adamw"], {"factored": True, "state_dtype": "int4"}),
    "signsgd sparse": (KINDS["signsgd"], {"sparse_rows": True}),
}
# Those whose kernels differ
COMPILED = ["orthomaxfactor", "maxfactor cautious", "adafactor rate", "muon 8 bits"]
COMPILED += ["adamw factored", "signsgd sparse", "maxfactor fam"]


def variant(name, **overrides):
    kind, options = VARIANTS[name]
    return kind(**{**options, **overrides})


@pytest.fixture(params=VARIANTS)
def make(request):
    """A function that builds one of the variants; its arguments override the variant's options."""
    return partial(variant, request.param)


def arrays_of(optimizer, dtype, seed=0):
    """An array of each shape that the optimizer takes."""
    refuses_vectors = type(optimizer).__name__ in ("Muon", "OrthoMaxFactor")
    shapes = [shape for shape in SHAPES if len(shape) > 1 or not refuses_vectors]
    return {str(shape): mx.array(parameter(shape, seed)).astype(dtype) for shape in shapes}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_update_keeps_shapes_and_dtypes_and_state_has_its_own_dtypes(make, dtype):
    optimizer = make()
    p, g = arrays_of(optimizer, dtype), arrays_of(optimizer, dtype, seed=1)
    kept = flat([p, g])
    tree = p
    for _ in range(3):
        tree = optimizer.apply_gradients(g, tree)
    assert all((x.dtype, str(x.shape)) == (dtype, path) for path, x in tree.items())
    name = getattr(optimizer, "state_dtype", "float32")
    moment = {"int4": mx.uint32, "int8": mx.int8, "bfloat16": mx.bfloat16}
    own = {"key": mx.uint32, "m": moment.get(name, mx.float32)}
    own["m_scale"] = mx.uint8 if name == "int4" else mx.bfloat16
    for path in p:
        for key, array in tree_flatten(optimizer.state[path]):
            assert array.dtype == own.get(key, mx.float32), (path, key)
    assert same(flat([p, g]), kept), "an array of the caller changed"


NOISE, ONE = parameter((6, 5)), np.eye(6, 5) * (np.arange(5) == 0)
GRADIENTS = {
    "zero": np.zeros((6, 5)),
    "dead row": NOISE * (np.arange(6) > 0)[:, None],
    "dead column": NOISE * (np.arange(5) > 0),
    "one element": ONE,
    "huge": np.sign(NOISE) * 3e38,
    "huge and tiny": 10.0 ** np.linspace(-38, 38, 30).reshape(6, 5),
    "tiny": NOISE * 1e-37,
    "one element whose square underflows": ONE * 3e-22,
    "row whose squares underflow": NOISE * (np.arange(6) == 1)[:, None] * 1e-22,
    "column whose squares underflow": NOISE * (np.arange(5) == 1) * 1e-21,
    "squares around the smallest float32": 10.0 ** -np.linspace(18, 24, 30).reshape(6, 5),
    "subnormal": np.full((6, 5), 1e-42),
    "1e-4": np.full((6, 5), 1e-4),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_finite_gradient_gives_finite_parameters_and_state(make, dtype):
    # MLX's Adafactor returns NaN for fp16 zeros, for a dead row and for 1e-4.
    limit = {mx.float16: 65504.0}.get(dtype, 3.38e38)
    clipped = {kind: np.clip(x, -limit, limit) for kind, x in GRADIENTS.items()}
    g = {kind: mx.array(x.astype(np.float32)).astype(dtype) for kind, x in clipped.items()}
    assert all(mx.all(mx.isfinite(x)).item() for x in g.values())
    optimizer, tree = make(), dict.fromkeys(g, mx.array(NOISE).astype(dtype))
    for sign in (1, 1, -1, 0, 1):
        tree = optimizer.apply_gradients({kind: sign * x for kind, x in g.items()}, tree)
        for path, array in tree_flatten({"p": tree, "state": optimizer.state}):
            assert mx.all(mx.isfinite(array)).item(), path


def test_empty_and_integer_arrays_are_not_changed(make):
    optimizer = make()
    tree = {"empty": mx.zeros((0, 3)), "index": mx.array([[3, 1]]), "w": mx.ones((2, 3))}
    moved = optimizer.apply_gradients(tree, tree)
    assert moved["empty"].shape == (0, 3)
    assert (moved["index"].dtype, moved["index"].tolist()) == (mx.int32, [[3, 1]])
    assert not mx.array_equal(moved["w"], tree["w"]).item()


def test_lazy_init_does_not_read_the_gradients(make):
    # MLX calls init lazily and passes gradients to init_single.
    tree = {"w": mx.ones((4, 3))}
    gradients = {"w": mx.full((4, 3), 5.0, mx.float16)}
    lazy, eager = make(), make()
    eager.init(tree)
    lazy.init(gradients)
    assert dtypes(lazy.state) == dtypes(eager.state)
    assert same(flat(lazy.state), flat(eager.state))


def test_parameters_unfrozen_after_init_are_updated(make):
    # MLX's optimizers raise a KeyError here.
    optimizer, p, g = make(), mx.array(parameter((4, 3))), mx.array(parameter((4, 3), 1))
    optimizer.apply_gradients({"layers": [{}, {"w": g}]}, {"layers": [{"w": p}, {"w": p}]})
    trees = [{"layers": [{"w": x}, {"w": x}], "head": {"w": x}} for x in (g, p)]
    moved = optimizer.apply_gradients(*trees)
    assert not mx.array_equal(moved["layers"][0]["w"], p).item()
    assert not mx.array_equal(moved["head"]["w"], p).item()
    moved = optimizer.apply_gradients({"layers": [{"w": g}, {}]}, {"layers": [{"w": p}, {"w": p}]})
    assert moved["layers"][1] == {}


def test_fp16_parameters_stay_finite_at_their_limit(make):
    p = {"w": mx.full((4, 4), 65504.0, mx.float16)}
    for _ in range(3):
        optimizer = make()
        p = optimizer.apply_gradients({"w": mx.full((4, 4), -1.0, mx.float16)}, p)
        assert mx.all(mx.isfinite(p["w"])).item()


def test_assigned_state_is_copied_and_must_be_complete(make):
    a, b, tree = make(learning_rate=lambda s: 0.1), make(learning_rate=0.1), {"w": mx.ones((2, 3))}
    b.apply_gradients(tree, tree)
    a.state = b.state
    before = flat(a.state)
    b.apply_gradients(tree, tree)
    assert same(flat(a.state), before)
    a.apply_gradients(tree, tree)
    with pytest.raises(ValueError, match="state must hold step and learning_rate"):
        a.state = {}


def test_only_a_frozen_module_can_be_called_step(make):
    optimizer = make()
    tree = {"step": {}, "w": mx.ones((2, 3))}
    optimizer.apply_gradients(tree, tree)
    assert optimizer.step.item() == 1
    with pytest.raises(ValueError, match="'step' is reserved by the optimizer"):
        make().init({"step": mx.zeros((2, 2))})


# Rates


def test_schedule_advances_until_a_rate_is_set_by_hand(make):
    # MLX's optimizers overwrite a rate set by hand at the next update.
    optimizer, tree = make(learning_rate=lambda step: 0.5 / (step + 1)), {"w": mx.ones((3, 3))}
    for t in range(1, 4):
        tree = optimizer.apply_gradients({"w": mx.ones((3, 3))}, tree)
        assert optimizer.learning_rate.item() == pytest.approx(0.5 / t)
    optimizer.learning_rate = 0.125
    tree = optimizer.apply_gradients({"w": mx.ones((3, 3))}, tree)
    assert optimizer.learning_rate.item() == 0.125
    optimizer.learning_rate = lambda step: step * 1.0
    optimizer.apply_gradients({"w": mx.ones((3, 3))}, tree)
    assert optimizer.learning_rate.item() == 4.0
    with pytest.raises(ValueError, match="learning_rate must be in"):
        optimizer.learning_rate = -1.0


@pytest.mark.compiled
@pytest.mark.parametrize("name", ["orthomaxfactor", "adafactor"])
def test_rate_set_by_hand_reaches_a_compiled_step(name):
    optimizer = variant(name, learning_rate=lambda step: 0.5 / (step + 1))
    tree = {"w": mx.ones((3, 3))}
    optimizer.init(tree)
    state = optimizer.state
    step: Any = mx.compile(optimizer.apply_gradients, inputs=state, outputs=state)
    for rate in (0.5, 0.25, 0.125):
        if rate == 0.125:
            optimizer.learning_rate = rate
        mx.eval(step(tree, tree), optimizer.state)
        assert optimizer.learning_rate.item() == pytest.approx(rate)


# Compilation and state


def regression(seed=0):
    """A model that every bare optimizer accepts, and its loss on fixed data."""
    mx.random.seed(seed)
    model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Tanh(), nn.Linear(16, 4, bias=False))
    x = mx.random.normal((64, 8))
    return model, lambda m: ((m(x) - mx.sin(3 * x[:, :4])) ** 2).mean()


def train(model, loss, optimizer, steps, compiled=False):
    traces = []

    def step():
        traces.append(None)
        value, gradients = nn.value_and_grad(model, loss)(model)
        optimizer.update(model, gradients)
        return value

    state = [model.state, optimizer.state]
    run: Any = mx.compile(step, inputs=state, outputs=state) if compiled else step
    losses = []
    for _ in range(steps):
        losses.append(run().item())
        mx.eval(state)
    return losses, len(traces)


def close(a, b, tolerance):
    return all(np.allclose(a[path], b[path], rtol=0, atol=tolerance) for path in a)


def build(name, routed=True):
    """A model, its loss and its optimizer with state, routed or bare."""
    model, loss = regression()
    schedule = warmup_cosine(0.01, 20, 5, start_ratio=0.2)
    optimizer = variant(name, learning_rate=schedule)
    if routed:
        optimizer = create_optimizer(model, optimizer, "adamw", rest_learning_rate=schedule)
    else:
        optimizer.init(model.trainable_parameters())
    return model, loss, optimizer


@pytest.mark.compiled
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_equals_eager_in_one_trace(name):
    eager, compiled = build(name), build(name)
    losses, _ = train(*eager, steps=10)
    same, traces = train(*compiled, steps=10, compiled=True)
    assert traces == 1
    # Fused kernels round in another order: a few times 6e-8 a step on parameters below 1. Muon's
    # five quintics amplify this by up to 3.4 each.
    assert np.allclose(losses, same, rtol=1e-4)
    assert close(flat(eager[0].parameters()), flat(compiled[0].parameters()), 2e-5)


@pytest.mark.compiled
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_update_keeps_no_large_constants(name):
    optimizer, p = variant(name), {"w": mx.random.normal((256, 300))}
    optimizer.init(p)
    state = optimizer.state
    update = mx.compile(optimizer.apply_gradients, inputs=state, outputs=state)
    mx.eval(p, state)
    before = mx.get_active_memory()
    mx.eval(update(p, p), state)  # the new weights are dropped
    assert mx.get_active_memory() - before < 0.05 * p["w"].nbytes


@pytest.mark.compiled
@pytest.mark.parametrize("routed", [False, True], ids=["bare", "routed"])
def test_assigned_state_reaches_a_compiled_step(routed):
    # MLX ignores `optimizer.state = loaded` after mx.compile has captured the old state.
    model, loss, optimizer = build("orthomaxfactor", routed)
    start = tree_map(lambda a: a, model.parameters())
    saved = copy.deepcopy(optimizer.state)

    def step():
        value, gradients = nn.value_and_grad(model, loss)(model)
        optimizer.update(model, gradients)
        return value

    state = [model.state, optimizer.state]
    run = mx.compile(step, inputs=state, outputs=state)

    def five():
        for _ in range(5):
            mx.eval(run(), state)
        return flat(model.parameters())

    first = five()
    optimizer.state = saved
    model.update(start)
    assert same(first, five())
    assert optimizer.step.item() == 5


def test_training_lowers_the_loss(make):
    model, loss = regression()
    rate = {"SignSGD": 0.003, "AdamW": 0.01}.get(type(make()).__name__, 0.03)
    optimizer = make(learning_rate=warmup_cosine(rate, 200, 10))
    if getattr(optimizer, "relative_step", False) and isinstance(optimizer, MaxFactor):
        # α = min(η, 1e-6 · t · RMS(p)): the published warm-up makes tiny steps for 10^4 steps.
        optimizer.init(model.trainable_parameters())
        optimizer.state["step"] = mx.array(10_000, mx.uint64)
        optimizer.learning_rate = 0.01
    losses, _ = train(model, loss, optimizer, 200)
    assert losses[-1] < 0.75 * losses[0]


@pytest.mark.compiled
# Experts and transposed LoRA matrices; the kernels of convolutions.
@pytest.mark.parametrize(
    ("name", "hidden", "shape"),
    [("lora_moe", "adafactor", (2, 9)), ("resnet", "orthomaxfactor", (2, 8, 8, 3))],
)
def test_real_shapes_compile_once_and_equal_eager(name, hidden, shape):
    tokens = mx.random.randint(0, 50, shape, key=mx.random.key(0))
    x, results = tokens / 25 - 1 if name == "resnet" else tokens, []
    for compiled in (False, True):
        mx.random.seed(0)
        model = CASES_BY_NAME[name].build()
        optimizer = create_optimizer(model, hidden, learning_rate=2e-3)
        loss = lambda model: (model(x) - 1).square().mean()  # noqa: E731
        losses, traces = train(model, loss, optimizer, 3, compiled)
        assert not compiled or traces == 1
        results.append(losses)
    # Sign-like steps amplify the last bit of a gradient near 0; losses are near 1.
    assert np.allclose(*results, rtol=1e-3)


WRAPPED = [
    *((name, "routed") for name in VARIANTS),
    *((name, wrapper) for name in COMPILED[:4] for wrapper in ("bare", "guarded", "scheduled")),
]


@pytest.fixture(params=WRAPPED, ids=", ".join)
def wrapped(request):
    """A function that builds an optimizer for `Table`: bare, guarded or routed."""
    name, wrapper = request.param
    if wrapper == "bare":
        return partial(variant, name)
    if wrapper == "guarded":
        return lambda: GuardedOptimizer(variant(name), max_grad_norm=1.0)
    options = {"rounding": "stochastic", "skip_nonfinite": True}
    options["total_steps"] = 50 if wrapper == "scheduled" else None
    return lambda: create_optimizer(Table(), variant(name), **options)


def matrix(seed=0, dtype=mx.float32):
    return {"linear1": {"weight": mx.array(parameter((128, 64), seed)).astype(dtype)}}


def weight(tree):
    return tree["linear1"]["weight"]


def reloaded(optimizer, make, path):
    mx.save_safetensors(path, dict(tree_flatten(optimizer.state)))
    other = make()
    other.state = tree_unflatten(list(mx.load(path).items()))
    return other


COPIES = {
    "deepcopy": lambda optimizer, *_: copy.deepcopy(optimizer),
    "pickle": lambda optimizer, *_: pickle.loads(pickle.dumps(optimizer)),
    "file of mlx": reloaded,
}


@pytest.mark.parametrize("kind", COPIES)
def test_copy_trains_like_the_original_and_shares_no_array(wrapped, kind, tmp_path):
    optimizer, tree = wrapped(), matrix()
    for seed in range(3):
        tree = optimizer.apply_gradients(matrix(seed), tree)
    other = COPIES[kind](optimizer, wrapped, str(tmp_path / "state.safetensors"))
    trees = [tree, tree]
    for i, each in enumerate((optimizer, other)):
        for seed in range(3, 6):
            trees[i] = each.apply_gradients(matrix(seed), trees[i])
    assert mx.array_equal(*map(weight, trees)).item()
    assert same(flat(optimizer.state), flat(other.state))
    theirs = dict(tree_flatten(other.state))
    assert all(array is not theirs[key] for key, array in tree_flatten(optimizer.state))


def test_update_without_parameters_only_advances_the_schedule(wrapped):
    optimizer = wrapped()
    optimizer.init(matrix())
    before = flat(optimizer.state)
    optimizer.update({}, {})
    optimizer.update(nn.Module(), {})
    assert optimizer.step.item() == 2
    for path, array in flat(optimizer.state).items():
        assert path.endswith(("step", "learning_rate")) or np.array_equal(array, before[path])


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize("given", [mx.float32, mx.float16], ids=str)
def test_gradient_can_have_another_dtype(wrapped, dtype, given):
    """Its values are used, but weights and state keep their own dtypes."""
    plain, cast = wrapped(), wrapped()
    trees = [matrix(dtype=dtype), matrix(dtype=dtype)]
    for optimizer in (plain, cast):
        optimizer.init(trees[0])
    before = dtypes(plain.state)
    for seed in range(1, 4):
        g = matrix(seed, given)
        trees[0] = plain.apply_gradients(g, trees[0])
        trees[1] = cast.apply_gradients(tree_map(lambda g: g.astype(mx.float32), g), trees[1])
    assert weight(trees[0]).dtype == dtype
    assert dtypes(plain.state) == before
    assert mx.array_equal(*map(weight, trees)).item()


def test_model_can_mix_dtypes(make):
    optimizer, alone = make(), {dtype: make() for dtype in DTYPES}
    tree = {str(dtype): weight(matrix(1, dtype)) for dtype in DTYPES}
    moved = optimizer.apply_gradients(tree, tree)
    for dtype, other in alone.items():
        one = {"p": tree[str(dtype)]}
        assert moved[str(dtype)].dtype == dtype
        assert mx.array_equal(moved[str(dtype)], other.apply_gradients(one, one)["p"]).item()


VIEWS = {
    "transposed": lambda x: mx.contiguous(x.T).T,
    "every other": lambda x: mx.repeat(mx.repeat(x, 2, 0), 2, -1)[::2, ..., 1::2],
    "reversed": lambda x: mx.contiguous(x[::-1, ..., ::-1])[::-1, ..., ::-1],
}


@pytest.mark.parametrize("view", VIEWS)
def test_views_give_the_same_update(make, view):
    shapes = [(6, 70), (1, 5), (3, 1), (1, 1), (2, 4, 5), (1, 1, 1)]
    p, g = ({str(s): mx.array(parameter(s, seed)) for s in shapes} for seed in (0, 1))
    results = []
    for see in (lambda x: x, VIEWS[view]):
        optimizer, tree, gradients = make(), tree_map(see, p), tree_map(see, g)
        for _ in range(3):
            tree = optimizer.apply_gradients(gradients, tree)
        results.append(tree)
    for shape, array in results[0].items():
        assert np.allclose(array, results[1][shape], rtol=1e-5, atol=1e-6), shape


def test_failed_update_changes_nothing(wrapped):
    optimizer = wrapped()
    optimizer.init(matrix())
    if not any(x.size > 2 for path, x in tree_flatten(optimizer.state) if "linear1.weight" in path):
        pytest.skip("this optimizer keeps no state for a matrix")
    tree = matrix() | {"output": {"weight": mx.array(parameter((10, 64)))}}
    tree = optimizer.apply_gradients(tree, tree)
    before = copy.deepcopy(optimizer)
    grown = {"linear1": {"weight": mx.ones((130, 70))}, "output": tree["output"]}
    with pytest.raises(ValueError, match=r"linear1\.weight \(130, 70\), gradient \(130, 70\): "):
        optimizer.apply_gradients(grown, grown)
    assert same(flat(optimizer.state), flat(before.state))
    assert optimizer.step.item() == 1


def test_error_names_the_parameter_with_incomplete_state():
    optimizer = create_optimizer(Table(), "muon")
    states = optimizer.state["states"]
    del next(s for s in states if s.get("output", {}).get("weight"))["output"]["weight"]["v"]
    tree = Table().parameters()
    message = "output.weight (10, 64), gradient (10, 64): its state has no 'row'; create the "
    with pytest.raises(ValueError, match=re.escape(message + "optimizer again if")):
        optimizer.apply_gradients(tree, tree)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_subclass_can_use_the_method_signatures_of_mlx(name):
    class Doubled(KINDS[name]):
        def init_single(self, parameter, state):  # pyright: ignore[reportIncompatibleMethodOverride]
            super().init_single(parameter, state)

        def apply_single(self, gradient, parameter, state):  # pyright: ignore[reportIncompatibleMethodOverride]
            return parameter + 2 * (super().apply_single(gradient, parameter, state) - parameter)

    plain, doubled = KINDS[name](0.1), Doubled(0.1)
    moved = [weight(o.apply_gradients(matrix(1), matrix())) for o in (plain, doubled)]
    steps = [np.array(w - weight(matrix())) for w in moved]
    assert np.allclose(2 * steps[0], steps[1], atol=1e-5)
    assert np.any(steps[0])
