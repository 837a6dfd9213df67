"""Compare optimizers in mlx-lm's trainer: LoRA, DoRA, QLoRA and full fine-tuning.

    python examples/compare_finetuning.py
    python examples/compare_finetuning.py --run
    python examples/compare_finetuning.py --mode lora --optimizer muon --learning-rate 3e-3 --seed 2

The first prints the tables of the records in `examples/records/finetuning.jsonl`. `--run` first
makes the runs that are missing there, one after another. The third makes one run and keeps no
record: each record has such a command. A run trains the small llama of `mlx_maxfactor.finetuning`
on its task for 150 iterations of mlx-lm's trainer, with mlx-lm's defaults: batches of 4, LoRA of
rank 8 and scale 20 in every layer. Each seed has its own model, task and order. `continued` shows
what too high a rate destroys: 20 iterations of full fine-tuning on more of the training text.

`mlx AdamW` gets four rates on seed 1 and two more seeds at the best of them; ours run at the
default rate, which needs no search, on three seeds, and on seed 1 at a third and three times of it.
"""

from __future__ import annotations

import argparse
import io
import json
import shlex
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as mlx_optimizers
import numpy as np
from compare_optimizers import markdown, spread
from mlx.optimizers import Optimizer
from mlx.utils import tree_flatten
from mlx_lm import load
from mlx_lm.lora import CONFIG_DEFAULTS
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm.tuner.datasets import CacheDataset, load_dataset
from mlx_lm.tuner.trainer import TrainingArgs, train
from mlx_lm.tuner.utils import linear_to_lora_layers
from small_llama import build_model, write_more_code, write_task
from tqdm import tqdm

from mlx_maxfactor import create_optimizer

BASELINE = "mlx AdamW"
LOW, HIGH = (1e-4, 3e-4, 5e-4, 1e-3), (3e-4, 1e-3, 2e-3, 3e-3)
BASELINE_RATES = {"lora": LOW, "dora": LOW, "qlora": LOW, "full": HIGH, "continued": LOW}
MODES = tuple(BASELINE_RATES)
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "orthomaxfactor": {},
    "muon": {"hidden": "muon"},
    "adamw": {"hidden": "adamw"},
    "orthomaxfactor, no momentum": {"momentum": 0},
    "orthomaxfactor, floor of full training": {"min_rms": "init"},
    "adafactor": {"hidden": "adafactor"},
}
SEEDS = (1, 2, 3)
FACTORS = (1 / 3, 3)  # of the default rate, on seed 1
ITERATIONS = dict.fromkeys(MODES, 150) | {"continued": 20}
RECORDS = Path(__file__).parent / "records" / "finetuning.jsonl"


@dataclass(frozen=True)
class Run:
    """What is run: a rate of None is the default."""

    mode: str
    optimizer: str
    rate: float | None
    seed: int

    @property
    def command(self) -> str:
        """What repeats it."""
        rate = [] if self.rate is None else [f"--learning-rate={self.rate:g}"]
        options = [f"--mode={self.mode}", f"--optimizer={self.optimizer}", *rate]
        script = "examples/compare_finetuning.py"
        return shlex.join(["python", script, *options, f"--seed={self.seed}"])


@dataclass(frozen=True)
class Record:
    """What came of a run: the validation loss before it and at its end."""

    run: Run
    before: float
    loss: float
    learning_rate: float
    state_bytes: int
    command: str
    platform: str


def main() -> None:
    arguments = parse_arguments()
    if arguments.optimizer:
        run = Run(arguments.mode, arguments.optimizer, arguments.learning_rate, arguments.seed)
        print(json.dumps(asdict(fine_tune(run)), indent=2))
        return
    records = read()
    if arguments.run:
        for run in tqdm(missing(records, arguments.only), unit="run"):
            record = fine_tune(run)
            records.append(record)
            with RECORDS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(record)) + "\n")
    print(report(records))


# Runs


def missing(records: list[Record], only: Sequence[str] | None) -> Iterator[Run]:
    """Runs that there are no records of, those that decide most first."""
    for seeds, factors in ((SEEDS, (None,)), (SEEDS[:1], FACTORS)):
        for name in only or [BASELINE, *OPTIMIZERS]:
            for mode in MODES:
                for run in runs_of(mode, name, seeds, factors, records):
                    if all(run != record.run for record in records):
                        yield run


def runs_of(
    mode: str,
    name: str,
    seeds: Sequence[int],
    factors: Sequence[float | None],
    records: Sequence[Record],
) -> Iterator[Run]:
    """Runs of one optimizer, in the order in which they are made."""
    if name == BASELINE:
        yield from (Run(mode, name, rate, SEEDS[0]) for rate in BASELINE_RATES[mode])
        rates: list[float | None] = [best(mode, name, records).rate]
    else:
        default = default_rate(mode, name, records)
        rates = [None if x is None else float(f"{x * default:.1g}") for x in factors]
    yield from (Run(mode, name, rate, seed) for rate in rates for seed in seeds)


def default_rate(mode: str, name: str, records: Sequence[Record]) -> float:
    found = [r for r in records if r.run == Run(mode, name, None, SEEDS[0])]
    return found[0].learning_rate if found else 0.0


def fine_tune(run: Run) -> Record:
    """Fine-tune as mlx-lm does, and report the validation loss."""
    folder = Path("runs/finetuning")
    source = build_model(folder / f"model_{run.seed}", run.seed)
    write, kind = (write_more_code, "code") if run.mode == "continued" else (write_task, "task")
    data = write(folder / f"{kind}_{run.seed}", run.seed)
    losses: list[float] = []

    class Losses(TrainingCallback):
        def on_val_loss_report(self, val_info: dict) -> None:
            losses.append(val_info["val_loss"])

    with redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as output:
        model, tokenizer, *_ = load(str(source))
        request = SimpleNamespace(data=str(data), train=True, test=False)
        training, validation, _ = load_dataset(request, cast(Any, tokenizer))
        np.random.seed(run.seed)  # mlx-lm draws its batches from it
        mx.random.seed(run.seed)
        prepare(model, run.mode)
        optimizer = make_optimizer(model, run)
        arguments = TrainingArgs(
            iters=ITERATIONS[run.mode],
            val_batches=-1,
            adapter_file=f"{output}/adapters.safetensors",
        )
        for name in ("steps_per_report", "steps_per_eval", "steps_per_save"):
            setattr(arguments, name, 10**9)
        train(
            model,
            optimizer,
            CacheDataset(training),
            CacheDataset(validation),
            arguments,
            training_callback=Losses(),
        )
    arrays: Any = tree_flatten(optimizer.state)
    return Record(
        run,
        losses[0],
        losses[-1],
        float(optimizer.learning_rate),
        sum(array.nbytes for _, array in arrays),
        run.command,
        f"MLX {version('mlx')}, mlx-lm {version('mlx-lm')}",
    )


def prepare(model: Any, mode: str) -> None:
    """Freeze and adapt a model, as ``mlx_lm.lora`` does."""
    if mode == "qlora":
        nn.quantize(model, group_size=64, bits=4)
    model.freeze()
    if mode in ("full", "continued"):
        for layer in model.layers:
            layer.unfreeze()
    else:
        settings = CONFIG_DEFAULTS["lora_parameters"]
        linear_to_lora_layers(model, len(model.layers), settings, use_dora=mode == "dora")


def make_optimizer(model: nn.Module, run: Run) -> Optimizer:
    if run.optimizer == BASELINE:
        assert run.rate is not None
        return mlx_optimizers.AdamW(run.rate)
    options = OPTIMIZERS[run.optimizer]
    return create_optimizer(model, learning_rate=run.rate, pretrained=True, **options)


# Tables


def read() -> list[Record]:
    if not RECORDS.exists():
        return []
    lines = map(json.loads, RECORDS.read_text(encoding="utf-8").splitlines())
    return [Record(**{**line, "run": Run(**line["run"])}) for line in lines]


def best(mode: str, name: str, records: Sequence[Record]) -> Run:
    """The run with the lowest loss on the first seed."""
    of = [r for r in records if (r.run.mode, r.run.optimizer, r.run.seed) == (mode, name, SEEDS[0])]
    return min(of, key=lambda r: r.loss).run


def report(records: Sequence[Record]) -> str:
    """Final losses at the default rates, and what other rates give on the first seed."""
    names = [n for n in (BASELINE, *OPTIMIZERS) if any(r.run.optimizer == n for r in records)]
    start = {mode: [r.before for r in records if r.run.mode == mode] for mode in MODES}
    modes = [mode for mode in MODES if start[mode]]
    final = [["validation loss", *modes], ["before", *(f"{fmean(start[m]):.3f}" for m in modes)]]
    searched = [["rate: loss on seed 1", *modes]]
    for name in names:
        final.append([name, *(cell(mode, name, records) for mode in modes)])
        searched.append([name, *(rates(mode, name, records) for mode in modes)])
    return "\n\n".join(markdown(rows) for rows in (final, searched))


def cell(mode: str, name: str, records: Sequence[Record]) -> str:
    """Mean (least to greatest) over the seeds, and the difference to the baseline's."""
    losses, others = (losses_of(mode, each, records) for each in (name, BASELINE))
    if not losses:
        return ""
    if name == BASELINE:
        return f"{spread(losses)} at {best(mode, name, records).rate:g}"
    return f"{spread(losses)}, {fmean(losses) - fmean(others):+.3f}"


def losses_of(mode: str, name: str, records: Sequence[Record]) -> list[float]:
    of = [r for r in records if (r.run.mode, r.run.optimizer) == (mode, name)]
    if not of:
        return []
    rate = best(mode, name, records).rate if name == BASELINE else None
    return [r.loss for r in of if r.run.rate == rate]


def rates(mode: str, name: str, records: Sequence[Record]) -> str:
    """Every rate that was run on the first seed; in bold the default or the baseline's best."""
    of = [r for r in records if (r.run.mode, r.run.optimizer, r.run.seed) == (mode, name, SEEDS[0])]
    parts = []
    for record in sorted(of, key=lambda r: r.learning_rate):
        text = f"{record.learning_rate:.3g}: {record.loss:.3f}"
        chosen = best(mode, name, records) if name == BASELINE else Run(mode, name, None, SEEDS[0])
        parts.append(f"**{text}**" if record.run == chosen else text)
    return ", ".join(parts)


class Arguments(argparse.Namespace):
    """The command line, typed."""

    run: bool
    only: list[str] | None
    mode: str
    optimizer: str | None
    learning_rate: float | None
    seed: int


def parse_arguments() -> Arguments:
    parser = argparse.ArgumentParser(description="Compare optimizers in mlx-lm's trainer.")
    add, names = parser.add_argument, [BASELINE, *OPTIMIZERS]
    add("--run", action="store_true", help="make the runs that are missing")
    add("--only", action="append", choices=names, metavar="NAME", help="of these alone")
    add("--mode", choices=MODES, default="lora", help="of one run (default lora)")
    add("--optimizer", choices=names, metavar="NAME", help=f"one run: {'; '.join(names)}")
    add("--learning-rate", type=float, help="of one run (default: the optimizer's own)")
    add("--seed", type=int, default=1, help="of one run (default 1)")
    arguments = parser.parse_args(namespace=Arguments())
    if arguments.optimizer == BASELINE and arguments.learning_rate is None:
        parser.error(f"{BASELINE} has no default rate here: give --learning-rate")
    return arguments


if __name__ == "__main__":
    main()
