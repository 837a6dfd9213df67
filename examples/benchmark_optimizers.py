"""Measure time and memory of whole compiled training steps, compared with mlx's AdamW.

    python examples/benchmark_optimizers.py
    python examples/benchmark_optimizers.py --shapes 1.5b --tokens 4096 --only default --only muon

A step is the forward pass, backward pass and update of transformer blocks with the shapes of
Qwen2.5. Every round times each optimizer once, so a change of the machine's speed affects all of
them. The table has the ratios within a round: median (least to greatest). Peak memory is measured
for one optimizer at a time, under a memory limit that every step exceeds. MLX then waits for
running work before it allocates, as it does when memory is short.

The weights are float32, and on a GPU also bf16. On a CPU, MLX multiplies bf16 matrices twenty times
slower. mlx's Muon always multiplies in bf16, so on a CPU it takes most of the benchmark's time.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as mlx_optimizers
from matplotlib.figure import Figure
from mlx.optimizers import Optimizer
from mlx.utils import tree_flatten
from tqdm import tqdm
from training import integer

from mlx_maxfactor import create_optimizer

BASE = "mlx AdamW"
DTYPES = {"float32": mx.float32, "bf16": mx.bfloat16}
SEQUENCE = 512  # maximum tokens per sequence


@dataclass(frozen=True)
class Shape:
    """Sizes of a transformer block."""

    width: int
    inner: int
    heads: int
    kv_heads: int


SHAPES = {"0.5b": Shape(896, 4864, 14, 2), "1.5b": Shape(1536, 8960, 12, 2)}


def mlx_split(_: nn.Module) -> Optimizer:
    """Send hidden matrices to Muon and the rest to AdamW, like our router."""
    members = [mlx_optimizers.Muon(0.02), mlx_optimizers.AdamW(1e-3)]
    return mlx_optimizers.MultiOptimizer(members, [lambda path, p: "blocks" in path and p.ndim > 1])


ENTRIES: dict[str, Callable[[nn.Module], Optimizer]] = {
    BASE: lambda _: mlx_optimizers.AdamW(1e-3),
    "default": create_optimizer,
    "default, no momentum": partial(create_optimizer, momentum=0),
    "default, block=64": partial(create_optimizer, block=64),
    "default, block=None": partial(create_optimizer, block=None),
    "default, rest adafactor": partial(create_optimizer, rest="adafactor"),
    "default, both guards": partial(create_optimizer, max_grad_norm=1.0, skip_nonfinite=True),
    "maxfactor": partial(create_optimizer, hidden="maxfactor"),
    "muon": partial(create_optimizer, hidden="muon"),
    "adamw": partial(create_optimizer, hidden="adamw"),
    "mlx Adafactor": lambda _: mlx_optimizers.Adafactor(),
    "mlx Muon": mlx_split,
}


class Block(nn.Module):
    """Causal attention with grouped heads, and a gated MLP."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        width, side = shape.width, shape.width // shape.heads
        linear = partial(nn.Linear, bias=False)
        self.q, self.o = linear(width, width), linear(width, width)
        self.k, self.v = (linear(width, shape.kv_heads * side) for _ in range(2))
        self.gate, self.up = linear(width, shape.inner), linear(width, shape.inner)
        self.down = linear(shape.inner, width)
        self.norm_1, self.norm_2 = nn.RMSNorm(width), nn.RMSNorm(width)

    def __call__(self, x: mx.array) -> mx.array:
        """Map (batch, length, width) to the same shape."""
        y = self.norm_1(x)
        batch, length, width = x.shape
        side = width // self.shape.heads
        q, k, v = (
            layer(y).reshape(batch, length, -1, side).swapaxes(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        y = mx.fast.scaled_dot_product_attention(q, k, v, scale=side**-0.5, mask="causal")
        x = x + self.o(y.swapaxes(1, 2).reshape(x.shape))
        y = self.norm_2(x)
        return x + self.down(nn.silu(self.gate(y)) * self.up(y))


class Transformer(nn.Module):
    """A language model with a tied embedding."""

    def __init__(self, shape: Shape, layers: int, vocabulary: int):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, shape.width)
        self.blocks = [Block(shape) for _ in range(layers)]
        self.norm = nn.RMSNorm(shape.width)

    def __call__(self, tokens: mx.array) -> mx.array:
        """Logits of the next tokens."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.embedding.as_linear(self.norm(x))


def loss_of(model: nn.Module, tokens: mx.array) -> mx.array:
    logits = model(tokens[:, :-1]).astype(mx.float32)
    return nn.losses.cross_entropy(logits, tokens[:, 1:], reduction="mean")


class Trial:
    """A transformer, its optimizer and their compiled training step."""

    def __init__(self, name: str, shape: Shape, dtype: mx.Dtype, given: Arguments):
        self.memory_before = mx.get_active_memory()
        self.model = model = Transformer(shape, given.layers, given.vocabulary)
        model.set_dtype(dtype)
        self.optimizer = optimizer = ENTRIES[name](model)
        optimizer.init(model.trainable_parameters())
        self.state = state = [model.state, optimizer.state]
        mx.eval(state)

        @partial(mx.compile, inputs=state, outputs=state)
        def step(tokens: mx.array) -> mx.array:
            loss, gradients = nn.value_and_grad(model, loss_of)(model, tokens)
            optimizer.update(model, gradients)
            return loss

        self.step = step

    def seconds(self, tokens: mx.array) -> float:
        """Time one step, in seconds."""
        mx.synchronize()
        start = time.perf_counter()
        mx.eval(self.step(tokens), self.state)
        mx.synchronize()
        return time.perf_counter() - start

    def peak(self, tokens: mx.array) -> int:
        """Peak memory of a step, in bytes, under a memory limit that every step exceeds."""
        mx.clear_cache()
        mx.reset_peak_memory()
        limit = mx.set_memory_limit(1)
        mx.eval(self.step(tokens), self.state)
        mx.set_memory_limit(limit)
        return mx.get_peak_memory() - self.memory_before


def main() -> None:
    given = parse_arguments()
    names = [name for name in ENTRIES if name in {BASE, *(given.only or ENTRIES)}]
    device = mx.device_info().get("device_name", "unknown")
    machine = [
        f"MLX {version('mlx')} on {mx.default_device()}, {device}",
        f"Python {platform.python_version()}, {platform.system()} {platform.machine()}",
        f"{given.layers} layers, {given.rounds} rounds",
    ]
    print(*machine, sep="; ", flush=True)
    dtypes = given.dtype or ["float32", *["bf16"] * (mx.default_device() != mx.cpu)]
    results = {}
    for shape in given.shapes:
        for dtype in dtypes:
            measured = measure(names, SHAPES[shape], DTYPES[dtype], given)
            results[f"{shape}, {dtype}"] = measured
            print_table(f"{shape}, {dtype}: a training step over {BASE}'s", rows_of(measured))
    given.output.mkdir(parents=True, exist_ok=True)
    kept = json.dumps({"machine": machine, "results": results}, indent=1)
    (given.output / "benchmark.json").write_text(kept, encoding="utf-8")
    draw(results).savefig(given.output / "benchmark.png")
    print(f"\n{given.output / 'benchmark.json'}, {given.output / 'benchmark.png'}")


def measure(
    names: Sequence[str], shape: Shape, dtype: mx.Dtype, given: Arguments
) -> dict[str, dict[str, Any]]:
    """For each optimizer: seconds of every round by number of tokens, and bytes of memory."""
    seconds = time_steps(names, shape, dtype, given)
    measured = {}
    for name in tqdm(names, "memory", leave=False):
        gc.collect()
        state, peak = measure_bytes(name, shape, dtype, given)
        measured[name] = {"seconds": seconds[name], "state": state, "peak": peak}
    return measured


def time_steps(
    names: Sequence[str], shape: Shape, dtype: mx.Dtype, given: Arguments
) -> dict[str, dict[str, list[float]]]:
    trials = {name: Trial(name, shape, dtype, given) for name in names}
    seconds: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    for count in given.tokens:
        batch = batch_of(count, given.vocabulary)
        for i in tqdm(range(given.rounds + 1), f"{count} tokens", leave=False):
            for name, trial in trials.items():
                taken = trial.seconds(batch)
                if i:  # the first round compiles
                    seconds[name].setdefault(str(count), []).append(taken)
    return seconds


def measure_bytes(name: str, shape: Shape, dtype: mx.Dtype, given: Arguments) -> tuple[int, int]:
    """Bytes of the state, and the peak of a step. Few tokens keep the activations small."""
    batch = batch_of(min(SEQUENCE, *given.tokens), given.vocabulary)
    trial = Trial(name, shape, dtype, given)
    trial.seconds(batch)
    return size_of(trial.optimizer.state), trial.peak(batch)


def batch_of(tokens: int, vocabulary: int) -> mx.array:
    length = min(SEQUENCE, tokens)
    batch = mx.random.randint(0, vocabulary, (tokens // length, length + 1))
    mx.eval(batch)
    return batch


def size_of(tree: Any) -> int:
    arrays: Any = tree_flatten(tree)
    return sum(array.nbytes for _, array in arrays)


# Table and picture


def ratios(measured: Mapping[str, Any], name: str, count: str) -> list[float]:
    """The step time divided by mlx AdamW's, for each round."""
    pairs = zip(measured[name]["seconds"][count], measured[BASE]["seconds"][count], strict=True)
    return [ours / theirs for ours, theirs in pairs]


def rows_of(measured: Mapping[str, Any]) -> list[list[str]]:
    """The rows of the table. The first row is the header."""
    counts = list(measured[BASE]["seconds"])
    rows = [["", *(f"{count} tokens" for count in counts), "state", "peak"]]
    for name, result in measured.items():
        times = [spread(ratios(measured, name, count)) for count in counts]
        sizes = [f"{result[key] / measured[BASE][key]:.3f}" for key in ("state", "peak")]
        rows.append([name, *times, *sizes])
    base = [f"{median(measured[BASE]['seconds'][count]):.2f} s" for count in counts]
    megabytes = [f"{measured[BASE][key] / 1e6:,.0f} MB" for key in ("state", "peak")]
    return [*rows, [f"{BASE}, for orientation", *base, *megabytes]]


def print_table(title: str, rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print(f"\n{title}")
    for name, *cells in rows:
        right = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        print("  ".join([name.ljust(widths[0]), *right]), flush=True)


def spread(values: Sequence[float]) -> str:
    """Median (least to greatest)."""
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def draw(results: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Plot step time against peak memory, at the largest number of tokens."""
    figure = Figure(figsize=(9 * len(results), 6), dpi=100, layout="constrained")
    panels = figure.subplots(1, len(results), squeeze=False)[0]
    for axes, (title, measured) in zip(panels, results.items(), strict=True):
        count = list(measured[BASE]["seconds"])[-1]
        peaks = {name: r["peak"] / measured[BASE]["peak"] for name, r in measured.items()}
        axes.axhline(1, color="lightgray", zorder=0)
        axes.axvline(1, color="lightgray", zorder=0)
        for place, name in enumerate(sorted(peaks, key=lambda name: peaks[name])):
            at = (median(ratios(measured, name, count)), peaks[name])
            axes.plot(*at, "s" if name.startswith("mlx") else "o", color=f"C{place}", markersize=9)
            axes.annotate(
                f"{name}: time {at[0]:.2f}, peak {at[1]:.2f}",
                at,
                xytext=(1.02, (place + 0.5) / len(peaks)),
                textcoords="axes fraction",
                color=f"C{place}",
                verticalalignment="center",
                arrowprops={"arrowstyle": "-", "color": f"C{place}", "alpha": 0.3},
            )
        axes.set(
            title=f"{title}, {count} tokens a step (squares: mlx's own)",
            xscale="log",
            xlabel=f"time of a training step, {BASE} = 1",
            ylabel=f"peak memory of a training step, {BASE} = 1",
        )
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("{x:g}")
    return figure


class Arguments(argparse.Namespace):
    """The arguments of this program."""

    shapes: list[str]
    dtype: list[str] | None
    tokens: list[int]
    layers: int
    vocabulary: int
    rounds: int
    only: list[str] | None
    output: Path


def parse_arguments() -> Arguments:
    parser = argparse.ArgumentParser(description="Compare training steps with mlx's AdamW.")
    add = parser.add_argument
    add("--shapes", nargs="+", choices=SHAPES, default=["0.5b"], help="shapes of the blocks (0.5b)")
    add("--dtype", nargs="+", choices=DTYPES, help="data type of the weights")
    add(
        "--tokens",
        nargs="+",
        type=integer,
        default=[1024, 2048],
        help="tokens per step (1024 2048)",
    )
    add("--layers", type=integer, default=1, help="number of blocks (1)")
    add("--vocabulary", type=integer, default=1024, help="vocabulary size (1024)")
    add("--rounds", type=integer, default=5, help="number of timed rounds (5)")
    add("--only", action="append", choices=ENTRIES, metavar="NAME", help="only these optimizers")
    add(
        "--output", type=Path, default=Path("runs/benchmark"), help="output folder (runs/benchmark)"
    )
    return parser.parse_args(namespace=Arguments())


if __name__ == "__main__":
    main()
