r"""Compare optimizers and sparse rows on the reasoning example.

    python examples/compare_reasoning.py
    python examples/compare_reasoning.py --run

The first command prints the tables of `records/reasoning.jsonl`. `--run` first makes the missing
runs, one after the other, and draws puzzles being solved. Each record has the command that repeats
its run. The rate of each configuration is the best of a few, found with a seed that is not in the
tables. NOTES.md has the other rates.
"""

from __future__ import annotations

import argparse
import json
import resource
import shlex
import shutil
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from compare_optimizers import FOLDER, markdown, run_example, spread
from tqdm import tqdm
from training import integer

RECORDS = FOLDER / "records" / "reasoning.jsonl"
DEFAULTS, PARTS = "{}, as the example is", "{}, shorter: {}"
SHORTER = {"rules": ("--steps=800",), "sudoku": ("--steps=400",)}
ONE = "--option=use_separate_puzzle_optimizer=false"
CONFIGURATIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "rules": {
        "MaxFactor, SignSGD sparse": (),
        "MaxFactor, SignSGD dense": ("--puzzle-option=sparse_rows=false",),
        "MaxFactor, puzzles on the rest's AdamW": (
            "--puzzle-optimizer=rest",
            "--rest-learning-rate=0.01",
        ),
        "Muon, SignSGD sparse": ("--optimizer=muon", "--puzzle-learning-rate=0.1"),
        "hrm: AdamW, SignSGD sparse at 100x": ("--optimizer=hrm", "--learning-rate=0.001"),
        "hrm: AdamW, SignSGD sparse at 7.5x": ("--optimizer=hrm", "--puzzle-learning-rate=0.03"),
        "hrm: one AdamW": ("--optimizer=hrm", ONE),
    },
    "sudoku": {
        "MaxFactor": (),
        "Muon": ("--optimizer=muon",),
        "hrm: AdamW, SignSGD sparse at 100x": ("--optimizer=hrm", "--learning-rate=0.006"),
        "hrm: one AdamW": ("--optimizer=hrm", ONE, "--learning-rate=0.016"),
    },
}


@dataclass(frozen=True)
class Record:
    """One run and its results."""

    command: str
    cpu_seconds: float  # of the whole run; other load on the machine does not count
    state_bytes: int
    validation: dict[str, float]


def main() -> None:
    arguments = parse_arguments()
    records = read(arguments.records)
    if arguments.run:
        for command in tqdm(wanted(arguments), unit="run"):
            if shlex.join(command) not in records:
                record = run_one(command, arguments.records.parent)
                records[record.command] = record
                with arguments.records.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(record)) + "\n")
    if not records:
        sys.exit(f"compare_reasoning.py: error: no records in {arguments.records}: use --run")
    print(report(records, arguments.others))


def commands(kind: str, name: str, short: Sequence[str], seeds: int) -> list[list[str]]:
    """The command of each seed."""
    given = ["python", "examples/train_reasoning.py", kind, *short, *CONFIGURATIONS[kind][name]]
    return [[*given, f"--seed={seed}"] for seed in range(1, seeds + 1)]


def wanted(arguments: Arguments) -> list[list[str]]:
    """The commands of all runs: first the default runs, then the shorter ones, seed by seed."""
    kinds = [arguments.only] if arguments.only else list(CONFIGURATIONS)
    whole, shorter = [], []
    for kind in kinds:
        names, short = list(CONFIGURATIONS[kind]), [*SHORTER[kind], *arguments.others]
        whole.append(commands(kind, names[0], arguments.others, arguments.seeds))
        shorter += [commands(kind, name, short, arguments.seeds) for name in names]
    return [run for each in (whole, shorter) for seed in zip(*each, strict=True) for run in seed]


def run_one(command: Sequence[str], pictures: Path) -> Record:
    """Run the example and read its results. Save the picture of the default run."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory() as folder:
        run = run_example("train_reasoning.py", command[2:], folder)
        if command[3:] == ["--seed=1"]:
            shutil.copy(Path(folder) / "solving.png", pictures / f"solving_{command[2]}.png")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    final = {measure: round(values[-1], 4) for measure, values in run["validation"].items()}
    return Record(shlex.join(command), round(seconds, 1), run["state_bytes"], final)


def read(path: Path) -> dict[str, Record]:
    if not path.exists():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines()
    return {record.command: record for record in (Record(**json.loads(line)) for line in lines)}


def report(records: Mapping[str, Record], others: Sequence[str] = ()) -> str:
    """Two Markdown tables for each kind: the defaults, and the shorter comparison."""
    parts = []
    for kind, names in CONFIGURATIONS.items():
        short = [*SHORTER[kind], *others]
        tables = {
            DEFAULTS.format(kind): dict.fromkeys(list(names)[:1], others),
            PARTS.format(kind, " ".join(short)): dict.fromkeys(names, short),
        }
        for title, rows in tables.items():
            found = {
                name: [
                    r for c in commands(kind, name, given, 99) if (r := records.get(shlex.join(c)))
                ]
                for name, given in rows.items()
            }
            if any(found.values()):
                parts.append(f"## {title}\n\n{table(found)}")
    return "\n\n".join(parts)


def table(found: Mapping[str, Sequence[Record]]) -> str:
    """A Markdown table: mean (least to greatest) over the seeds."""
    rows = [["", "seeds", "exact match", "cells", "loss", "state, bytes", "CPU seconds"]]
    for name, records in found.items():
        if records:
            values: dict[str, list[float]] = defaultdict(list)
            for record in records:
                for measure, value in record.validation.items():
                    values[measure].append(value)
            rows.append(
                [
                    name,
                    str(len(records)),
                    *(spread(values[measure]) for measure in ("exact match", "cells", "loss")),
                    f"{records[0].state_bytes:,}",
                    f"{sum(r.cpu_seconds for r in records) / len(records):.0f}",
                ]
            )
    return markdown(rows)


class Arguments(argparse.Namespace):
    """The arguments of this program."""

    run: bool
    seeds: int
    only: str | None
    records: Path
    others: list[str]


def parse_arguments() -> Arguments:
    parser = argparse.ArgumentParser(description="Compare optimizers on the reasoning example.")
    add = parser.add_argument
    add("--run", action="store_true", help="make the runs that are missing")
    add("--seeds", type=integer, default=3, help="seeds per configuration (default 3)")
    add("--only", choices=CONFIGURATIONS, help="only this kind of puzzles")
    add("--records", type=Path, default=RECORDS, help="file of records")
    given = sys.argv[1:]
    cut = given.index("--") if "--" in given else len(given)
    arguments = parser.parse_args(given[:cut], namespace=Arguments())
    arguments.others = given[cut + 1 :]
    return arguments


if __name__ == "__main__":
    main()
