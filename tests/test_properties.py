"""Finite inputs stay finite: hypothesis picks shapes, dtypes, gradients and options."""

import mlx.core as mx
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from mlx_maxfactor import OPTIMIZERS, FrequencyAdaptiveMomentum, GuardedOptimizer

LIMITS = {mx.float32: 3.38e38, mx.bfloat16: 3.38e38, mx.float16: 65504.0}

shapes = st.lists(st.integers(0, 6), min_size=0, max_size=4).map(tuple)
magnitudes = st.sampled_from(
    [0.0, 1e-45, 1e-38, 1e-30, 3e-22, 1e-20, 1e-8, 1.0, 1e4, 1e15, 1e20, 3e38]
)
MAXFACTOR = [{}, {"momentum": 0.9, "nesterov": True, "cautious": True}]
MAXFACTOR += [{"max_norm": False, "momentum": 0.9}]
MAXFACTOR += [{"momentum": FrequencyAdaptiveMomentum(bands=3, blend_steps=2)}]
MAXFACTOR += [{"full_matrix": True, "clip_threshold": 1e-3, "d": 1e-3}]
MAXFACTOR += [{"relative_step": True, "vector_sign": True, "scalar_boost": None}]
MAXFACTOR += [{"eps": (1e-15, 0.0), "gamma": 0.0, "beta2_bounds": (0.0, 1.0)}]
ORTHOMAXFACTOR = [{}, {"block": 2, "state_dtype": "float32"}, {"momentum": 0.0, "min_rms": 0}]
ORTHOMAXFACTOR += [{"state_dtype": "int8", "nesterov": False, "eps": 1e-15}]
ADAMW = [{}, {"betas": (0.0, 0.0), "bias_correction": False}]
ADAMW += [{"state_dtype": "int4", "factored": True}]
OPTIONS = {
    "maxfactor": MAXFACTOR,
    "orthomaxfactor": ORTHOMAXFACTOR,
    "adafactor": [{}, {"learning_rate": 0.1, "weight_decay": 0.1, "clip_threshold": 10.0}],
    "signsgd": [{}, {"sparse_rows": True}],
    "muon": [{}, {"method": "polar_express", "scale": "rms"}, {"nesterov": False, "momentum": 0.0}],
    "adamw": ADAMW,
}
layouts = st.sampled_from(["batched", "experts", "conv", "transposed"])


@st.composite
def cases(draw):
    name = draw(st.sampled_from(sorted(OPTIMIZERS)))
    shape = draw(shapes.filter(lambda s: name not in ("muon", "orthomaxfactor") or len(s) > 1))
    options = dict(draw(st.sampled_from(OPTIONS[name])))
    options["rounding"] = draw(st.sampled_from(["nearest", "stochastic"]))
    dtype = draw(st.sampled_from(list(LIMITS)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    p = rng.uniform(-1, 1, shape) * draw(st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 1e4]))
    gradients = []
    for _ in range(draw(st.integers(1, 4))):
        g = rng.normal(size=shape) * draw(magnitudes)
        if len(shape) > 1 and draw(st.booleans()):
            g = g * (rng.random(shape[:-1]) < 0.5)[..., None]  # dead rows
            g = g * (rng.random(shape[-1:]) < 0.5)  # dead columns
        gradients.append(np.clip(g, -LIMITS[dtype], LIMITS[dtype]))
    return name, options, dtype, p, gradients, draw(layouts)


def cast(x, dtype):
    return mx.array(np.asarray(x, np.float32)).astype(dtype)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(cases())
def test_finite_gradients_keep_parameters_and_state_finite(case):
    name, options, dtype, p, gradients, layout = case
    optimizer = OPTIMIZERS[name].kind(**options)
    optimizer.layouts["p"] = layout
    tree = {"p": cast(p, dtype)}
    for g in gradients:
        tree = optimizer.apply_gradients({"p": cast(g, dtype)}, tree)
        assert (tree["p"].shape, tree["p"].dtype) == (np.shape(p), dtype)
        for path, array in tree_flatten({"p": tree["p"], "state": optimizer.state}):
            assert mx.all(mx.isfinite(array.astype(mx.float32))).item(), path


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(cases(), st.sampled_from([float("inf"), -float("inf"), float("nan")]), st.integers(0))
def test_step_with_nonfinite_gradients_changes_nothing(case, poison, position):
    name, options, dtype, p, gradients, layout = case
    if p.size == 0:
        return
    member = OPTIMIZERS[name].kind(**options)
    member.layouts["p"] = layout
    optimizer = GuardedOptimizer(member, max_grad_norm=1.0)
    tree = {"p": cast(p, dtype)}
    for count, g in enumerate(gradients, start=1):
        tree = optimizer.apply_gradients({"p": cast(g, dtype)}, tree)
        before = dict(tree_flatten({"tree": tree, "state": member.state}))
        bad = np.array(g)
        bad.reshape(-1)[position % bad.size] = poison
        tree = optimizer.apply_gradients({"p": cast(bad, dtype)}, tree)
        for path, array in tree_flatten({"tree": tree, "state": member.state}):
            assert mx.array_equal(array, before[path]).item(), path
        assert optimizer.skipped.item() == count
