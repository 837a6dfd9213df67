"""Steps on several ranks, started by test_distributed.py. Each case prints one line of JSON.

python distributed_run.py CASE...
"""

import hashlib
import json
import math
import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as mlx_optimizers
import numpy as np
from arrays import flat
from communication import bytes_sent, cost_of, nbytes_of
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlx_maxfactor import (
    CheckpointError,
    create_optimizer,
    load_checkpoint,
    save_checkpoint,
    warmup_cosine,
)
from mlx_maxfactor.distributed import collectives
from mlx_maxfactor.distributed.collectives import OrderedCollectives

STEPS = 4


class Rank(NamedTuple):
    """A rank of a group, without any connection."""

    place: int
    ranks: int

    def rank(self):
        return self.place

    def size(self):
        return self.ranks


class SwitchLinear(nn.Module):
    """A stack of experts, called as in mlx-lm; here every token goes through all of them."""

    def __call__(self, x):
        return mx.mean(x[..., None, None, :] @ self.weight.swapaxes(-1, -2), axis=(-3, -2))


class Model(nn.Module):
    """An embedding, four hidden layers of two matrices, optional experts, a norm and a head."""

    def __init__(self, experts=0):
        super().__init__()
        if experts:
            self.experts = SwitchLinear()
            self.experts.weight = 0.1 * mx.random.normal((experts, 32, 32))
        self.embedding = nn.Embedding(101, 32)
        self.up = [nn.Linear(32, 64) for _ in range(4)]
        self.down = [nn.Linear(64, 32) for _ in range(4)]
        self.norm, self.head = nn.RMSNorm(32), nn.Linear(32, 11)

    def __call__(self, tokens):
        x = self.embedding(tokens)
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(nn.gelu(up(x)))
        if "experts" in self:
            x = x + self.experts(x)
        return self.head(self.norm(x))


def build(dtype=mx.float32, experts=0):
    mx.random.seed(0)
    model = Model(experts)
    model.set_dtype(dtype)
    return model


def batch(step, rank):
    """A batch that depends only on the step and the rank."""
    return mx.random.randint(0, 101, (4, 8), key=mx.random.key(100 * step + rank))


def grad(model, tokens):
    loss = lambda: nn.losses.cross_entropy(model(tokens), tokens % 11, reduction="mean")  # noqa: E731
    return nn.value_and_grad(model, loss)()[1]


def bits_of(tree):
    """A digest of every bit of a tree."""
    digest = hashlib.sha256()
    for path, array in sorted(tree.items() if "states.0.step" in tree else tree_flatten(tree)):
        digest.update(path.encode() + np.array(array.reshape(-1).view(mx.uint8)).tobytes())
    return digest.hexdigest()


def data_parallel(group):
    """Steps without sharding: every rank makes all updates itself."""
    model = build(mx.bfloat16)
    optimizer = create_optimizer(model, rounding="stochastic", max_grad_norm=1.0)
    before = bits_of(model.parameters())

    def step(model, gradients):
        optimizer.update(model, nn.average_gradients(gradients, group))
        mx.eval(model.state, optimizer.state)

    own = []
    for i in range(5):
        gradients = grad(model, batch(i, group.rank()))
        own.append(bits_of(gradients))
        step(model, gradients)
    return {
        "moved": bits_of(model.parameters()) != before,
        "own": own,
        "parameters": bits_of(model.parameters()),
        "state": bits_of(optimizer.state),
    }


def sharded(
    group,
    hidden="orthomaxfactor",
    dtype=mx.float32,
    compiled=False,
    poison=None,
    average=None,
    thaw=None,
    message=collectives.MESSAGE_BYTES,
    rest=lambda: "adamw",
    experts=0,
    excluded="nothing",
    **options,
):
    """The same steps on the same gradients, with and without sharding."""
    options = {"learning_rate": warmup_cosine(0.02, 20, 2, start_ratio=0.5), **options}
    average, runs = average or mean_gradients, []
    collectives.MESSAGE_BYTES = message
    for ranks in (None, group):
        model = build(dtype, experts)
        if thaw is not None:
            model.freeze(keys=["weight"])
            model.down[0].unfreeze()
        optimizer = create_optimizer(model, hidden, rest(), group=ranks, **options)
        if excluded != "nothing":
            optimizer.optimizers[0].paths = lambda path: excluded not in path

        def step(tokens, factor, model=model, optimizer=optimizer, ranks=ranks):
            gradients = tree_map(lambda g: g * factor.astype(g.dtype), grad(model, tokens))
            if ranks is None:
                gradients = average(gradients, group)
            optimizer.update(model, gradients)

        if compiled:
            mx.enable_compile()
            state = [model.state, optimizer.state]
            step = mx.compile(step, inputs=state, outputs=state)
        sent = []
        for i in range(STEPS):
            before = bytes_sent() or 0
            if i == thaw:
                model.unfreeze()
            broken = poison == i and group.rank() == 1
            step(batch(i, group.rank()), mx.array(math.nan if broken else 1.0))
            mx.eval(model.state, optimizer.state)
            after = bytes_sent()
            sent.append(None if after is None else after - before)
        runs.append((model, optimizer, sent))
    (alone, whole, _), (model, optimizer, sent) = runs
    ends = [flat(x.parameters()) for x in (alone, model)]
    pairs = zip(*(end.values() for end in ends), strict=True)
    gathered = dict(tree_flatten(optimizer.state)) | optimizer.strategy.gather_state()
    return {
        "difference": max(float(np.abs(x - y).max() / np.abs(x).max()) for x, y in pairs),
        "same as alone": bits_of(model.parameters()) == bits_of(alone.parameters()),
        "parameters": bits_of(model.parameters()),
        "state": nbytes(optimizer.state) / nbytes(whole.state),
        "same state": group.rank() > 0 or bits_of(gathered) == bits_of(whole.state),
        "planned": [x.plan.state_bytes for x in (whole, optimizer)],
        "skipped": [x.skipped.item() for x in (whole, optimizer)],
        "steps": [x.step.item() for x in (whole, optimizer)],
        "sent": sent[-1],
        "formula": cost_of(optimizer.strategy.assignment, nbytes_of(model)).sent,
    }


def mean_gradients(gradients, group):
    """The mean in the same messages as a sharded step, since another order rounds differently."""
    paths, arrays = zip(*tree_flatten(gradients), strict=True)
    return tree_unflatten([*zip(paths, OrderedCollectives(group).averaged(arrays), strict=True)])


def nbytes(tree):
    return sum(x.nbytes for _, x in tree_flatten(tree))


def unwritable(group):
    """Save a checkpoint into a folder that does not exist on the first rank."""
    model = build()
    try:
        save_checkpoint("no/such/folder", model, create_optimizer(model, group=group))
    except CheckpointError as problem:
        return {"error": str(problem)}
    return {"error": ""}


def random_states(group):
    """The numbers that each rank draws after a save, and again after loading that checkpoint."""
    model = build()
    optimizer = create_optimizer(model, group=group)
    path = Path(tempfile.gettempdir(), f"ranks-{os.getppid()}.safetensors")
    mx.random.seed(1 + group.rank())
    save_checkpoint(path, model, optimizer)
    drawn = mx.random.uniform(shape=(3,)).tolist()
    load_checkpoint(path, model, optimizer)
    again = mx.random.uniform(shape=(3,)).tolist()
    mx.eval(OrderedCollectives(group).all_sum(mx.zeros(1)))  # wait until all ranks have read it
    path.unlink(missing_ok=True)
    return {"drawn": drawn, "again": again}


ROUNDED = {"dtype": mx.bfloat16, "rounding": "stochastic"}
GUARDED = {"max_grad_norm": 0.1, "skip_nonfinite": True}
SHARDED = {
    "orthomaxfactor": {},
    "muon": {"hidden": "muon"},
    "adamw": {"hidden": "adamw"},
    "adafactor": {"hidden": "adafactor"},
    "signsgd": {"hidden": "signsgd"},
    "maxfactor": {"hidden": "maxfactor", "momentum": 0.9, "cautious": True},
    "8 bits": {"state_dtype": "int8"},
    "no momentum, one layer not updated": {"momentum": 0, "excluded": "down.0"},
    "muon, blocks, bf16": {"hidden": "muon", "block": 12, "state_dtype": "int8", "compiled": True}
    | ROUNDED
    | GUARDED,
    "experts": {"experts": 5},
    "experts, row max": {"experts": 5, "hidden": "maxfactor", "momentum": 0.9, "nesterov": True},
    "experts, muon": {"experts": 5, "hidden": "muon", "state_dtype": "int8"},
    "adamw, 4 bits": {"hidden": "adamw", "state_dtype": "int4"},
    "bf16": {"dtype": mx.bfloat16},
    "bf16, stochastic": {"rest_options": {"state_dtype": "int8"}} | ROUNDED,
    "average_gradients": {"average": nn.average_gradients},
    "many messages": {"message": 10_000},
    "late layers": {"thaw": 2} | ROUNDED,
    "mlx's own": {"rest": lambda: mlx_optimizers.Adam(1e-3, bias_correction=True)},
    "guards": {"poison": 1} | GUARDED,
    "compiled": {"compiled": True, "poison": 1} | GUARDED,
}
CASES = {"data_parallel": data_parallel, "unwritable": unwritable, "random states": random_states}
CASES |= {name: partial(sharded, **options) for name, options in SHARDED.items()}

if __name__ == "__main__":
    group = mx.distributed.init(strict=True, backend="ring")
    for name in sys.argv[1:]:
        print(json.dumps({"case": name, **CASES[name](group)}), flush=True)
