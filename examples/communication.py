"""Estimate communication and computation per step on several machines, for models of 1 B to 70 B.

    python examples/communication.py
    mlx.launch -n 2 --backend ring -- python examples/communication.py --measure

The first command prints the cost model for Thunderbolt 5 and 10 GbE. It uses shapes only, so it
allocates no parameters. The link speeds are the nominal ones. The second command trains a small
model with several processes on this machine. It measures the bytes sent and the time, and prints
them next to the cost model's prediction (Linux only).
"""

from __future__ import annotations

import argparse
import os
import socket
import struct
import time
from inspect import unwrap
from pathlib import Path
from typing import Any, NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_maxfactor import create_optimizer
from mlx_maxfactor.distributed import Sharding
from mlx_maxfactor.distributed.assignment import Assignment
from mlx_maxfactor.distributed.collectives import MESSAGE_BYTES

LINKS = {"Thunderbolt 5": 80e9 / 8, "10 GbE": 10e9 / 8}  # bytes per second in each direction

# Width, layers, hidden width, width of keys and values, vocabulary, tied embedding.
SHAPES = {
    "1 B": (2048, 16, 8192, 512, 128256, True),
    "3 B": (3072, 28, 8192, 1024, 128256, True),
    "8 B": (4096, 32, 14336, 1024, 128256, False),
    "32 B": (5120, 64, 27648, 1024, 152064, False),
    "70 B": (8192, 80, 28672, 1024, 128256, False),
}

TOKENS = 8192  # per step, on all ranks together


class Group(NamedTuple):
    """A stand-in for ``mx.distributed.Group`` without other processes."""

    ranks: int

    def size(self) -> int:
        """The number of ranks."""
        return self.ranks

    def rank(self) -> int:
        """The rank of this process."""
        return 0


class Cost(NamedTuple):
    """The cost of one step for one rank."""

    sent: float
    messages: int
    largest_state: float
    largest_work: float
    work: float

    def seconds(self, rate: float, latency: float = 0.0) -> float:
        """Seconds on a link with this rate (bytes per second) and latency (seconds per message)."""
        return self.sent / rate + self.messages * latency


def cost_of(assignment: Assignment, nbytes: float) -> Cost:
    """The cost of a step for the busiest rank. All parameters have one dtype and `nbytes` bytes.

    Gradients are summed around a ring, which sends ``2(N - 1)/N`` of their bytes. Then each rank
    sends its share of the parameters, padded to the largest share, to the ``N - 1`` others.
    """
    ranks = len(assignment.loads)
    work, state, share = (max(load[i] for load in assignment.loads) for i in range(3))
    messages = -(-nbytes // MESSAGE_BYTES) * 2 * (ranks - 1)
    messages += -(-share // MESSAGE_BYTES) * (ranks - 1)
    return Cost(
        2 * (ranks - 1) / ranks * nbytes + (ranks - 1) * share,
        int(messages),
        state,
        work,
        sum(load[0] for load in assignment.loads),
    )


def bytes_sent() -> int | None:
    """Bytes that this process has sent over TCP, without resends. None if TCP has no counter."""
    if not hasattr(socket, "TCP_INFO"):
        return None
    total = 0
    for name in os.listdir("/proc/self/fd"):
        link = Path("/proc/self/fd", name)
        if link.is_symlink() and os.readlink(link).startswith("socket:"):
            with socket.socket(fileno=os.dup(int(name))) as s:
                info = s.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 216)
            sent, again = struct.unpack_from("QQ", info, 200)
            total += sent - again
    return total


class Layer(nn.Module):
    """The matrices of a transformer layer with grouped-query attention and a gated MLP."""

    def __init__(self, width: int, hidden: int, keys: int):
        super().__init__()
        self.query, self.out = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.key, self.value = (nn.Linear(width, keys, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)
        self.norm, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)


class Model(nn.Module):
    """The parameters of a language model. It has no forward pass."""

    def __init__(
        self, width: int, layers: int, hidden: int, keys: int, vocabulary: int, tied: bool
    ):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = [Layer(width, hidden, keys) for _ in range(layers)]
        if not tied:
            self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self.set_dtype(mx.bfloat16)


def nbytes_of(model: nn.Module) -> int:
    arrays: Any = tree_flatten(model.trainable_parameters())
    return sum(array.nbytes for _, array in arrays)


def plan_of(model: nn.Module, ranks: int, *arguments: Any, **options: Any) -> Cost:
    """The cost of a step of this model, sharded over the ranks as in ``create_optimizer``."""
    group = cast(Any, Group(ranks))
    # The unwrapped function allocates nothing, so a model of 70 B fits in memory.
    optimizer = unwrap(create_optimizer)(model, *arguments, group=group, **options)
    assert isinstance(optimizer.strategy, Sharding)
    return cost_of(optimizer.strategy.assignment, nbytes_of(model))


def print_model() -> None:
    print(f"bf16, the default optimizer, {TOKENS:,} tokens a step of all ranks together\n")
    columns = ["ranks", "sent, GB", *(f"{link}, s" for link in LINKS)]
    columns += ["state a rank, GB", "orthogonalization a rank, of one machine's, Tflop"]
    print("| model |", " | ".join([*columns, "forward and backward a rank, Tflop"]), "|")
    print("|---" * (len(columns) + 2) + "|")
    for name, shape in SHAPES.items():
        model = Model(*shape)
        for ranks in (2, 4, 8):
            cost = plan_of(model, ranks)
            cells = [f"{ranks}", f"{cost.sent / 1e9:.1f}"]
            cells += [f"{cost.seconds(rate):.1f}" for rate in LINKS.values()]
            cells.append(f"{cost.largest_state / 1e9:.2f}")
            cells.append(f"{cost.largest_work / 1e12:.0f} of {cost.work / 1e12:.0f}")
            cells.append(f"{3 * nbytes_of(model) * TOKENS / ranks / 1e12:.0f}")
            print(f"| {name} |", " | ".join(cells), "|")


def measure(repeats: int) -> None:
    """Print measured and predicted bytes and seconds of a small model's steps."""
    group = mx.distributed.init(strict=True)
    model = Model(256, 2, 1024, 128, 4096, True)
    model.set_dtype(mx.float32)
    gradients = model.trainable_parameters()
    shared, alone = (create_optimizer(model, "signsgd", "signsgd", group=g) for g in (group, None))
    assert isinstance(shared.strategy, Sharding)
    message = mx.zeros(min(MESSAGE_BYTES, nbytes_of(model)) // 4)
    share = mx.zeros(message.size // group.size())

    arrays = [array for _, array in cast(Any, tree_flatten(gradients))]

    def update(optimizer: Any) -> None:
        mx.eval(optimizer.apply_gradients(gradients, gradients), optimizer.state)

    actions = {
        "empty": lambda: mx.eval(mx.distributed.all_sum(mx.zeros(1), group=group)),
        "message": lambda: mx.eval(mx.distributed.all_sum(message, group=group)),
        "gather": lambda: mx.eval(mx.distributed.all_gather(share, group=group)),
        "packing": lambda: mx.eval(mx.concatenate([x.reshape(-1) for x in arrays]) / group.size()),
        "alone": lambda: update(alone),
        "step": lambda: update(shared),
    }
    least, sent = dict.fromkeys(actions, float("inf")), 0
    mx.eval(gradients, message, share)
    # Actions take turns and the fastest time counts, so other load on the machine matters less.
    for repeat in range(repeats + 1):
        for name, action in actions.items():
            mx.eval(mx.distributed.all_sum(mx.zeros(1), group=group))
            before, start = bytes_sent() or 0, time.perf_counter()
            action()
            seconds, sent = time.perf_counter() - start, (bytes_sent() or 0) - before
            least[name] = min(least[name], seconds) if repeat else least[name]

    ranks, cost = group.size(), cost_of(shared.strategy.assignment, nbytes_of(model))
    latency = least["empty"] / (2 * (ranks - 1))
    seconds = least["message"] + least["gather"] - 2 * least["empty"]
    rate = 3 * (ranks - 1) / ranks * message.nbytes / seconds
    # Packing: all gradients into messages, a share of the parameters, and everything out again.
    own = least["alone"] / ranks + least["packing"] * (2 + 1 / ranks)
    if group.rank() == 0:
        print(f"{ranks} ranks, {nbytes_of(model) / 1e6:.1f} MB of float32 parameters, on loopback")
        print(f"link: {rate / 1e6:.0f} MB/s, {latency * 1e6:.0f} µs per message")
        print(f"sent per step: {sent:,} bytes; predicted {cost.sent:,.0f}")
        expected = cost.seconds(rate, latency) + own
        print(
            f"time per step: {least['step']:.3f} s; predicted {expected:.3f} s, "
            f"{own:.3f} s of it without communication"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Estimate communication and computation per step.")
    parser.add_argument(
        "--measure",
        action="store_true",
        help="measure real steps; start the program with mlx.launch",
    )
    parser.add_argument(
        "--repeats", type=int, default=7, help="number of steps that --measure times"
    )
    arguments = parser.parse_args()
    if arguments.measure:
        try:
            measure(arguments.repeats)
        except RuntimeError as problem:
            if "initialize" not in str(problem):
                raise
            parser.error(
                "--measure needs several processes: start it with mlx.launch -n 2 --backend ring --"
            )
    else:
        print_model()
