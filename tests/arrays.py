"""Rates, random gradients, and all arrays of models and optimizers, bit for bit."""

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map


def rates(optimizer):
    return [member.learning_rate.item() for member in optimizer.optimizers]


def random_gradients(model, seed=0):
    keys = iter(mx.random.split(mx.random.key(seed), 500))
    return tree_map(
        lambda p: mx.random.normal(p.shape, key=next(keys)).astype(p.dtype),
        model.trainable_parameters(),
    )


def flat(tree):
    """Each array by its path, as NumPy's; NumPy has no bf16, so that is widened."""
    arrays = dict(tree_flatten(tree)).items()
    return {k: np.array(x.astype(mx.float32) if x.dtype == mx.bfloat16 else x) for k, x in arrays}


def dtypes(tree):
    return {path: x.dtype for path, x in tree_flatten(tree)}


def snapshot(model, optimizer):
    """Every array of a run, and the state of the random numbers."""
    return flat([model.parameters(), optimizer.state, {"random": mx.random.state[0]}])


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[path], b[path]) for path in a)
