"""Time one update of every optimizer beside mlx's own, in one process, eager and compiled.

    python examples/benchmark_step.py
    python examples/benchmark_step.py --width 256 --rounds 3

The parameters are those of a transformer: embedding, blocks of six matrices, norms. Every round
times each optimizer once, in turn, so that a change of the machine's speed touches all of them;
what is printed are ratios within a round: median, and the least and greatest. Then the orthogonal
step of one large matrix, in blocks of its rows over the whole.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from statistics import median
from typing import Any

import mlx.core as mx
import mlx.optimizers as mlx_optimizers
from mlx.utils import tree_map, tree_reduce
from tqdm import tqdm

from mlx_maxfactor import Adafactor, AdamW, MaxFactor, Muon, Orthogonal, SignSGD

# Ours beside the one of mlx that stands nearest. Vectors go to no Muon, so it gets matrices alone.
PAIRS: dict[str, tuple[Callable[[], mlx_optimizers.Optimizer], str]] = {
    "MaxFactor": (MaxFactor, "mlx Adafactor"),
    "MaxFactor, cautious momentum": (partial(MaxFactor, momentum=0.9, cautious=True), "mlx AdamW"),
    "MaxFactor, orthogonal": (partial(MaxFactor, step="orthogonal"), "mlx Muon"),
    "MaxFactor, orthogonal, momentum": (
        partial(MaxFactor, step="orthogonal", momentum=0.8),
        "mlx Muon",
    ),
    "the same, momentum in 8 bits": (
        partial(MaxFactor, step="orthogonal", momentum=0.8, state_dtype=mx.int8),
        "mlx Muon",
    ),
    "Adafactor": (Adafactor, "mlx Adafactor"),
    "SignSGD": (SignSGD, "mlx SGD"),
    "AdamW": (partial(AdamW, 1e-3), "mlx AdamW"),
    "Muon": (Muon, "mlx Muon"),
}
PEERS: dict[str, Callable[[], mlx_optimizers.Optimizer]] = {
    "mlx AdamW": partial(mlx_optimizers.AdamW, 1e-3, bias_correction=True),
    "mlx Adafactor": mlx_optimizers.Adafactor,
    "mlx SGD": partial(mlx_optimizers.SGD, 1e-3, weight_decay=0.1),
    "mlx Muon": partial(mlx_optimizers.Muon, 0.02),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Time one update of every optimizer beside mlx's own."
    )
    parser.add_argument("--width", type=count, default=512, help="channels (default 512)")
    parser.add_argument("--layers", type=count, default=8, help="blocks (default 8)")
    parser.add_argument("--rounds", type=count, default=7, help="timed rounds (default 7)")
    arguments = parser.parse_args()

    parameters = transformer_parameters(arguments.width, arguments.layers)
    size: Any = tree_reduce(lambda total, p: total + p.size, parameters, 0)
    print(f"{size / 1e6:.1f} M float32 parameters, {arguments.rounds} rounds after one to warm up")
    print(f"MLX {version('mlx')}, {platform.machine()}, {mx.default_device()}\n")
    times = {
        mode: measure(parameters, mode == "compiled", arguments.rounds)
        for mode in ("eager", "compiled")
    }
    row = "{:30} {:14} {:>22} {:>22}"
    print(row.format("optimizer", "over", "eager", "compiled"))
    for name, (_, peer) in PAIRS.items():
        for other in dict.fromkeys((peer, "mlx AdamW")):
            print(row.format(name, other, *(ratios(t[name], t[other]) for t in times.values())))
    print("\nmedian milliseconds, for orientation only")
    for name in (*PAIRS, *PEERS):
        milliseconds = [f"{1e3 * median(t[name]):.0f}" for t in times.values()]
        print(row.format(name, "", *milliseconds))

    rows, columns = 2 * arguments.width, 8 * arguments.width
    print(f"\northogonal step of a {rows} × {columns} matrix, over the whole, compiled")
    blocks = {f"blocks of {rows // part}": rows // part for part in (2, 4, 8)}
    optimizers = {
        name: partial(MaxFactor, step=Orthogonal(block))
        for name, block in {"whole": None, **blocks}.items()
    }
    seconds = time_steps(
        optimizers, {"w": mx.random.normal((rows, columns))}, True, arguments.rounds
    )
    for name in blocks:
        print(row.format(name, "whole", "", ratios(seconds[name], seconds["whole"])))


def count(argument: str) -> int:
    if not (argument.isdecimal() and int(argument)):
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {argument!r}")
    return int(argument)


def transformer_parameters(width: int, layers: int) -> dict:
    """An embedding of 8 · width tokens, and blocks of attention and a fourfold MLP."""
    shapes = [(width, width)] * 4 + [(4 * width, width), (width, 4 * width), (width,), (width,)]
    normal = partial(mx.random.normal, scale=0.02)
    blocks = [{str(i): normal(shape) for i, shape in enumerate(shapes)} for _ in range(layers)]
    return {"embedding": normal((8 * width, width)), "blocks": blocks}


def measure(parameters: dict, compiled: bool, rounds: int) -> dict[str, list[float]]:
    """Seconds of each update, by optimizer, over the rounds."""
    return time_steps(
        {name: make for name, (make, _) in PAIRS.items()} | PEERS, parameters, compiled, rounds
    )


def time_steps(
    optimizers: Mapping[str, Callable[[], mlx_optimizers.Optimizer]],
    parameters: dict,
    compiled: bool,
    rounds: int,
) -> dict[str, list[float]]:
    """Seconds of each update, in turn, after one round to warm up."""
    steps = {name: make_step(make(), parameters, compiled) for name, make in optimizers.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    mode = "compiled" if compiled else "eager"
    for i in tqdm(range(rounds + 1), mode, leave=False):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if i:
                times[name].append(time.perf_counter() - start)
    return times


def make_step(
    optimizer: mlx_optimizers.Optimizer, parameters: dict, compiled: bool
) -> Callable[[], None]:
    if "Muon" in type(optimizer).__name__:
        parameters = tree_map(lambda p: p if p.ndim > 1 else mx.zeros((1, 1)), parameters)
    gradients = tree_map(lambda p: 0.01 * mx.random.normal(p.shape), parameters)
    optimizer.init(parameters)
    mx.eval(parameters, gradients, optimizer.state)
    update = optimizer.apply_gradients
    if compiled:
        update = mx.compile(update, inputs=optimizer.state, outputs=optimizer.state)

    def step() -> None:
        mx.eval(update(gradients, parameters), optimizer.state)

    return step


def ratios(ours: list[float], theirs: list[float]) -> str:
    """Round by round: median (least to greatest)."""
    each = [a / b for a, b in zip(ours, theirs, strict=True)]
    return f"{median(each):.2f} ({min(each):.2f} to {max(each):.2f})"


if __name__ == "__main__":
    main()
