"""Measure every optimizer beside mlx's own: time, memory, bandwidth and Python, in one process.

    python examples/benchmark_optimizers.py
    python examples/benchmark_optimizers.py --width 512 --layers 8 --only default --only adamw

Every round times each optimizer once, in turn, so that a change of the machine's speed touches all
of them; what counts are ratios within a round: median, and the least and greatest. Peaks are the
median of three calls under a memory limit that they all exceed: MLX then waits for what runs before
it allocates, as it does where memory is short, and a peak is what a call needs, not how far
allocation ran ahead of it.

The transformer of `trials.py` has a width of 128 by default: on a CPU MLX multiplies bf16 matrices,
as its own Muon asks, twenty times slower than float32. There the first run also compiles kernels,
for minutes. `runs/benchmark` keeps every round's numbers, and a picture of time against memory.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from mlx.utils import tree_flatten
from tqdm import tqdm
from training import integer
from trials import BASE, ENTRIES, MLX, ROUTED, SPLIT, Trial

from mlx_maxfactor import MaxFactor, Orthogonal

DTYPES = {"float32": mx.float32, "bf16": mx.bfloat16}
MODES = ("eager", "compiled")
COPY, WHOLE = "plain copy", "whole"
SHORTEST = 0.02  # seconds a round: what is faster is called again, and counts by its median
PEAKS = 3
PARAMETERS = (50, 298, 1298)  # 2, and 8 a block
IN_PYTHON = (BASE, "mlx AdamW, routed", SPLIT, "adamw", "row_max", "default", "default, guards")
DRAWN = [*ROUTED, *MLX]
OWN = [f"C{i}" for i in (0, 1, 2, 3, 4, 5, 6, 8, 9)]  # C7 is gray
TONES = ["teal", "black", "gray", "navy", "darkgreen", "maroon", "indigo"]
COLOURS = dict(zip(DRAWN, [*OWN, *TONES], strict=True))

Seconds = dict[str, list[float]]  # by name, round by round


@dataclass
class Measured:
    """All optimizers on weights of one dtype, eager or compiled.

    Bytes are those of the weights and the state, the least that an update moves (it reads
    gradients, and reads and writes weights and state), and peaks of an update and of a step.
    """

    seconds: Seconds
    bytes: dict[str, dict[str, list[int]]]

    def ratios(self, name: str, other: str = BASE) -> list[float]:
        """Time of an update over another's."""
        return divided(self.seconds[name], self.seconds[other])

    def speed(self, name: str) -> list[float]:
        """GB/s of an update."""
        return [self.size(name, "least") / seconds / 1e9 for seconds in self.seconds[name]]

    def size(self, name: str, of: str) -> float:
        """Bytes, median of what was measured."""
        return median(self.bytes[name][of])


Results = Mapping[str, Mapping[str, Measured]]  # by dtype and mode


def main() -> None:
    given = parse_arguments()
    names = chosen(given.only)
    results = {
        dtype: {mode: measure(names, dtype, mode, given) for mode in MODES} for dtype in DTYPES
    }
    python = {str(n): time_python(names, n, given.rounds) for n in PARAMETERS}
    blocks = time_blocks(given.rows, given.rounds)
    machine = {
        "MLX": f"{version('mlx')} on {mx.default_device()}, {mx.device_info()['device_name']}",
        "platform": f"Python {platform.python_version()}, {platform.system()} {platform.machine()}",
    }
    weights = results["float32"][MODES[0]].size(BASE, "weights")
    print(*machine.values(), f"{weights / 4e6:.2f} M parameters, {given.rounds} rounds", sep="; ")
    for dtype, measured in results.items():
        print_table(f"{dtype}: time of an update over {BASE}'s; bandwidth", time_rows(measured))
        print_table(f"{dtype}: time of an update over its nearest", nearest_rows(measured))
        print_table(f"{dtype}: state and peaks over the weights ({BASE} = 1)", byte_rows(measured))
    print_table(f"Python of an eager update over {BASE}'s", python_rows(python))
    title = f"orthogonal step of a {given.rows} × {4 * given.rows} matrix, compiled"
    rows = [[name, spread(divided(times, blocks[WHOLE]))] for name, times in blocks.items()]
    print_table(title, [["", "over the whole"], *rows[1:]])

    given.output.mkdir(parents=True, exist_ok=True)
    kept = {d: {m: asdict(each) for m, each in modes.items()} for d, modes in results.items()}
    whole = {"machine": machine, "updates": kept, "python": python, "blocks": blocks}
    (given.output / "benchmark.json").write_text(json.dumps(whole, indent=1), encoding="utf-8")
    draw(results).savefig(given.output / "benchmark.png")
    print(f"\n{given.output / 'benchmark.json'}, {given.output / 'benchmark.png'}")


# Measuring


def measure(names: Sequence[str], dtype: str, mode: str, given: Arguments) -> Measured:
    """All in turn for their times, then each alone for its memory."""
    options = {"width": given.width, "layers": given.layers, "compiled": mode == "compiled"}
    make = partial(Trial, dtype=DTYPES[dtype], **options)
    label = f"{dtype}, {mode}"
    measured = Measured(time_updates(names, make, label, given.rounds), {})
    for name in tqdm(names, f"{label}, memory", leave=False):
        gc.collect()
        measured.bytes[name] = measure_bytes(make(name))
    measured.bytes[COPY] = {"least": [2 * size for size in measured.bytes[BASE]["weights"]]}
    return measured


def time_updates(
    names: Iterable[str], make: Callable[[str], Trial], label: str, rounds: int
) -> Seconds:
    trials = {name: make(name) for name in names}
    source = mx.zeros(size_of(trials[BASE].model.parameters()) // 4)
    # MLX may hand back the array itself where a copy is asked for; a negative it must write.
    copy = timed(lambda: mx.eval(-source))
    return in_turn({**{name: t.seconds for name, t in trials.items()}, COPY: copy}, rounds, label)


def measure_bytes(trial: Trial) -> dict[str, list[int]]:
    state, trained = size_of(trial.optimizer.state), size_of(trial.model.trainable_parameters())
    return {
        "weights": [size_of(trial.model.parameters())],
        "state": [state],
        "least": [3 * trained + 2 * state],
        "update": [trial.peak(trial.update, [trial.gradients()]) for _ in range(PEAKS)],
        "step": [trial.peak(trial.step, [trial.tokens]) for _ in range(PEAKS)],
    }


def time_python(names: Sequence[str], parameters: int, rounds: int) -> Seconds:
    """Seconds that build the graph of an update of so many small parameters."""
    make = partial(Trial, dtype=mx.float32, width=4, layers=(parameters - 2) // 8)
    steps = {name: make(name).seconds_of_python for name in IN_PYTHON if name in names}
    return in_turn(steps, rounds, f"Python, {parameters} parameters")


def time_blocks(rows: int, rounds: int) -> Seconds:
    """Seconds of the orthogonal step of one large matrix, whole and in blocks of its rows."""
    p = {"w": mx.random.normal((rows, 4 * rows))}

    def step_of(block: int | None) -> Callable[[], float]:
        optimizer = MaxFactor(step=Orthogonal(block))
        optimizer.init(p)
        state = optimizer.state
        update = mx.compile(optimizer.apply_gradients, inputs=state, outputs=state)
        return timed(lambda: mx.eval(update(p, p), state))

    steps = {f"blocks of {rows // part}": step_of(rows // part) for part in (2, 4, 8)}
    return in_turn({WHOLE: step_of(None), **steps}, rounds, "blocks")


def timed(call: Callable[[], Any]) -> Callable[[], float]:
    def seconds() -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return seconds


def in_turn(steps: Mapping[str, Callable[[], float]], rounds: int, label: str) -> Seconds:
    """What each step says that it took, round by round, after one round to warm up."""
    seconds: Seconds = {name: [] for name in steps}
    for i in tqdm(range(rounds + 1), label, leave=False):
        for name, step in steps.items():
            calls = [step()]
            while i and sum(calls) < SHORTEST:
                calls.append(step())
            if i:
                seconds[name].append(median(calls))
    return seconds


def size_of(tree: Any) -> int:
    arrays: Any = tree_flatten(tree)
    return sum(array.nbytes for _, array in arrays)


# Tables and picture: the first row is the head


def time_rows(measured: Mapping[str, Measured]) -> list[list[str]]:
    last = measured[MODES[-1]]
    rows = [["", *MODES, "GB/s, compiled", "over a plain copy's"]]
    for name in last.seconds:
        times = [spread(each.ratios(name)) for each in measured.values()]
        share = spread(divided(last.speed(name), last.speed(COPY)), 3)
        rows.append([name, *times, f"{median(last.speed(name)):.1f}", share])
    base = [f"{1e3 * median(each.seconds[BASE]):.1f} ms" for each in measured.values()]
    return [*rows, [f"{BASE}, for orientation", *base, "", ""]]


def nearest_rows(measured: Mapping[str, Measured]) -> list[list[str]]:
    others = {name: ENTRIES[name].over for name in measured[MODES[0]].seconds if name in ENTRIES}
    rows = [
        [name, over, *(spread(each.ratios(name, over)) for each in measured.values())]
        for name, over in others.items()
        if over != BASE
    ]
    return [["", "over", *MODES], *rows]


def byte_rows(measured: Mapping[str, Measured]) -> list[list[str]]:
    columns = [("state", MODES[0]), *((of, mode) for of in ("update", "step") for mode in MODES)]
    rows = [["", "state", *(f"{of}, {mode}" for of, mode in columns[1:])]]
    for name in measured[MODES[0]].seconds:
        if name in ENTRIES:
            rows.append([name, *(in_weights(measured[mode], name, of) for of, mode in columns)])
    return rows


def in_weights(measured: Measured, name: str, of: str) -> str:
    """Bytes over the weights', and over mlx AdamW's."""
    size = measured.size(name, of)
    return f"{size / measured.size(name, 'weights'):.3f} ({size / measured.size(BASE, of):.3f})"


def python_rows(python: Mapping[str, Seconds]) -> list[list[str]]:
    rows = [["", *(f"{n} parameters" for n in python)]]
    for name in python[str(PARAMETERS[0])]:
        rows.append([name, *(spread(divided(s[name], s[BASE])) for s in python.values())])
    base = [f"{1e3 * median(seconds[BASE]):.2f} ms" for seconds in python.values()]
    return [*rows, [f"{BASE}, for orientation", *base]]


def print_table(title: str, rows: Sequence[Sequence[str]]) -> None:
    """Names stand left and numbers right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print(f"\n{title}")
    for row in rows:
        cells = zip(row, widths, rows[1], strict=True)
        aligned = (c.rjust(w) if first[:1].isdigit() else c.ljust(w) for c, w, first in cells)
        print("  ".join(aligned).rstrip())


def divided(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(ours, theirs, strict=True)]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median (least to greatest)."""
    middle, least, greatest = (f"{f(values):.{digits}f}" for f in (median, min, max))
    return f"{middle} ({least} to {greatest})"


def draw(results: Results) -> Figure:
    """Time of an update against peak of a training step, compiled: a panel for each dtype."""
    figure = Figure(figsize=(9 * len(results), 6), dpi=100, layout="constrained")
    panels = figure.subplots(1, len(results))
    for axes, (dtype, modes) in zip(panels, results.items(), strict=True):
        measured = modes[MODES[-1]]
        draw_points(axes, measured)
        axes.set(
            title=f"{dtype} weights, compiled (squares: mlx's own)",
            xscale="log",
            xlabel=f"time of an update, {BASE} = 1",
            ylabel=f"peak memory of a training step, {BASE} = 1",
        )
        axes.xaxis.set_major_formatter("{x:g}")
    return figure


def draw_points(axes: Axes, measured: Measured) -> None:
    """Labels stand beside the panel, in the order of their points."""
    axes.axhline(1, color="lightgray", zorder=0)
    axes.axvline(1, color="lightgray", zorder=0)
    peaks = {name: measured.size(name, "step") for name in measured.seconds if name in DRAWN}
    for place, name in enumerate(sorted(peaks, key=lambda name: peaks[name])):
        times, colour = measured.ratios(name), COLOURS[name]
        at = (median(times), peaks[name] / peaks[BASE])
        axes.plot([min(times), max(times)], [at[1]] * 2, color=colour)
        axes.plot(*at, "s" if name in MLX else "o", color=colour, markersize=9)
        axes.annotate(
            f"{name}: time {at[0]:.2g}, peak {at[1]:.2f}",
            at,
            xytext=(1.02, (place + 0.5) / len(peaks)),
            textcoords="axes fraction",
            color=colour,
            verticalalignment="center",
            arrowprops={"arrowstyle": "-", "color": colour, "alpha": 0.3, "relpos": (0, 0.5)},
        )


class Arguments(argparse.Namespace):
    """The command line, typed."""

    width: int
    layers: int
    rounds: int
    rows: int
    only: list[str] | None
    output: Path


def parse_arguments() -> Arguments:
    parser = argparse.ArgumentParser(description="Measure every optimizer beside mlx's own.")
    add = parser.add_argument
    add("--width", type=integer, default=128, help="channels (default 128)")
    add("--layers", type=integer, default=4, help="blocks (default 4)")
    add("--rounds", type=integer, default=9, help="timed rounds (default 9)")
    add(
        "--rows",
        type=partial(integer, least=8),
        default=1024,
        help="of the large matrix (default 1024)",
    )
    add("--only", action="append", choices=ENTRIES, metavar="NAME", help="of these alone")
    add("--output", type=Path, default=Path("runs/benchmark"), help="folder (runs/benchmark)")
    return parser.parse_args(namespace=Arguments())


def chosen(only: Iterable[str] | None) -> list[str]:
    """These, and what they are compared with."""
    wanted = set(only or ENTRIES)
    wanted |= {ENTRIES[name].over for name in wanted} | {BASE}
    return [name for name in ENTRIES if name in wanted]


if __name__ == "__main__":
    main()
