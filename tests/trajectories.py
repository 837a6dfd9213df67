"""Gradients that strain float32, and loops that feed them to an optimizer or its float64 twin."""

import re

import mlx.core as mx
import numpy as np

SHAPES = [(32, 17), (3, 4, 5), (1, 7), (7,), (1,)]
"""A matrix, a stack, a single row, a vector, a single number."""


def label(value):
    """A test's id without addresses: ids must be the same in all of pytest's processes."""
    text = re.sub(r"<(?:function )?(\S+).*? at 0x\w+>", r"\1", str(value))
    return text.replace("<lambda>", "lambda")


def parameter(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def hard_gradients(shape, steps=40, seed=1):
    """Gradients from 1e-12 to 1e6: a new magnitude each step, with zero rows and all-zero steps."""
    rng = np.random.default_rng(seed)
    gradients = []
    for t in range(steps):
        g = rng.normal(size=shape) * 10.0 ** rng.uniform(-12, 6)
        if len(shape) > 1 and shape[-2] > 1:
            g[..., rng.integers(shape[-2]), :] = 0.0
        gradients.append((g * (t % 13 != 12)).astype(np.float32))
    return gradients


def trajectory(optimizer, start, gradients, layout="batched"):
    """The parameter after each update by one of our optimizers."""
    optimizer.layouts["p"] = layout
    tree, points = {"p": mx.array(start)}, []
    for g in gradients:
        tree = optimizer.apply_gradients({"p": mx.array(g)}, tree)
        points.append(np.array(tree["p"].astype(mx.float32)))
    return np.stack(points)


def twin_trajectory(twin, start, gradients, layout="batched"):
    """The parameter after each update by a float64 twin from mlx_maxfactor/reference.py."""
    p, points = np.float64(start), []
    for g in gradients:
        p = twin.update(p, np.float64(g), layout)
        points.append(p)
    return np.stack(points)


def distance(points, exact):
    """Largest distance over the largest parameter: each float32 rounding of p adds up to 6e-8."""
    return np.max(np.abs(points - exact)) / np.max(np.abs(exact))


BOUND = 5e-6
"""The bound on ``distance`` over 40 steps. Rounding p once a step adds up to 40 · 6e-8 = 2.4e-6 in
the worst case. Rounding the statistics and the update, with steps of at most 5 % of p, adds as much
again."""


def assert_follows(optimizer, twin, shape, layout="batched", zero=False, seed=0, bound=BOUND):
    """Assert that the optimizer follows its twin, starting from noise or from zero."""
    start = parameter(shape, seed) * (not zero)
    gradients = hard_gradients(shape, seed=seed + 10)
    exact = twin_trajectory(twin, start, gradients, layout)
    assert np.max(np.abs(exact[-1] - start)) > 0, "the twin does not move: the test cannot fail"
    assert distance(trajectory(optimizer, start, gradients, layout), exact) < bound
