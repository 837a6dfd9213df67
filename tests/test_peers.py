"""AdamW, Muon, Adafactor and SignSGD against torch.optim and mlx.optimizers.

The torch cases are those of torch's own test suite on a CPU (``optim_inputs_func_*`` in
``torch.testing._internal.common_optimizers``), with more options where that list is short. They
are copied, because that module needs packages that are not installed. Both sides get the same
gradients. torch in float64 is the exact answer: a float64 twin must equal it within float64
rounding, and our optimizer within float32 rounding.
"""

from functools import partial

import mlx.core as mx
import mlx.optimizers as peers
import numpy as np
import pytest
from trajectories import BOUND, distance, hard_gradients, parameter, trajectory, twin_trajectory

from mlx_maxfactor import Adafactor, AdamW, Muon, SignSGD, reference

STEPS = 30
SHAPES = [(10, 5), (3, 4, 5), (1, 7), (7, 1), (10,), (1,), ()]
"""torch's own suite uses (10, 5) and (10,)."""

MATRICES = [(10, 5), (5, 10), (32, 32), (1, 7), (7, 1)]

TWIN_BOUND = 1e-12
"""The bound on ``distance`` between two float64 trajectories. 30 roundings of p are 3e-15, and
Newton–Schulz multiplies the rounding of small singular values by up to 3.4445^6 = 1700."""

# amsgrad is left out: ours has none.
ADAMW = [{}, {"lr": 0.01}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "maximize": True}]
ADAMW += [{"betas": (0.9, 0.99)}, {"betas": (0.0, 0.999), "eps": 1e-3}]
ADAMW += [{"betas": (0.95, 0.0), "eps": 1e-6, "weight_decay": 0.0}]

# ns_coefficients is left out: ours has two named methods. torch has no maximize here.
MUON = [{}, {"lr": 0.01}, {"weight_decay": 0.2}, {"momentum": 0.8}, {"ns_steps": 6}]
MUON += [{"momentum": 0.0, "weight_decay": 0.0}, {"nesterov": False}]
MUON += [{"lr": 0.01, "adjust_lr_fn": "match_rms_adamw"}]

# A rate of 0.5 is above 1/√t from the fifth step on.
ADAFACTOR = [{}, {"lr": 0.01, "weight_decay": 0.1}, {"weight_decay": 0.1, "maximize": True}]
ADAFACTOR += [{"beta2_decay": -1.0}, {"d": 1.5}, {"lr": 0.5}]
ADAFACTOR += [{"lr": 1e-3, "eps": (1e-30, 0.5), "beta2_decay": -0.3}]


# From torch's options and defaults to ours


def adamw_options(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, maximize=False):
    return {"learning_rate": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}


def muon_options(
    lr=1e-3, weight_decay=0.1, momentum=0.95, nesterov=True, ns_steps=5, adjust_lr_fn="original"
):
    scale = {"original": "spectral", "match_rms_adamw": "rms"}[adjust_lr_fn]
    options = {"learning_rate": lr, "weight_decay": weight_decay, "momentum": momentum}
    return options | {"nesterov": nesterov, "steps": ns_steps, "scale": scale}


def adafactor_options(eps=(1e-30, 1e-3), d=1.0, beta2_decay=-0.8, weight_decay=0.0, **_):
    options = {"eps": eps, "clip_threshold": d, "decay_rate": beta2_decay}
    return options | {"weight_decay": weight_decay}


def adafactor_with_torchs_rate(lr=1e-2, **case):
    """An Adafactor with torch's rate: relative, and at most 1/√t."""
    optimizer = Adafactor(**adafactor_options(**case))
    if lr != 1e-2:
        optimizer.learning_rate = lambda step: mx.minimum(lr, mx.rsqrt(step.astype(mx.float32) + 1))
    return optimizer


# Trajectories


@pytest.fixture(scope="session")
def torch():
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)  # two threads take longer for matrices this small
    return torch


def ascent_gradients(gradients, case):
    """Our optimizers have no ``maximize``: users negate the gradient instead."""
    return [-g for g in gradients] if case.get("maximize") else gradients


def torch_trajectory(torch, build, start, gradients, bits=64, before=None):
    """The parameter after each step of torch; ``before(group, p)`` may change a step's options."""
    dtype = {32: torch.float32, 64: torch.float64}[bits]
    p, points = torch.nn.Parameter(torch.tensor(start, dtype=dtype)), []
    peer = build([p])
    for g in gradients:
        if before:
            before(peer.param_groups[0], p)
        p.grad = torch.tensor(g, dtype=dtype)
        peer.step()
        points.append(p.detach().numpy().copy())
    return np.stack(points)


def mlx_trajectory(peer, start, gradients):
    tree, points = {"p": mx.array(start)}, []
    for g in gradients:
        tree = peer.apply_gradients({"p": mx.array(g)}, tree)
        points.append(np.array(tree["p"]))
    return np.stack(points)


def plain_gradients(shape, steps=STEPS, seed=1):
    """Gradients from 1e-2 to 1e2, without zeros, so that all exceed the peers' eps."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(steps, *shape))
    noise = np.sign(noise) * np.maximum(np.abs(noise), 0.1)
    size = 10.0 ** rng.uniform(-1, 2, steps)
    return list((noise * size.reshape(-1, *[1] * len(shape))).astype(np.float32))


def assert_close(ours, exact, start, bound):
    assert np.max(np.abs(exact - start)) > 0, "the peer does not move: the test cannot fail"
    assert distance(ours, exact) < bound


# AdamW


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("case", ADAMW, ids=str)
def test_adamw_follows_torch(torch, case, shape):
    start, gradients = parameter(shape), hard_gradients(shape, STEPS)
    options, ascent = adamw_options(**case), ascent_gradients(gradients, case)
    ours = trajectory(AdamW(**options), start, ascent)
    twin = twin_trajectory(reference.AdamW(**options), start, ascent)

    def build(parameters):
        return torch.optim.AdamW(parameters, **case)

    exact = torch_trajectory(torch, build, start, gradients)
    assert_close(twin, exact, start, TWIN_BOUND)
    assert_close(ours, exact, start, BOUND)
    # In float32 both sides round.
    assert_close(ours, torch_trajectory(torch, build, start, gradients, bits=32), start, 2 * BOUND)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias_correction", [True, False])
@pytest.mark.parametrize("case", ADAMW, ids=str)
def test_adamw_follows_mlx(case, bias_correction, shape):
    start, gradients = parameter(shape), ascent_gradients(hard_gradients(shape, STEPS), case)
    options = {**adamw_options(**case), "bias_correction": bias_correction}
    # Both sides round. MLX's 1 - 0.999^t also has a relative error of 6e-5 at the first step, less
    # later: with rates up to 0.01 that is 3e-7 of a parameter near 1.
    theirs = mlx_trajectory(peers.AdamW(**options), start, gradients)
    assert_close(trajectory(AdamW(**options), start, gradients), theirs, start, 2 * BOUND)


# Muon


def orthogonalize_without_bf16(torch, patch):
    """Make torch orthogonalize in the gradient's own dtype instead of in bf16."""
    patch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)


@pytest.mark.parametrize("shape", MATRICES, ids=str)
@pytest.mark.parametrize("case", MUON, ids=str)
def test_muon_follows_torch(torch, monkeypatch, case, shape):
    # torch's m is a moving average and ours is a sum; orthogonalization removes the factor.
    start, gradients = parameter(shape), plain_gradients(shape)
    ours = trajectory(Muon(**muon_options(**case)), start, gradients)
    twin = twin_trajectory(reference.Muon(**muon_options(**case)), start, gradients)

    def build(parameters):
        return torch.optim.Muon(parameters, **case)

    rounded = torch_trajectory(torch, build, start, gradients, bits=32)
    # Each iteration rounds to bf16, with relative error 2^-9, and the later ones multiply it by up
    # to 1.7 (the slope of the quintic). If all errors added up, they would be 2^-4; they do not.
    off = np.linalg.norm(ours[-1] - rounded[-1])
    assert off < 2**-5 * np.linalg.norm(ours[-1] - start)

    orthogonalize_without_bf16(torch, monkeypatch)
    exact = torch_trajectory(torch, build, start, gradients)
    assert_close(twin, exact, start, TWIN_BOUND)
    assert_close(ours, exact, start, BOUND)


# Adafactor


def torch_decay_equal_to_ours(case):
    """Change torch's λ so that its decay lr·λ equals ours, α·λ, where α is the relative rate."""
    lr, decay, (_, floor) = case["lr"], case.get("weight_decay", 0.0), case["eps"]
    step = 0

    def before(group, p):
        nonlocal step
        step += 1
        size = max(floor, p.detach().square().mean().sqrt().item())
        group["weight_decay"] = decay * size * min(lr, step**-0.5) / lr

    return before


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("case", ADAFACTOR, ids=str)
def test_adafactor_follows_torch(torch, case, shape):
    case = {"lr": 1e-2, "eps": (1e-30, 1e-3), **case}
    start, gradients = parameter(shape), hard_gradients(shape, STEPS)
    ascent = ascent_gradients(gradients, case)
    # Only in float64: in float32, torch computes 0 · inf for a dead row.
    build, before = partial(torch.optim.Adafactor, **case), torch_decay_equal_to_ours(case)
    exact = torch_trajectory(torch, build, start, gradients, before=before)
    assert_close(trajectory(adafactor_with_torchs_rate(**case), start, ascent), exact, start, BOUND)
    if case["lr"] == 1e-2:  # the default rate of the twin
        twin = twin_trajectory(reference.Adafactor(**adafactor_options(**case)), start, ascent)
        # torch uses max(V, ε₁²), ours g² + ε₁: 1e-30 compared with the smallest g², 1e-24.
        assert_close(twin, exact, start, 1e-6)


# SignSGD


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_signsgd_equals_mlx_lion_without_averages(decay, shape):
    start, gradients = parameter(shape), hard_gradients(shape, STEPS)
    lion = peers.Lion(0.01, betas=[0.0, 0.0], weight_decay=decay)
    theirs = mlx_trajectory(lion, start, gradients)
    ours = trajectory(SignSGD(0.01, weight_decay=decay), start, gradients)
    assert np.array_equal(ours, theirs)  # the same float32 operations in the same order
