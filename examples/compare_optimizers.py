r"""Compare optimizers on one of the examples, each at its best rate, from records that are kept.

    python examples/compare_optimizers.py speech
    python examples/compare_optimizers.py language_model --run --workers 2

The first prints the table and draws the plots of the records in `examples/records`; `--run` first
makes the runs that are missing there. Every configuration gets the same search: four rates of a
ladder on seed 1, more while the best is the lowest or the highest of them, then two more seeds at
the best. Each run is a command that anyone may give alone: the record has it. What follows `--` is
handed on to every run, whose records belong in a file of their own (`--records`).
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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, median

from matplotlib.figure import Figure
from momentum_variants import VARIANTS
from tqdm import tqdm
from training import integer

FOLDER = Path(__file__).parent
LADDER = tuple(float(f"{m}e{e}") for e in range(-5, 1) for m in (1, 1.5, 2, 3, 5, 7))
FIRST_RATES = 4
SEEDS = (1, 2, 3)


@dataclass(frozen=True)
class Configuration:
    """Arguments of an example, and the lowest of the first four rates to try, by task."""

    arguments: tuple[str, ...]
    first_rates: dict[str, float]
    searched: str = "--learning-rate"


SPEECH_AND_TEXT = {"speech": 0.01, "language_model": 0.02}


def maxfactor(first_rates: dict[str, float] = SPEECH_AND_TEXT, **options: object) -> Configuration:
    """MaxFactor with these options on the hidden matrices."""
    return Configuration(arguments_of("--option", options), first_rates)


def mel_axis(**options: object) -> Configuration:
    """The best MaxFactor on the hidden matrices, and one with these options on the first layer."""
    hidden = ("--option=momentum=0.9", "--option=cautious=true", "--learning-rate=0.015")
    first = arguments_of("--convolution-option", options)
    return Configuration((*hidden, *first), {"speech": 0.01}, "--convolution-learning-rate")


def arguments_of(flag: str, options: dict[str, object]) -> tuple[str, ...]:
    return tuple(f"{flag}={name}={json.dumps(value)}" for name, value in options.items())


CONFIGURATIONS = {
    "MaxFactor, no momentum": maxfactor({"speech": 0.015, "language_model": 0.05}, momentum=0),
    "MaxFactor, momentum": maxfactor(momentum=0.9, cautious=False),
    "MaxFactor, Nesterov": maxfactor(momentum=0.9, cautious=False, nesterov=True),
    "MaxFactor, cautious": maxfactor(momentum=0.9, cautious=True),
    "MaxFactor, cautious, bf16": maxfactor(momentum=0.9, cautious=True, state_dtype="bfloat16"),
    "MaxFactor, FAM": maxfactor(momentum={"bands": 10}, cautious=False),
    "MaxFactor, cautious FAM": maxfactor(momentum={"bands": 10}, cautious=True),
    "AdamW": Configuration(("--optimizer=adamw",), {"speech": 1e-3, "language_model": 2e-3}),
    "Muon": Configuration(("--optimizer=muon",), {"speech": 0.015, "language_model": 0.02}),
    "Muon, rest MaxFactor": Configuration(
        (
            "--optimizer=muon",
            "--rest=maxfactor",
            *arguments_of("--rest-option", {"momentum": 0.9, "cautious": True, "min_rms": 1}),
        ),
        {"speech": 0.015, "language_model": 0.02},
    ),
    "mlx Adafactor": Configuration(("--optimizer=mlx_adafactor",), SPEECH_AND_TEXT),
    # Where frequency-adaptive momentum (FAM) could be true, and other rules for it.
    "mel axis: no momentum": mel_axis(momentum=0),
    "mel axis: momentum": mel_axis(momentum=0.9, cautious=True),
    "mel axis: FAM": mel_axis(momentum={"bands": 10}, cautious=True),
    **{
        f"mel axis: {variant.replace('_', ' ')}": mel_axis(
            momentum={"bands": 10, "variant": variant}, cautious=True
        )
        for variant in VARIANTS
        if variant != "published"
    },
}


@dataclass(frozen=True)
class Record:
    """One run: what was run, where, and what came of it."""

    configuration: str
    rate: float
    seed: int
    command: str
    platform: str
    workers: int
    state_bytes: int
    hidden_state_bytes: int
    seconds_per_step: float  # median, with `workers` runs side by side
    validation: dict[str, float | None]

    def final(self, measure: str) -> float:
        """At the end of the run; infinite if it was not finite."""
        value = self.validation[measure]
        return math.inf if value is None else value


def main() -> None:
    arguments = parse_arguments()
    path = arguments.records or FOLDER / "records" / f"{arguments.task}.jsonl"
    records = read(path)
    if arguments.run:
        records = run_missing(records, path, arguments)
    if not records:
        sys.exit(f"compare_optimizers.py: error: {path} holds no records: make them with --run")
    print(table(records, arguments.task))
    picture = path.with_suffix(".png")
    draw(records, arguments.task).savefig(picture)
    print(f"\npicture: {picture}")


# Runs


def run_missing(records: list[Record], path: Path, arguments: Arguments) -> list[Record]:
    """Make every run that the search asks for next, until it asks for none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    run = partial(run_one, arguments=arguments)
    while missing := [
        (name, rate, seed)
        for name in arguments.only or CONFIGURATIONS
        if arguments.task in CONFIGURATIONS[name].first_rates
        for rate, seed in next_runs(name, arguments.task, records)
    ]:
        with ThreadPoolExecutor(arguments.workers) as pool, path.open("a") as file:
            running = [pool.submit(run, *what) for what in missing]
            for done in tqdm(as_completed(running), total=len(running), desc=arguments.task):
                records.append(done.result())
                file.write(json.dumps(asdict(records[-1])) + "\n")
                file.flush()
    return records


def next_runs(name: str, task: str, records: Sequence[Record]) -> list[tuple[float, int]]:
    """Rates and seeds that the search of one configuration asks for next."""
    losses = {(r.rate, r.seed): r.final("loss") for r in records if r.configuration == name}
    start = LADDER.index(CONFIGURATIONS[name].first_rates[task])
    first = LADDER[start : start + FIRST_RATES]
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
    return [(best, seed) for seed in SEEDS if (best, seed) not in losses]


def run_one(name: str, rate: float, seed: int, arguments: Arguments) -> Record:
    """Run the example as a user would, and read what it wrote."""
    configuration = CONFIGURATIONS[name]
    script = f"train_{arguments.task}.py"
    options = [*configuration.arguments, f"{configuration.searched}={rate:g}", f"--seed={seed}"]
    options += arguments.others
    with tempfile.TemporaryDirectory() as folder:
        only_the_end = ["--eval-every=999999", "--save-every=999999", f"--output={folder}"]
        done = subprocess.run(
            [sys.executable, str(FOLDER / script), *options, *only_the_end],
            # A thread each: several of OpenBLAS's a run would wait for those of the run beside it.
            env={"OPENBLAS_NUM_THREADS": "1", **os.environ},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{name} at {rate:g}, seed {seed}: {done.stderr[-2000:]}")
        run = json.loads((Path(folder) / "curves.json").read_text())["runs"][0]
    return Record(
        name,
        rate,
        seed,
        shlex.join(["python", f"examples/{script}", *options]),
        f"MLX {version('mlx')}, {platform.system()} {platform.machine()}",
        arguments.workers,
        run["state_bytes"],
        run["hidden_state_bytes"],
        round(median(run["seconds_per_step"]), 4),
        {measure: values[-1] for measure, values in run["validation"].items()},
    )


def read(path: Path) -> list[Record]:
    if not path.exists():
        return []
    return [Record(**json.loads(line)) for line in path.read_text().splitlines()]


# Table and picture


def at_best(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Of each configuration all seeds at its best rate, the least mean loss first."""
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


def table(records: Sequence[Record], task: str) -> str:
    """Markdown: mean (least to greatest) over the seeds at the best rate."""
    measures = list(records[0].validation)
    head = ["hidden matrices", "rate", *measures, "state, bytes", "of them hidden", "s a step"]
    rows = [head, ["---"] * len(head)]
    for name, group in at_best(records).items():
        spreads = [spread([r.final(measure) for r in group]) for measure in measures]
        rates = sorted({r.rate for r in records if r.configuration == name})
        low, high = rates[0], rates[-1]
        rows.append(
            [
                f"{name} (unfinished)" if next_runs(name, task, records) else name,
                f"{group[0].rate:g} ({len(rates)} of {low:g} to {high:g})",
                *spreads,
                f"{group[0].state_bytes:,}",
                f"{group[0].hidden_state_bytes:,}",
                f"{median(r.seconds_per_step for r in group):.3f}",
            ]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def spread(values: Sequence[float]) -> str:
    """Mean (least to greatest)."""
    return f"{fmean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def draw(records: Sequence[Record], task: str) -> Figure:
    """Loss by rate on the first seed, and loss at the best rate with the spread of the seeds."""
    best = at_best(records)
    figure = Figure(figsize=(14, 3 + 0.35 * len(best)), dpi=100, layout="constrained")
    rates, losses = figure.subplots(1, 2)
    labels = []
    for i, (name, group) in enumerate(best.items()):
        style = {"color": f"C{i % 10}", "marker": "osv^D"[i // 10]}
        first = sorted(
            (r for r in records if r.configuration == name and r.seed == SEEDS[0]),
            key=lambda r: r.rate,
        )
        if CONFIGURATIONS[name].searched == "--learning-rate":
            rates.plot([r.rate for r in first], [r.final("loss") for r in first], **style)
        values = [r.final("loss") for r in group]
        mean = fmean(values)
        errors = [[mean - min(values)], [max(values) - mean]]
        losses.errorbar([mean], [i], xerr=errors, capsize=4, **style)
        labels.append(f"{name}, {group[0].hidden_state_bytes / 1000:,.0f} kB")
    means = [mean_loss(group) for group in best.values()]  # in rising order
    low, high = means[0], means[-1]
    span = max(high - low, 0.02 * low)
    rates.set(
        title=f"{task}, seed {SEEDS[0]}",
        xlabel="peak rate on hidden matrices",
        xscale="log",
        ylabel="final validation loss, nats per character",
        ylim=(low - 0.2 * span, high + 0.8 * span),
    )
    losses.set(
        title=f"at the best rate: mean, least, greatest of {len(SEEDS)} seeds",
        xlabel="final validation loss, nats per character",
        yticks=range(len(labels)),
        yticklabels=labels,
    )
    losses.invert_yaxis()
    losses.grid(axis="x", alpha=0.3)
    return figure


class Arguments(argparse.Namespace):
    """The command line, typed."""

    task: str
    run: bool
    workers: int
    only: list[str] | None
    records: Path | None
    others: list[str]


def parse_arguments() -> Arguments:
    parser = argparse.ArgumentParser(description="Compare optimizers, each at its best rate.")
    add = parser.add_argument
    add("task", choices=["speech", "language_model"])
    add("--run", action="store_true", help="make the runs that are missing")
    add("--workers", type=integer, default=1, help="runs side by side (default 1)")
    add("--only", action="append", choices=CONFIGURATIONS, metavar="NAME", help="of these alone")
    add("--records", type=Path, help="file of records (default examples/records/TASK.jsonl)")
    given = sys.argv[1:]
    cut = given.index("--") if "--" in given else len(given)
    arguments = parser.parse_args(given[:cut], namespace=Arguments())
    arguments.others = given[cut + 1 :]
    if arguments.others and not arguments.records:
        parser.error("runs with arguments of their own need a file of their own: give --records")
    return arguments


if __name__ == "__main__":
    main()
