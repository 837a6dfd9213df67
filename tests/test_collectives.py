"""Several ranks in one process: each rank's messages are recorded and passed to the others."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from distributed_run import Rank
from mlx.utils import tree_flatten

from mlx_maxfactor import CheckpointError, create_optimizer
from mlx_maxfactor.distributed import collectives
from mlx_maxfactor.distributed.collectives import OrderedCollectives, OwnedArray


def run_ranks(size, act, monkeypatch):
    """Return the results of ``act`` on each rank, and the messages that each rank sent.

    The ranks run one after the other and receive the messages of the previous run. This repeats
    until every message is built from correct ones.
    """
    sent: list[list[mx.array]] = []
    for run in range(100):
        before, sent = sent, [[] for _ in range(size)]
        results = []
        for rank in range(size):

            def answer(x, combine, rank=rank, before=before, sent=sent):
                number = len(sent[rank])
                sent[rank].append(x)
                return combine([m[number] for m in before] if before else [x] * size)

            monkeypatch.setattr(mx.distributed, "all_sum", lambda x, f=answer, **_: f(x, sum))
            monkeypatch.setattr(
                mx.distributed, "all_gather", lambda x, f=answer, **_: f(x, mx.concatenate)
            )
            results.append(act(Rank(rank, size)))
        if len(sent[0]) < run:
            return results, sent
    raise AssertionError("more messages than this test expects")


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("message_bytes", [4, 100, 1 << 20])
def test_averaged_returns_means_in_few_messages(size, message_bytes, monkeypatch):
    monkeypatch.setattr(collectives, "MESSAGE_BYTES", message_bytes)
    shapes = [((3, 4), mx.float32), ((5,), mx.bfloat16), ((), mx.float32), ((0, 2), mx.float32)]

    def arrays(rank):
        keys = [mx.random.key(10 * rank + i) for i in range(len(shapes))]
        drawn = zip(keys, shapes, strict=True)
        floats = [mx.random.normal(shape, key=key).astype(dtype) for key, (shape, dtype) in drawn]
        return [*floats, mx.array(rank)]

    def mean(i):
        each = [np.array(arrays(rank)[i].astype(mx.float32), np.float64) for rank in range(size)]
        return sum(each) / size

    results, sent = run_ranks(
        size, lambda group: OrderedCollectives(group).averaged(arrays(group.rank())), monkeypatch
    )
    for rank, means in enumerate(results):
        for i, (shape, dtype) in enumerate(shapes):
            assert means[i].dtype == dtype
            assert means[i].shape == shape
            found = np.array(means[i].astype(mx.float32))
            assert np.allclose(found, mean(i), atol=0.02)  # bf16: 2^-8
        assert means[-1].item() == rank, "an integer array was averaged"
    assert len({len(messages) for messages in sent}) == 1
    assert len(sent[0]) == (3 if message_bytes == 4 else 2)


@pytest.mark.parametrize("message_bytes", [4, 20, 1 << 20])
def test_gathered_sends_each_array_from_its_owner(message_bytes, monkeypatch):
    monkeypatch.setattr(collectives, "MESSAGE_BYTES", message_bytes)
    whole = {
        "matrix": (0, mx.arange(15.0).reshape(5, 3)),
        "vector": (1, mx.arange(100, 104).astype(mx.bfloat16)),
        "number": (2, mx.array(7.0)),
        "bits": (0, mx.arange(6, dtype=mx.uint8).reshape(3, 2)),
    }

    def act(group):
        arrays = {
            name: OwnedArray(x.shape, x.dtype, owner, x if owner == group.rank() else None)
            for name, (owner, x) in whole.items()
        }
        return OrderedCollectives(group).gathered(arrays)

    results, sent = run_ranks(3, act, monkeypatch)
    for gathered in results:
        for name, (_, x) in whole.items():
            assert gathered[name].dtype == x.dtype
            assert mx.array_equal(gathered[name], x).item(), name
    shapes = [[x.shape for x in messages] for messages in sent]
    assert shapes == [shapes[0]] * 3, "the ranks send messages of different shapes"


def model_and_optimizer(group: Any, **options):
    mx.random.seed(1)
    model = nn.Sequential(nn.Embedding(12, 8), nn.Linear(8, 16), nn.Linear(16, 12))
    return model, create_optimizer(model, group=group, **options)


@pytest.mark.parametrize("fails", [False, True])
def test_the_first_rank_writes_the_whole_state(fails, monkeypatch):
    written: list[dict[str, mx.array]] = []

    def write(state):
        if fails:
            raise OSError("the disk is full")
        written.append(state)

    def act(group):
        _, optimizer = model_and_optimizer(group)
        try:
            optimizer.strategy.with_whole_state(write)
        except (CheckpointError, OSError) as problem:
            return problem
        return None

    results, _ = run_ranks(2, act, monkeypatch)
    if fails:
        assert isinstance(results[0], OSError)
        assert isinstance(results[1], CheckpointError)
        return
    _, single = model_and_optimizer(None)
    arrays = {path for path, x in tree_flatten(single.state) if path.count(".") > 2}
    assert set(written[-1]) == arrays
    assert results == [None, None]
