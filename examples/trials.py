"""What `benchmark_optimizers.py` measures: optimizers by name, and a small transformer of each."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as mlx_optimizers
from mlx.optimizers import Optimizer
from mlx.utils import tree_map

from mlx_maxfactor import Adafactor, AdamW, MaxFactor, Muon, SignSGD, create_optimizer

BASE, SPLIT = "mlx AdamW", "mlx Muon and AdamW"


@dataclass(frozen=True)
class Entry:
    """How an optimizer is made for a model, and beside which one it stands."""

    make: Callable[[nn.Module], Optimizer]
    over: str = BASE
    vectors: bool = True  # False: it gets matrices alone, the norms are frozen
    max_norm: float | None = None  # of mlx's own clipping


def routed(over: str = BASE, **options: Any) -> Entry:
    return Entry(partial(create_optimizer, **options), over)


def bare(make: Callable[[], Optimizer], over: str = BASE, vectors: bool = True) -> Entry:
    return Entry(lambda _: make(), over, vectors)


def mlx_adamw(_: Any = None) -> Optimizer:
    return mlx_optimizers.AdamW(1e-3, bias_correction=True)


def mlx_split(_: Any) -> Optimizer:
    """Hidden matrices to Muon and the rest to AdamW, as the router does it."""
    members = [mlx_optimizers.Muon(0.02), mlx_adamw()]
    return mlx_optimizers.MultiOptimizer(members, [lambda path, p: "blocks" in path and p.ndim > 1])


CAUTIOUS: dict[str, Any] = {"momentum": 0.9, "cautious": True}
LOW: dict[str, Any] = {"momentum": 0.8, "nesterov": True, "state_dtype": mx.int8}
GUARDS: dict[str, Any] = {"max_grad_norm": 1.0, "skip_nonfinite": True}
ROUTED = {
    "default": routed(SPLIT),
    "default, rest adafactor": routed(SPLIT, rest="adafactor"),
    "default, 8-bit momentum": routed(SPLIT, **LOW),
    "row_max": routed("mlx Adafactor", step="row_max"),
    "row_max, rest adafactor": routed("mlx Adafactor", step="row_max", rest="adafactor"),
    "row_max, cautious momentum": routed(step="row_max", **CAUTIOUS),
    "muon": routed(SPLIT, hidden="muon"),
    "adafactor": routed("mlx Adafactor", hidden="adafactor", rest="adafactor"),
    "adamw": routed(hidden="adamw"),
    "signsgd": routed("mlx Lion", hidden="signsgd"),
}
GUARDED = {
    f"{name}, guards": replace(entry, make=partial(entry.make, **GUARDS), over=name)
    for name, entry in ROUTED.items()
}
POLAR = partial(Muon, method="polar_express", steps=4)
BARE = {
    "bare MaxFactor": bare(MaxFactor, "mlx Adafactor"),
    "bare MaxFactor, cautious momentum": bare(partial(MaxFactor, **CAUTIOUS)),
    "bare Adafactor": bare(Adafactor, "mlx Adafactor"),
    "bare AdamW": bare(AdamW),
    "bare SignSGD": bare(SignSGD, "mlx Lion"),
    "bare Muon": bare(Muon, "mlx Muon", vectors=False),
    "bare Muon, Polar Express": bare(POLAR, "mlx Muon", vectors=False),
}
MLX = {
    BASE: Entry(mlx_adamw),
    "mlx AdamW, clipped": Entry(mlx_adamw, max_norm=1.0),
    "mlx Adafactor": bare(mlx_optimizers.Adafactor),
    "mlx Lion": bare(partial(mlx_optimizers.Lion, 1e-4)),
    "mlx Muon": bare(partial(mlx_optimizers.Muon, 0.02), vectors=False),
    SPLIT: Entry(mlx_split),
}
# What routing itself costs: the members are mlx's own.
ROUTER = {"mlx AdamW, routed": Entry(lambda m: create_optimizer(m, mlx_adamw(), mlx_adamw()))}
ENTRIES = {**ROUTED, **BARE, **MLX, **ROUTER, **GUARDED}


class Block(nn.Module):
    """Causal attention of one head, and an MLP."""

    def __init__(self, width: int):
        super().__init__()
        linear = partial(nn.Linear, bias=False)
        self.q, self.k, self.v, self.o = (linear(width, width) for _ in range(4))
        self.up, self.down = linear(width, 4 * width), linear(4 * width, width)
        self.norm_1, self.norm_2 = nn.RMSNorm(width), nn.RMSNorm(width)

    def __call__(self, x: mx.array) -> mx.array:
        """Update a stream of ``(batch, time, width)``."""
        y = self.norm_1(x)
        q, k, v = (layer(y)[:, None] for layer in (self.q, self.k, self.v))
        scale = x.shape[-1] ** -0.5
        y = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask="causal")
        x = x + self.o(y[:, 0])
        return x + self.down(nn.gelu(self.up(self.norm_2(x))))


class Transformer(nn.Module):
    """A language model of 8 · width tokens: 2 parameters, and 8 a block."""

    def __init__(self, width: int, layers: int):
        super().__init__()
        self.embedding = nn.Embedding(8 * width, width)
        self.blocks = [Block(width) for _ in range(layers)]
        self.lm_head = nn.Linear(width, 8 * width, bias=False)

    def __call__(self, tokens: mx.array) -> mx.array:
        """Logits of the next token."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(x)


def loss_of(model: nn.Module, tokens: mx.array) -> mx.array:
    return nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:], reduction="mean")


class Trial:
    """A transformer and its optimizer: an update alone, and a whole training step."""

    def __init__(self, name: str, dtype: mx.Dtype, width: int, layers: int, compiled: bool = False):
        entry, self.others = ENTRIES[name], mx.get_active_memory()
        self.model = model = Transformer(width, layers)
        model.set_dtype(dtype)
        if not entry.vectors:
            model.apply_to_modules(lambda _, m: m.freeze() if isinstance(m, nn.RMSNorm) else None)
        self.optimizer = optimizer = entry.make(model)
        optimizer.init(model.trainable_parameters())
        self.tokens = mx.random.randint(0, 8 * width, (2, 17))
        self.state = state = [model.state, optimizer.state]
        mx.eval(state, self.tokens)

        def update(gradients: Any) -> None:
            if entry.max_norm is not None:
                gradients, _ = mlx_optimizers.clip_grad_norm(gradients, entry.max_norm)
            optimizer.update(model, gradients)

        def step(tokens: mx.array) -> mx.array:
            loss, gradients = nn.value_and_grad(model, loss_of)(model, tokens)
            update(gradients)
            return loss

        compiler = partial(mx.compile, inputs=state, outputs=state) if compiled else lambda f: f
        self.update, self.step = compiler(update), compiler(step)

    def gradients(self) -> Any:
        """New ones, of which the sizes alone matter."""
        gradients = tree_map(lambda p: 0.1 * p, self.model.trainable_parameters())
        mx.eval(gradients)
        return gradients

    def seconds(self) -> float:
        """Of an update."""
        held = [self.gradients()]
        start = time.perf_counter()
        self.update(held.pop())
        mx.eval(self.state)
        return time.perf_counter() - start

    def seconds_of_python(self) -> float:
        """Of building the graph of an update, which is then thrown away."""
        gradients = self.gradients()
        before = tree_map(lambda array: array, self.optimizer.state)
        start = time.perf_counter()
        updated = self.optimizer.apply_gradients(gradients, self.model)
        seconds = time.perf_counter() - start
        self.optimizer.state = before
        del updated  # only now: to take a graph apart takes time too
        return seconds

    def peak(self, call: Callable[[Any], Any], held: list) -> int:
        """Bytes at most of all that is this trial's, in a call that gets what nobody else holds.

        As where memory is short: beyond its limit MLX waits for what runs before it allocates.
        """
        mx.clear_cache()
        mx.reset_peak_memory()
        limit = mx.set_memory_limit(1)
        mx.eval(call(held.pop()), self.state)
        mx.set_memory_limit(limit)
        return mx.get_peak_memory() - self.others
