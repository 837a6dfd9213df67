"""The code that the training examples share: loop, checkpoints, tables, command line.

`make_optimizer` and `compiled_step` use the library. The rest is an ordinary MLX program.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from mlx.optimizers import Adafactor as MlxAdafactor
from mlx.optimizers import AdamW as MlxAdamW
from mlx.optimizers import Optimizer
from mlx.utils import tree_flatten
from profiling import profile_step
from tqdm import tqdm
from variants import VARIANTS, NorMuon

from mlx_maxfactor import (
    OPTIMIZERS,
    CheckpointError,
    FrequencyAdaptiveMomentum,
    OptimizerName,
    RoutedOptimizer,
    create_optimizer,
    load_checkpoint,
    save_checkpoint,
)
from mlx_maxfactor.commands.terminal import OneLineParser, catching_interrupts
from mlx_maxfactor.factory import HIDDEN_ROLES

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
PEERS: dict[str, Callable[..., Optimizer]] = {
    "mlx_adafactor": partial(MlxAdafactor, relative_step=False),
    "mlx_adamw": MlxAdamW,
    "normuon": NorMuon,
}
NAMES = (*OPTIMIZERS, *PEERS)  # for hidden matrices
READ_EVERY = 10  # steps between two records of the loss: each record waits for the device

Batch = tuple[mx.array, ...]


class Task(Protocol):
    """What a program trains: a model, its data, its loss."""

    @property
    def identity(self) -> str:
        """Identifies the data, so that a run never resumes with other data."""
        ...

    @property
    def baselines(self) -> Mapping[str, Mapping[str, float]]:
        """Measures (named as in `validate`) of guesses that ignore the input, by name."""
        ...

    def model(self) -> nn.Module:
        """A new model. Its weights come only from MLX's global random state."""
        ...

    def rules(self) -> dict[str, Any]:
        """Rules for what the router cannot know."""
        ...

    def training_batch(self, random: np.random.Generator) -> Batch:
        """The next random batch."""
        ...

    def loss(self, model: nn.Module, *batch: mx.array) -> mx.array:
        """The mean loss over the batch, in nats."""
        ...

    def validate(self, model: nn.Module) -> dict[str, float]:
        """The loss on held-out data, and other measures, by name."""
        ...

    def sample(self, model: nn.Module) -> str:
        """A text that the model produces."""
        ...

    @property
    def watched(self) -> Sequence[str]:
        """Paths of two layers whose frequency bands are drawn."""
        ...


@dataclass
class Run:
    """The results of one training."""

    optimizer: str
    state_bytes: int
    hidden_state_bytes: int
    steps: list[int] = field(default_factory=list)
    training_loss: list[float] = field(default_factory=list)  # mean since the previous entry
    learning_rate: list[float] = field(default_factory=list)
    seconds_per_step: list[float] = field(default_factory=list)
    validation_steps: list[int] = field(default_factory=list)
    validation: dict[str, list[float]] = field(default_factory=dict)
    bands: dict[str, list[list[list[float]]]] = field(default_factory=dict)  # [step][share, μ]
    saved_steps: list[int] = field(default_factory=list)  # steps of the checkpoints it still has
    skipped: int = 0
    sample: str = ""

    @property
    def final(self) -> dict[str, float]:
        """Each measure at the last validation."""
        return {name: values[-1] for name, values in self.validation.items()}


# Training


def train_all(
    task: Task,
    rates: Mapping[str, float],
    title: str,
    arguments: Arguments,
    make: Callable[..., RoutedOptimizer] | None = None,
) -> list[Run]:
    """Train with each optimizer of the command line. Print and draw the results.

    `make` replaces `make_optimizer`, if it is given.
    """
    names = arguments.compare or [arguments.optimizer]
    make = make or make_optimizer
    try:
        runs = [train(name, task, rates, arguments, make) for name in names]
    except CheckpointError as problem:
        advice = "\ngive another --output, or start without --resume" if arguments.resume else ""
        sys.exit(f"{Path(sys.argv[0]).name}: error: {problem}{advice}")
    except KeyboardInterrupt as stop:
        print(f"\n{str(stop) or 'interrupted during a step'}", file=sys.stderr)
        sys.exit(130)
    print_results(runs, task)
    save_results(runs, task, title, arguments.output)
    return runs


def run_main(main: Callable[[], None]) -> None:
    """Run a program. Ctrl-C outside of training also prints a single line."""
    try:
        main()
    except KeyboardInterrupt:
        print("\ninterrupted outside of training", file=sys.stderr)
        sys.exit(130)


def train(
    name: str,
    task: Task,
    rates: Mapping[str, float],
    arguments: Arguments,
    make: Callable[..., RoutedOptimizer],
) -> Run:
    """Train a new model. Its initial weights depend only on the seed."""
    mx.random.seed(arguments.seed)
    model = task.model()
    model.set_dtype(DTYPES[arguments.dtype])
    optimizer = make(name, model, task.rules(), rates, arguments)
    plan = optimizer.plan
    print(plan, flush=True)

    hidden = sum(entry.state_bytes for entry in plan if entry.role in HIDDEN_ROLES)
    run = Run(name, plan.state_bytes, hidden)
    step = compiled_step(model, optimizer, task)
    random = np.random.default_rng(arguments.seed)
    first = resume(run, task, model, optimizer, random, arguments) if arguments.resume else 0
    if arguments.profile:
        print_profile(task, model, optimizer, arguments)
    losses: list[mx.array] = []
    start = time.perf_counter()
    with (
        tqdm(desc=name, total=arguments.steps, initial=first, unit="step") as progress,
        catching_interrupts(
            lambda: progress.set_postfix_str("stopping after this step")
        ) as interrupts,
    ):
        progress.set_postfix_str("compiling the first step")
        for done in range(first + 1, arguments.steps + 1):
            losses.append(step(*task.training_batch(random)))
            progress.update()
            mx.async_eval(losses[-1], model.state, optimizer.state)
            stops, last = bool(interrupts), done == arguments.steps
            validates = done % arguments.eval_every == 0 or last
            saves = done % arguments.save_every == 0 or last or stops
            if done % READ_EVERY == 0 or validates or saves:
                record(run, done, losses, start, optimizer, task)
                progress.set_postfix_str(
                    f"loss {run.training_loss[-1]:.3f}, rate {run.learning_rate[-1]:.2g}"
                )
                if validates:
                    run.validation_steps.append(done)
                    for measure, value in task.validate(model).items():
                        run.validation.setdefault(measure, []).append(value)
                if saves:
                    save(run, task, model, optimizer, random, done, arguments)
                losses, start = [], time.perf_counter()
            if stops:
                path = checkpoint(name, done, arguments)
                raise KeyboardInterrupt(f"{path} has {done} steps; {how_to_resume()}")
    run.skipped = int(optimizer.skipped)
    run.sample = task.sample(model)
    return run


def record(
    run: Run,
    done: int,
    losses: list[mx.array],
    start: float,
    optimizer: RoutedOptimizer,
    task: Task,
) -> None:
    """Add the steps since the last record to the curves. Waits for the device."""
    run.steps.append(done)
    run.training_loss.append(float(mx.mean(mx.stack(losses))))
    run.learning_rate.append(float(optimizer.learning_rate))
    run.seconds_per_step.append((time.perf_counter() - start) / len(losses))
    record_bands(run, optimizer, task.watched)


def make_optimizer(
    name: str,
    model: nn.Module,
    rules: Mapping[str, Any],
    rates: Mapping[str, float],
    arguments: Arguments,
) -> RoutedOptimizer:
    """Hidden matrices go to the named optimizer, the rest to AdamW, both on one schedule.

    If neither the command line nor `rates` has a rate, the library picks one for `--steps`.
    """
    rate = arguments.learning_rate or rates.get(name)
    options = dict(arguments.option)
    peer = PEERS[name](rate, **options) if name in PEERS else None
    return create_optimizer(
        model,
        hidden=peer or cast(OptimizerName, name),
        rest=(peer or cast(Any, name)) if arguments.rest == "same" else arguments.rest,
        total_steps=arguments.steps,
        learning_rate=None if peer else rate,
        rest_learning_rate=None if arguments.rest == "same" else arguments.rest_learning_rate,
        rules=rules,
        max_grad_norm=1.0,
        skip_nonfinite=True,
        rounding=arguments.rounding,
        seed=arguments.seed,
        rest_options=dict(arguments.rest_option),
        **({} if peer else options),
    )


def compiled_step(model: nn.Module, optimizer: Optimizer, task: Task) -> Callable[..., mx.array]:
    """A compiled function that makes one training step in place."""
    state = [model.state, optimizer.state]
    loss_and_gradients = nn.value_and_grad(model, partial(task.loss, model))

    @partial(mx.compile, inputs=state, outputs=state)
    def step(*batch: mx.array) -> mx.array:
        loss, gradients = loss_and_gradients(*batch)
        optimizer.update(model, gradients)
        return loss

    return step


def print_profile(
    task: Task, model: nn.Module, optimizer: RoutedOptimizer, arguments: Arguments
) -> None:
    """Print where a step's time and memory go. The training is not affected."""
    batch = task.training_batch(np.random.default_rng(arguments.seed))
    print(profile_step(model, optimizer, task.loss, *batch, rounds=25), flush=True)


def record_bands(run: Run, optimizer: RoutedOptimizer, watched: Sequence[str]) -> None:
    """Record each band's share of the gradient's power and its momentum, if there are bands."""
    for member in optimizer.optimizers:
        momentum = getattr(member, "momentum", None)
        if not isinstance(momentum, FrequencyAdaptiveMomentum):
            continue
        states: Any = tree_flatten(member.state, is_leaf=has_bands)
        for path, state in states:
            if path in watched:
                share, decay, _ = momentum.response(state)
                values: Any = mx.concatenate([share, decay]).tolist()
                run.bands.setdefault(path, []).append(values)


def has_bands(node: Any) -> bool:
    return isinstance(node, dict) and "power" in node


# Checkpoints


def save(
    run: Run,
    task: Task,
    model: nn.Module,
    optimizer: RoutedOptimizer,
    random: np.random.Generator,
    done: int,
    arguments: Arguments,
) -> None:
    """Save the run with its curves and the state of its data. Keep only the last few files."""
    run.saved_steps = [*(step for step in run.saved_steps if step != done), done]
    path = checkpoint(run.optimizer, done, arguments)
    data = {"identity": task.identity, "order": random.bit_generator.state}
    save_checkpoint(path, model, optimizer, done=done, run=asdict(run), data=data)
    for step in run.saved_steps[: -arguments.keep]:
        checkpoint(run.optimizer, step, arguments).unlink(missing_ok=True)
    del run.saved_steps[: -arguments.keep]


def resume(
    run: Run,
    task: Task,
    model: nn.Module,
    optimizer: RoutedOptimizer,
    random: np.random.Generator,
    arguments: Arguments,
) -> int:
    """Load the newest checkpoint, if there is one. Return its number of steps."""
    for path in checkpoints(run.optimizer, arguments)[:1]:
        extra = load_checkpoint(path, model, optimizer)
        if extra["data"]["identity"] != task.identity:
            raise CheckpointError(f"{path} was trained with other data or other batches")
        vars(run).update(extra["run"])
        run.saved_steps = run.saved_steps or [extra["done"]]  # older files have no list
        random.bit_generator.state = extra["data"]["order"]
        print(f"resuming {path} after {extra['done']} steps")
        return extra["done"]
    print("no checkpoint to resume: starting from the beginning")
    return 0


def checkpoint(name: str, done: int, arguments: Arguments) -> Path:
    return arguments.output / f"{name}-{done:06}.safetensors"


def checkpoints(name: str, arguments: Arguments) -> list[Path]:
    """All checkpoints, the newest first. An older run in this folder may have more steps."""
    files = arguments.output.glob(f"{name}-*.safetensors")
    return sorted(files, key=lambda file: (file.stat().st_mtime_ns, file), reverse=True)


# Ctrl-C


def how_to_resume() -> str:
    """The command that resumes an interrupted run."""
    again = [Path(sys.executable).name, *(a for a in sys.argv if a != "--resume"), "--resume"]
    return f"continue with: {shlex.join(again)}"


# Results


def print_results(runs: Sequence[Run], task: Task) -> None:
    """Print the baselines and the runs as a table, then a sample of each model."""
    measures = list(runs[0].final)
    row = "{:16}" + " {:>14}" * (len(measures) + 2) + " {:>8}"
    print("\n" + row.format("", *(f"{m}," for m in measures), "optimizer", "median", "steps"))
    units = ("validation" for _ in measures)
    print(row.format("", *units, "state, bytes", "seconds a step", "skipped"))
    for name, values in task.baselines.items():
        cells = (f"{values[m]:.3f}" if m in values else "" for m in measures)
        print(row.format(name, *cells, "", "", "").rstrip())
    for run in runs:
        seconds = f"{np.median(run.seconds_per_step):.3f}"
        values = (f"{value:.3f}" for value in run.final.values())
        print(row.format(run.optimizer, *values, f"{run.state_bytes:,}", seconds, run.skipped))
    for run in runs:
        print(f"\n{run.optimizer} writes:\n{run.sample}")


def save_results(runs: Sequence[Run], task: Task, title: str, folder: Path) -> None:
    """Write curves.json, curves.png, and bands.png if an optimizer has frequency bands."""
    curves = {"baselines": task.baselines, "runs": [asdict(run) for run in runs]}
    finite = json.loads(json.dumps(curves), parse_constant=lambda _: None)  # JSON has no NaN
    (folder / "curves.json").write_text(json.dumps(finite), encoding="utf-8")

    figure = Figure(figsize=(12, 8), dpi=100, layout="constrained")
    losses, rates = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    draw_losses(losses, runs, task.baselines)
    losses.set_title(f"{title}: validation loss (thick), training loss (thin)")
    for i, run in enumerate(runs):
        rates.plot(run.steps, run.learning_rate, f"C{i}")
    rates.set(xlabel="step", ylabel="rate of hidden matrices", yscale="log")
    figure.savefig(folder / "curves.png")
    print(f"\ncurves: {folder / 'curves.png'} and {folder / 'curves.json'}")
    for run in runs:
        if run.bands:
            draw_bands(run).savefig(folder / f"bands-{run.optimizer}.png")
            print(f"frequency bands: {folder / f'bands-{run.optimizer}.png'}")


def draw_losses(
    axes: Axes, runs: Sequence[Run], baselines: Mapping[str, Mapping[str, float]]
) -> None:
    guesses = {name: values["loss"] for name, values in baselines.items() if "loss" in values}
    for i, run in enumerate(runs):
        label = f"{run.optimizer}, {run.final['loss']:.3f} at the end"
        axes.plot(run.steps, run.training_loss, f"C{i}", linewidth=0.7, alpha=0.7)
        axes.plot(run.validation_steps, run.validation["loss"], f"C{i}o-", linewidth=2, label=label)
    for name, loss in guesses.items():
        axes.axhline(loss, color="gray", linestyle="--", label=name)
    seen = [*guesses.values(), *(loss for run in runs for loss in run.validation["loss"])]
    # Leave out the high losses of the first few steps.
    axes.set_ylim(top=1.05 * max(filter(math.isfinite, seen), default=1.0))
    axes.set_ylabel("cross-entropy, nats")
    axes.legend()


def draw_bands(run: Run) -> Figure:
    """Draw each watched layer's bands: their shares of the gradient's power and their momentum."""
    figure = Figure(figsize=(12, 4 * len(run.bands)), dpi=100, layout="constrained")
    rows = figure.subplots(len(run.bands), 2, sharex=True, squeeze=False)
    colours = colormaps["viridis"]
    for (share, decay), (path, history) in zip(rows, run.bands.items(), strict=True):
        values = np.array(history)  # (steps, 2, bands)
        bands = values.shape[-1]
        for b in range(bands):
            colour = colours(b / max(bands - 1, 1))
            share.plot(run.steps, values[:, 0, b], color=colour, label=f"band {b}")
            decay.plot(run.steps, values[:, 1, b], color=colour)
        share.axhline(1 / bands, color="gray", linestyle="--", label="equal shares")
        share.set(title=path, ylabel="share of the gradient's power", ylim=0)
        decay.set(title=path, ylabel="momentum μ")
    rows[0, 0].legend(ncols=2, fontsize="small")
    for axes in rows[-1]:
        axes.set_xlabel("step")
    return figure


# The command line


class Arguments(argparse.Namespace):
    """The arguments that the examples share."""

    optimizer: str
    compare: list[str] | None
    option: list[tuple[str, Any]]
    learning_rate: float | None
    rest: Any  # a name, or "same"
    rest_option: list[tuple[str, Any]]
    rest_learning_rate: float | None
    steps: int
    batch_size: int
    layers: int
    width: int
    heads: int
    seed: int
    dtype: str
    rounding: Literal["nearest", "stochastic"]
    profile: bool
    resume: bool
    save_every: int
    keep: int
    eval_every: int
    output: Path


class Parser(OneLineParser):
    """The command line that the examples share."""

    def __init__(self, description: str, choices: Sequence[str] = NAMES, **defaults: Any):
        super().__init__(
            description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        which = self.add_mutually_exclusive_group()
        which.add_argument(
            "--optimizer", choices=choices, default="orthomaxfactor", help="for hidden matrices"
        )
        several = partial(names, choices=choices)
        which.add_argument(
            "--compare", type=several, metavar="A,B,C", help="train with each of these optimizers"
        )
        add = self.add_argument
        add_option = partial(add, type=option, action="append", default=[], metavar="NAME=VALUE")
        add_option("--option", help="an option of the optimizer for hidden matrices; VALUE is JSON")
        picked = "None: picked automatically"
        add("--learning-rate", type=rate, help=f"peak rate of the hidden matrices; {picked}")
        rest = "optimizer for all other parameters; same: that of the hidden matrices"
        add("--rest", choices=["same", *OPTIMIZERS], default="adamw", help=rest)
        add_option("--rest-option", help="an option of the optimizer for the rest; VALUE is JSON")
        add("--rest-learning-rate", type=rate, help=f"peak rate of the rest; {picked}")
        add("--steps", type=integer, help="number of training steps")
        add("--batch-size", type=integer, help="examples per batch")
        add("--layers", type=integer, default=2, help="transformer blocks per stack")
        add("--width", type=integer, default=64, help="channels")
        add("--heads", type=integer, default=2, help="attention heads")
        add("--seed", type=partial(integer, least=0), default=1, help="seed of weights and batches")
        add("--dtype", choices=DTYPES, default="float32", help="data type of the weights")
        add(
            "--rounding",
            choices=["nearest", "stochastic"],
            default="nearest",
            help="rounding of the weights",
        )
        add("--profile", action="store_true", help="print where a step's time and memory go")
        add("--resume", action="store_true", help="continue from the newest checkpoint in --output")
        add("--save-every", type=integer, default=100, help="steps between checkpoints")
        add("--keep", type=integer, default=2, help="how many checkpoints to keep")
        add("--eval-every", type=integer, help="steps between validations")
        add("--output", type=Path, help="folder for curves and checkpoints")
        self.set_defaults(**defaults)

    def parse(self, arguments: Arguments) -> None:
        """Read the command line and report wrong arguments before any work."""
        self.parse_args(namespace=arguments)
        for name in {*(arguments.compare or [arguments.optimizer])} & {*NAMES}:
            try:
                make_optimizer(name, Probe(), {}, {name: 1.0}, arguments)
            except (TypeError, ValueError) as problem:
                self.error(f"--option or --rest-option: {problem}")

    def open_output(self, arguments: Arguments, *names: str) -> None:
        """Make the folder and check that every file can be written."""
        try:
            arguments.output.mkdir(parents=True, exist_ok=True)
            for name in names:
                (arguments.output / name).open("ab").close()
        except OSError as problem:
            self.error(f"--output {arguments.output}: {problem.strerror}")


class Probe(nn.Module):
    """The smallest model that every optimizer accepts, to check options before any work."""

    def __init__(self) -> None:
        super().__init__()
        self.puzzles, self.hidden, self.head = nn.Embedding(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)


def integer(argument: str, least: int = 1) -> int:
    if not (argument.isdecimal() and least <= int(argument) < 10**6):
        message = f"must be an integer from {least} to {10**6 - 1}, got {argument!r}"
        raise argparse.ArgumentTypeError(message)
    return int(argument)


def option(argument: str) -> tuple[str, Any]:
    """Parse an option of an optimizer. Its value is JSON.

    An object gives frequency-adaptive momentum: momentum={"bands": 10}. Its "variant" names a rule
    of variants.py.
    """
    name, equals, text = argument.partition("=")
    try:
        value = json.loads(text) if equals else True
        if name == "momentum" and isinstance(value, dict):
            variant = VARIANTS[value.pop("variant", "published")]
            value = variant(**value)
        return name, value
    except (KeyError, TypeError, ValueError) as problem:
        message = (
            f"must be NAME=VALUE with a JSON value (true, not True), one --option each, "
            f"got {argument!r} ({problem})"
        )
        raise argparse.ArgumentTypeError(message) from None


def rate(argument: str) -> float:
    try:
        value = float(argument)
    except ValueError:
        value = math.nan
    if not 1e-12 <= value <= 1e3:
        raise argparse.ArgumentTypeError(f"must be a number from 1e-12 to 1e3, got {argument!r}")
    return value


def names(argument: str, choices: Sequence[str]) -> list[str]:
    given = argument.split(",")
    if not set(given) <= set(choices) or len(set(given)) < len(given):
        known = ", ".join(choices)
        raise argparse.ArgumentTypeError(f"must be different names from {known}, got {argument!r}")
    return given
