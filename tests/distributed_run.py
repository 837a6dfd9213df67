"""Steps on each of several ranks, started by test_distributed.py; prints a line of JSON a case.

python distributed_run.py CASE...
"""

import hashlib
import json
import sys

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_maxfactor import create_optimizer


class Model(nn.Module):
    """An embedding, four hidden layers of two matrices, norms, a head."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(101, 32)
        self.up = [nn.Linear(32, 64) for _ in range(4)]
        self.down = [nn.Linear(64, 32) for _ in range(4)]
        self.norm, self.head = nn.RMSNorm(32), nn.Linear(32, 11)

    def __call__(self, tokens):
        x = self.embedding(tokens)
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(nn.gelu(up(x)))
        return self.head(self.norm(x))


def build(dtype=mx.float32):
    mx.random.seed(0)
    model = Model()
    model.set_dtype(dtype)
    return model


def gradients_of(model, step, rank):
    """Of a batch that depends on the step and the rank alone."""
    tokens = mx.random.randint(0, 101, (4, 8), key=mx.random.key(100 * step + rank))
    loss = lambda: nn.losses.cross_entropy(model(tokens), tokens % 11, reduction="mean")  # noqa: E731
    return nn.value_and_grad(model, loss)()[1]


def bits_of(tree):
    """A digest of every bit of a tree."""
    digest = hashlib.sha256()
    for path, array in sorted(tree_flatten(tree)):
        digest.update(path.encode() + np.array(array.reshape(-1).view(mx.uint8)).tobytes())
    return digest.hexdigest()


def data_parallel(group):
    """Steps without shards: every rank makes each update for itself."""
    model = build(mx.bfloat16)
    optimizer = create_optimizer(model, rounding="stochastic", max_grad_norm=1.0)
    before = bits_of(model.parameters())

    def step(model, gradients):
        optimizer.update(model, nn.average_gradients(gradients, group))
        mx.eval(model.state, optimizer.state)

    own = []
    for i in range(5):
        gradients = gradients_of(model, i, group.rank())
        own.append(bits_of(gradients))
        step(model, gradients)
    return {
        "moved": bits_of(model.parameters()) != before,
        "own": own,
        "parameters": bits_of(model.parameters()),
        "state": bits_of(optimizer.state),
    }


CASES = {"data_parallel": data_parallel}

if __name__ == "__main__":
    group = mx.distributed.init(strict=True, backend="ring")
    for name in sys.argv[1:]:
        print(json.dumps({"case": name, **CASES[name](group)}), flush=True)
