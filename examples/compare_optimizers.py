r"""Compare optimizers on one of the examples, each at its best rate, from saved records.

    python examples/compare_optimizers.py speech
    python examples/compare_optimizers.py language_model --run --workers 2

The first command prints the tables of the records in `examples/records`. It draws the loss against
the optimizer's state and against the step time. `all` means every training. `--run` first makes the
missing runs. The search is the same for every configuration of `configurations.py`: it tries four
rates of a ladder with seed 1, and further rates while the best one is the lowest or the highest.
Then it runs two more seeds at the best rate (`--seeds 8`: seven more, if three are not enough).

Each record has the command that repeats its run. Arguments after `--` are passed to every run. Such
runs need a file of their own (`--records`).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, median
from typing import Any

import mlx.core as mx
from configurations import (
    CONFIGURATIONS,
    DEPTHS,
    LADDER,
    SIZES,
    TRAININGS,
    WHICH,
    WORDS,
)
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from tqdm import tqdm
from training import integer

FOLDER = Path(__file__).parent
SEEDS = (1, 2, 3)
DRAWN = [name for name in CONFIGURATIONS if CONFIGURATIONS[name].question == WHICH]
COLOURS = dict(zip(DRAWN, [*(f"C{i}" for i in range(10)), "black", "navy"], strict=False))
PICTURED = ("language_model_1500", "speech")
TRANSFERRED = ("OrthoMaxFactor", "OrthoMaxFactor, no momentum", "Muon 0.8", "AdamW")
COSTS = {
    "state": "optimizer state of the hidden matrices, relative to AdamW",
    "seconds": "seconds per training step",
}
TIMED_STEPS = 100
TITLES = "; ".join(f"{name}: {training.title}" for name, training in TRAININGS.items())


@dataclass(frozen=True)
class Record:
    """One run, where it ran, and its results."""

    configuration: str
    rate: float  # 0: picked by the library
    seed: int
    command: str
    platform: str
    workers: int
    state_bytes: int
    hidden_state_bytes: int
    seconds_per_step: float  # median, with `workers` runs at a time
    validation: dict[str, float | None]

    def final(self, measure: str) -> float:
        """The measure at the end of the run. Infinity if it was not finite."""
        value = self.validation[measure]
        return math.inf if value is None else value


def main() -> None:
    arguments = parse_arguments()
    records = {name: read(file_of(name, arguments)) for name in arguments.trainings}
    if arguments.run:
        run_missing(records, arguments)
    if arguments.time:
        time_steps(records, arguments)
    for name, kept in records.items():
        if not kept:
            path = file_of(name, arguments)
            sys.exit(f"compare_optimizers.py: error: {path} has no records: make them with --run")
    print(report(records))
    # The tables and pictures in examples/records cover all trainings.
    whole = list(records) == kept_trainings() and not arguments.records
    folder = FOLDER / "records" if whole else Path("runs/comparison")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tables.md").write_text(report(records), encoding="utf-8")
    pictured = {name: kept for name, kept in records.items() if name in PICTURED} or records
    timed = {name: kept for name, kept in pictured.items() if timings_of(name).exists()}
    drawn = []
    for cost, chosen in (("state", pictured), ("seconds", timed)):
        if chosen:  # step times are drawn only from runs that were timed one at a time
            draw(chosen, cost).savefig(folder / f"loss_by_{cost}.png")
            drawn.append(cost)
    if sizes := {name: kept for name, kept in records.items() if name in (*SIZES, *DEPTHS)}:
        draw_transfer(sizes).savefig(folder / "loss_by_rate.png")
        drawn.append("rate")
    print(f"{folder / 'tables.md'}, {', '.join(f'loss_by_{name}.png' for name in drawn)}")


# Runs


def run_missing(records: dict[str, list[Record]], arguments: Arguments) -> None:
    """Make the runs that the searches need, until every search is complete."""
    running: dict[Future[Record], tuple[str, str, float, int]] = {}
    progress = tqdm(unit="run")
    with ThreadPoolExecutor(arguments.workers) as pool:
        while True:
            wanted = [
                (training, name, rate, seed)
                for training in arguments.trainings
                for name in arguments.only or CONFIGURATIONS
                if training in CONFIGURATIONS[name].trainings
                for rate, seed in next_runs(name, training, records[training], arguments.seeds)
            ]
            progress.total = progress.n + len(wanted)
            progress.refresh()
            new = [run for run in wanted if run not in running.values()]
            for run in new[: arguments.workers - len(running)]:
                running[pool.submit(run_one, *run, arguments)] = run
            if not running:
                break
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                training = running.pop(done)[0]
                records[training].append(done.result())
                path = file_of(training, arguments)
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("a") as file:
                    file.write(json.dumps(asdict(done.result())) + "\n")
                progress.update()


def next_runs(
    name: str, training: str, records: Sequence[Record], count: int | None = None
) -> list[tuple[float, int]]:
    """Rates and seeds that the search of one configuration needs next."""
    configuration, trained = CONFIGURATIONS[name], TRAININGS[training]
    seeds = range(1, (count or trained.seeds) + 1)
    losses = {(r.rate, r.seed): r.final("loss") for r in records if r.configuration == name}
    if not configuration.searched:
        return [(0.0, seed) for seed in seeds if (0.0, seed) not in losses]
    if configuration.rate_of:
        other = best_rate(configuration.rate_of, training, records)
        if other is None:
            return []
        if configuration.searched == "--learning-rate":
            return [(other, seed) for seed in seeds if (other, seed) not in losses]
    first = configuration.first_rates_in(training, trained.first_rates)
    tried = sorted({rate for rate, seed in losses if seed == SEEDS[0]} | set(first))
    if missing := [(rate, SEEDS[0]) for rate in tried if (rate, SEEDS[0]) not in losses]:
        return missing
    best = min(tried, key=lambda rate: losses[rate, SEEDS[0]])
    place = LADDER.index(best)
    if losses[best, SEEDS[0]] == math.inf or not 0 < place < len(LADDER) - 1:
        raise RuntimeError(f"{name}: no best rate inside {LADDER[0]:g} to {LADDER[-1]:g}")
    if best == tried[0]:
        return [(LADDER[place - 1], SEEDS[0])]
    if best == tried[-1]:
        return [(LADDER[place + 1], SEEDS[0])]
    return [(best, seed) for seed in seeds if (best, seed) not in losses]


def best_rate(name: str, training: str, records: Sequence[Record]) -> float | None:
    """The best rate, or None if the search is not finished."""
    if any(seed == SEEDS[0] for _, seed in next_runs(name, training, records)):
        return None
    first = [r for r in records if r.configuration == name and r.seed == SEEDS[0]]
    return min(first, key=lambda r: r.final("loss")).rate


def run_one(training: str, name: str, rate: float, seed: int, arguments: Arguments) -> Record:
    """Run the example as a user would, and read its results."""
    configuration, trained = CONFIGURATIONS[name], TRAININGS[training]
    script = f"train_{trained.task}.py"
    options = [*trained.arguments, *configuration.arguments]
    if configuration.searched != "--learning-rate" and configuration.rate_of:
        hidden = best_rate(configuration.rate_of, training, read(file_of(training, arguments)))
        options.append(f"--learning-rate={hidden:g}")
    if configuration.searched:
        options.append(f"{configuration.searched}={rate:g}")
        if configuration.searched != "--rest-learning-rate" and "--rest=same" not in options:
            options += trained.rest
    options += [f"--seed={seed}", *arguments.others]
    with tempfile.TemporaryDirectory() as folder:
        run = run_example(script, options, folder)
    return Record(
        name,
        rate,
        seed,
        shlex.join(["python", f"examples/{script}", *options]),
        f"MLX {version('mlx')}, {platform.system()} {platform.machine()}{gpu()}",
        arguments.workers,
        run["state_bytes"],
        run["hidden_state_bytes"],
        round(median(run["seconds_per_step"]), 4),
        {measure: values[-1] for measure, values in run["validation"].items()},
    )


def gpu() -> str:
    """The name of the GPU, if there is one."""
    return (
        "" if mx.default_device() == mx.cpu else f", {mx.device_info().get('device_name', 'GPU')}"
    )


def run_example(script: str, options: Sequence[str], folder: str) -> dict[str, Any]:
    """Run an example to its end and read the curves that it writes to a folder."""
    only_the_end = ["--eval-every=999999", "--save-every=999999", f"--output={folder}"]
    done = subprocess.run(
        [sys.executable, str(FOLDER / script), *options, *only_the_end],
        # One OpenBLAS thread per run: more threads would compete with other runs for the cores.
        env={"OPENBLAS_NUM_THREADS": "1", **os.environ},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{script} {shlex.join(options)}: {done.stderr[-2000:]}")
    return json.loads((Path(folder) / "curves.json").read_text())["runs"][0]


def time_steps(records: Mapping[str, Sequence[Record]], arguments: Arguments) -> None:
    """Time short runs of the drawn configurations, one at a time. Replace older timings."""
    arguments.workers, arguments.others = 1, [f"--steps={TIMED_STEPS}"]
    best = {training: at_best(kept) for training, kept in records.items()}
    timed: dict[str, list[Record]] = {training: [] for training in records}
    todo = [(s, t, name) for s in SEEDS for t, groups in best.items() for name in groups]
    for seed, training, name in tqdm([run for run in todo if run[2] in DRAWN], desc="timing"):
        rate = best[training][name][0].rate
        timed[training].append(run_one(training, name, rate, seed, arguments))
    for training, kept in timed.items():
        lines = (json.dumps(asdict(record)) + "\n" for record in kept)
        timings_of(training).write_text("".join(lines), encoding="utf-8")


def timings_of(training: str) -> Path:
    return FOLDER / "records" / f"seconds_{training}.jsonl"


def read(path: Path) -> list[Record]:
    if not path.exists():
        return []
    return [Record(**json.loads(line)) for line in path.read_text().splitlines()]


# Table and picture


def at_best(records: Sequence[Record]) -> dict[str, list[Record]]:
    """All seeds of each configuration at its best rate, sorted by mean loss."""
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        groups[record.configuration].append(record)
    best = {}
    for name, group in groups.items():
        first = [r for r in group if r.seed == SEEDS[0]]
        rate = min(first, key=lambda r: r.final("loss")).rate
        best[name] = [r for r in group if r.rate == rate]
    return dict(sorted(best.items(), key=lambda item: mean_loss(item[1])))


def mean_loss(records: Sequence[Record]) -> float:
    return fmean(r.final("loss") for r in records)


def report(records: Mapping[str, Sequence[Record]]) -> str:
    """Every table, as Markdown."""
    parts = [f"# {TRAININGS[name].title}\n\n{tables(kept, name)}" for name, kept in records.items()]
    if len(records) > 1:
        parts.insert(0, f"# Final validation loss\n\n{overview(records)}")
    parts += [
        f"# Seconds a step, {TRAININGS[name].title}\n\n{seconds_table(name)}"
        for name in records
        if timings_of(name).exists()
    ]
    return "\n\n".join(parts) + "\n"


def tables(records: Sequence[Record], training: str) -> str:
    """A Markdown table for each question of the configurations."""
    best = at_best(records)
    questions = dict.fromkeys(configuration.question for configuration in CONFIGURATIONS.values())
    parts = []
    for question in questions:
        names = [name for name in best if CONFIGURATIONS[name].question == question]
        if names:
            parts.append(f"## {question}\n\n{table(names, records, training)}")
    return "\n\n".join(parts)


def table(names: Sequence[str], records: Sequence[Record], training: str) -> str:
    """Mean (least to greatest) over the seeds at the best rate, as Markdown."""
    measures = list(records[0].validation)
    rows = [["", "rate", *measures, "state, bytes", "of them hidden"]]
    for name in names:
        group = at_best(records)[name]
        rates = sorted({r.rate for r in records if r.configuration == name})
        searched = f" ({len(rates)} of {rates[0]:g} to {rates[-1]:g})" if len(rates) > 1 else ""
        rows.append(
            [
                f"{name} (unfinished)" if next_runs(name, training, records) else name,
                f"{group[0].rate:g}{searched}" if group[0].rate else "picked",
                *(spread([r.final(measure) for r in group]) for measure in measures),
                f"{group[0].state_bytes:,}",
                f"{group[0].hidden_state_bytes:,}",
            ]
        )
    return markdown(rows)


def overview(records: Mapping[str, Sequence[Record]]) -> str:
    """A Markdown table of final losses, for the configurations that every training has.

    Trainings on words have other configurations, and tables of their own.
    """
    best = {name: at_best(kept) for name, kept in records.items() if name not in WORDS}
    names = [name for name in CONFIGURATIONS if all(name in groups for groups in best.values())]
    rows = [["", *(TRAININGS[training].title for training in best)]]
    for name in names:
        losses = [[r.final("loss") for r in groups[name]] for groups in best.values()]
        rows.append([name, *map(spread, losses)])
    return markdown(rows)


def seconds_of(records: Sequence[Record]) -> dict[str, list[float]]:
    """Seconds per step of each run, by configuration."""
    seconds: dict[str, list[float]] = defaultdict(list)
    for record in records:
        seconds[record.configuration].append(record.seconds_per_step)
    return seconds


def seconds_table(training: str) -> str:
    """Seconds per step of runs that were timed one at a time: median (least to greatest)."""
    seconds = seconds_of(read(timings_of(training)))
    rows = [["", "seconds a step"]]
    for name, each in sorted(seconds.items(), key=lambda item: median(item[1])):
        rows.append([name, f"{median(each):.4f} ({min(each):.4f} to {max(each):.4f})"])
    return markdown(rows)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table. The first row is the header."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def spread(values: Sequence[float]) -> str:
    """Mean (least to greatest), and the number of seeds if it is more than usual."""
    seeds = f", {len(values)} seeds" if len(values) > len(SEEDS) else ""
    return f"{fmean(values):.3f} ({min(values):.3f} to {max(values):.3f}{seeds})"


def draw(records: Mapping[str, Sequence[Record]], cost: str) -> Figure:
    """Plot the loss against the cost of an optimizer. Each training has a panel."""
    figure = Figure(figsize=(8 * len(records), 6), dpi=100, layout="constrained")
    panels = figure.subplots(1, len(records), squeeze=False)[0]
    for axes, (training, kept) in zip(panels, records.items(), strict=True):
        groups = {name: group for name, group in at_best(kept).items() if name in DRAWN}
        if cost == "state":
            sizes = {name: group[0].hidden_state_bytes for name, group in groups.items()}
            costs = {name: size / max(sizes.values()) for name, size in sizes.items()}
        else:
            seconds = seconds_of(read(timings_of(training)) or kept)
            costs = {name: median(seconds[name]) for name in groups if name in seconds}
        losses = {name: [r.final("loss") for r in groups[name]] for name in costs}
        axes.set(
            title=f"{TRAININGS[training].title}: mean and range of {len(SEEDS)} seeds",
            xlabel=COSTS[cost],
            ylabel="validation loss, nats per character",
        )
        draw_front(axes, costs, losses)
    return figure


def draw_transfer(records: Mapping[str, Sequence[Record]]) -> Figure:
    """Plot the loss against the rate: a panel per optimizer, a curve per model size."""
    figure = Figure(figsize=(5 * len(TRANSFERRED), 5), dpi=100, layout="constrained")
    panels = figure.subplots(1, len(TRANSFERRED), sharey=True)
    for axes, name in zip(panels, TRANSFERRED, strict=True):
        for place, (training, kept) in enumerate(records.items()):
            losses = {
                r.rate: r.final("loss")
                for r in kept
                if r.configuration == name and r.seed == SEEDS[0]
            }
            if losses:
                rates = sorted(losses)
                style = f"C{place}o-" if training in SIZES else f"C{place}s--"
                label = TRAININGS[training].title.removeprefix("language model, ")
                label = "width 64" if training == SIZES[0] else label
                axes.plot(rates, [losses[rate] for rate in rates], style, label=label)
        axes.set(title=name, xscale="log", xlabel="peak rate of the hidden matrices")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
        axes.grid(color="lightgray", linewidth=0.5)
    panels[0].set_ylabel("validation loss after 300 steps, nats per character")
    for axes in panels:
        if axes.lines:
            axes.legend(fontsize="small")
            break
    return figure


def draw_front(
    axes: Axes, cost: Mapping[str, float], losses: Mapping[str, Sequence[float]]
) -> None:
    """Draw a labelled point for each configuration, and the Pareto front of cost and loss."""
    means = {name: fmean(values) for name, values in losses.items()}
    front = []
    for name in sorted(cost, key=lambda name: (cost[name], means[name])):
        if not front or means[name] < means[front[-1]]:
            front.append(name)
    line = {"where": "post", "color": "lightgray", "linewidth": 6, "zorder": 0}
    axes.step([cost[name] for name in front], [means[name] for name in front], **line)
    for name, values in losses.items():
        errors = [[means[name] - min(values)], [max(values) - means[name]]]
        point = {"fmt": "o", "capsize": 4, "color": COLOURS[name]}
        axes.errorbar([cost[name]], [means[name]], yerr=errors, **point)
    span = max(cost.values()) - min(cost.values()) or 1.0
    for name, height in label_heights(cost, means).items():
        axes.annotate(
            name,
            (cost[name], means[name]),
            xytext=(cost[name] + 0.03 * span, height),
            color=COLOURS[name],
            verticalalignment="center",
            bbox={"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 0},
            arrowprops={"arrowstyle": "-", "color": COLOURS[name], "alpha": 0.3},
        )
    axes.set_xlim(min(cost.values()) - 0.05 * span, max(cost.values()) + 0.5 * span)


def label_heights(cost: Mapping[str, float], means: Mapping[str, float]) -> dict[str, float]:
    """Heights of the labels. A label moves up if it would touch the label below."""
    wide, high = (
        share * (max(values.values()) - min(values.values()))
        for share, values in ((0.5, cost), (0.04, means))
    )
    heights: dict[str, float] = {}
    for name in sorted(means, key=lambda name: means[name]):
        below = [y for other, y in heights.items() if abs(cost[other] - cost[name]) < wide]
        heights[name] = max([means[name], *(y + high for y in below)])
    return heights


class Arguments(argparse.Namespace):
    """The arguments of this program."""

    trainings: list[str]
    run: bool
    time: bool
    workers: int
    seeds: int | None
    only: list[str] | None
    records: Path | None
    others: list[str]


def parse_arguments() -> Arguments:
    parser = argparse.ArgumentParser(description="Compare optimizers, each at its best rate.")
    add = parser.add_argument
    add("trainings", nargs="+", choices=[*TRAININGS, "all"], metavar="TRAINING", help=TITLES)
    add("--run", action="store_true", help="make the runs that are missing")
    add("--time", action="store_true", help="time the drawn configurations, one run at a time")
    add("--workers", type=integer, default=1, help="runs at the same time (default 1)")
    add("--seeds", type=integer, help="seeds at the best rate (default: set by the training)")
    add(
        "--only",
        action="append",
        choices=CONFIGURATIONS,
        metavar="NAME",
        help="only these configurations",
    )
    add("--records", type=Path, help="file of records (default examples/records/TRAINING.jsonl)")
    given = sys.argv[1:]
    cut = given.index("--") if "--" in given else len(given)
    arguments = parser.parse_args(given[:cut], namespace=Arguments())
    arguments.others = given[cut + 1 :]
    if arguments.others and not arguments.records:
        parser.error("runs with arguments after -- need their own file of records: give --records")
    if "all" in arguments.trainings:
        arguments.trainings = list(TRAININGS) if arguments.run else kept_trainings()
    if arguments.records and len(arguments.trainings) > 1:
        parser.error("--records takes only one training")
    return arguments


def kept_trainings() -> list[str]:
    """The trainings with records in `examples/records`."""
    return [name for name in TRAININGS if (FOLDER / "records" / f"{name}.jsonl").exists()]


def file_of(training: str, arguments: Arguments) -> Path:
    return arguments.records or FOLDER / "records" / f"{training}.jsonl"


if __name__ == "__main__":
    main()
