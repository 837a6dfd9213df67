r"""Train a small character transformer on the source of Python's standard library.

    python examples/train_language_model.py
    python examples/train_language_model.py --optimizer muon --steps 1000
    python examples/train_language_model.py --option momentum=0.9 --option cautious=true \
        --learning-rate 0.03
    python examples/train_language_model.py --compare maxfactor,muon,adamw
    python examples/train_language_model.py --resume

The text is on every machine that runs Python. Every eighth module is held out for validation.
`make_optimizer` and `compiled_step` show the library; the rest is an ordinary MLX program.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from matplotlib.figure import Figure
from mlx.optimizers import Optimizer
from tqdm import tqdm

from mlx_maxfactor import (
    OPTIMIZERS,
    CheckpointError,
    RoutedOptimizer,
    create_optimizer,
    load_checkpoint,
    save_checkpoint,
    warmup_cosine,
)

CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))  # all others are dropped from the text
DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
VALIDATION_BATCHES = 16
READ_EVERY = 10  # steps between two looks at the loss: each makes the host wait for the device

# Peak rates on hidden matrices: the best of a small grid, at the defaults below.
RATES = {"maxfactor": 0.1, "adafactor": 5e-3, "signsgd": 5e-3, "muon": 0.03, "adamw": 5e-3}


@dataclass
class Run:
    """What one training leaves behind. Losses are in nats per character."""

    optimizer: str
    state_bytes: int
    steps: list[int] = field(default_factory=list)
    training_loss: list[float] = field(default_factory=list)  # mean since the entry before
    learning_rate: list[float] = field(default_factory=list)
    seconds_per_step: list[float] = field(default_factory=list)
    validation_steps: list[int] = field(default_factory=list)
    validation_loss: list[float] = field(default_factory=list)
    skipped: int = 0
    sample: str = ""


def main() -> None:
    arguments, text = parse_arguments()
    names = arguments.compare or [arguments.optimizer]
    try:
        runs = [train(name, text, arguments) for name in names]
    except CheckpointError as problem:
        sys.exit(f"train_language_model.py: error: {problem}")
    print_results(runs, text)
    save_curves(runs, text, arguments.output)


def train(name: str, text: Text, arguments: Arguments) -> Run:
    """Train a new model. Its first weights come from the seed alone: every optimizer gets them."""
    mx.random.seed(arguments.seed)
    model = Transformer(arguments.width, arguments.layers, arguments.heads)
    model.set_dtype(DTYPES[arguments.dtype])
    optimizer = make_optimizer(name, model, arguments)
    print(optimizer.plan, flush=True)

    run = Run(name, optimizer.plan.state_bytes)
    step = compiled_step(model, optimizer)
    validation = text.validation_batches(arguments)
    random = np.random.default_rng(arguments.seed)
    first = resume(run, model, optimizer, random, arguments) if arguments.resume else 0
    progress = tqdm(desc=name, total=arguments.steps, initial=first, unit="step")
    progress.set_postfix_str("compiling the first step")
    losses: list[mx.array] = []
    start = time.perf_counter()
    for done in range(first + 1, arguments.steps + 1):
        batch = text.training_batch(random, arguments)
        losses.append(step(batch))
        progress.update()
        mx.async_eval(losses[-1], model.state, optimizer.state)
        validate = done % arguments.eval_every == 0 or done == arguments.steps
        saves = done % arguments.save_every == 0 or done == arguments.steps
        if done % READ_EVERY == 0 or validate or saves:
            run.steps.append(done)
            run.training_loss.append(mean(losses))
            run.learning_rate.append(float(optimizer.learning_rate))
            run.seconds_per_step.append((time.perf_counter() - start) / len(losses))
            progress.set_postfix_str(
                f"loss {run.training_loss[-1]:.3f}, rate {run.learning_rate[-1]:.2g}, "
                f"{batch[:, 1:].size / run.seconds_per_step[-1]:,.0f} tokens/s"
            )
            if validate:
                run.validation_steps.append(done)
                run.validation_loss.append(mean([loss_of(model, held) for held in validation]))
            if saves:
                save(run, model, optimizer, random, done, arguments)
            losses, start = [], time.perf_counter()
    progress.close()
    run.skipped = int(optimizer.skipped)
    run.sample = generate(model, "def ", arguments.context)
    return run


def make_optimizer(name: str, model: nn.Module, arguments: Arguments) -> RoutedOptimizer:
    """Hidden matrices to the optimizer of that name, all else to AdamW, both on one schedule."""
    warmup_steps = arguments.steps // 10
    schedule = warmup_cosine(
        arguments.learning_rate or RATES[name],
        total_steps=arguments.steps,
        warmup_steps=warmup_steps,
        start_ratio=1 / (warmup_steps + 1),  # a start at 0 would waste the first update
    )
    return create_optimizer(
        model,
        hidden=name,
        rest="adamw",
        learning_rate=schedule,
        rest_learning_rate=arguments.rest_learning_rate,  # the peak, on the same schedule
        max_grad_norm=1.0,
        skip_nonfinite=True,
        rounding=arguments.rounding,
        seed=arguments.seed,
        **dict(arguments.option),
    )


def compiled_step(model: nn.Module, optimizer: Optimizer) -> Callable[[mx.array], mx.array]:
    """One update of the model and the optimizer, in place, as one compiled function."""
    state = [model.state, optimizer.state]
    loss_and_gradients = nn.value_and_grad(model, partial(loss_of, model))

    @partial(mx.compile, inputs=state, outputs=state)
    def step(batch: mx.array) -> mx.array:
        loss, gradients = loss_and_gradients(batch)
        optimizer.update(model, gradients)
        return loss

    return step


def save(
    run: Run,
    model: nn.Module,
    optimizer: RoutedOptimizer,
    random: np.random.Generator,
    done: int,
    arguments: Arguments,
) -> None:
    """Keep the run, with its curves and the order of its data; and of older files the last few."""
    path = arguments.output / f"{run.optimizer}-{done:06}.safetensors"
    extra = {"done": done, "run": asdict(run), "data": random.bit_generator.state}
    save_checkpoint(path, model, optimizer, **extra)
    for older in checkpoints(run.optimizer, arguments)[arguments.keep :]:
        older.unlink()


def resume(
    run: Run,
    model: nn.Module,
    optimizer: RoutedOptimizer,
    random: np.random.Generator,
    arguments: Arguments,
) -> int:
    """Go back to the newest checkpoint, if there is one; the number of steps it had made."""
    for path in checkpoints(run.optimizer, arguments)[:1]:
        extra = load_checkpoint(path, model, optimizer)
        vars(run).update(extra["run"])
        random.bit_generator.state = extra["data"]
        print(f"resuming {path} after {extra['done']} steps")
        return extra["done"]
    print("nothing to resume: starting from the beginning")
    return 0


def checkpoints(name: str, arguments: Arguments) -> list[Path]:
    """Last written first: an older run in the same folder may have made more steps."""
    files = arguments.output.glob(f"{name}-*.safetensors")
    return sorted(files, key=lambda file: file.stat().st_mtime_ns, reverse=True)


def loss_of(model: nn.Module, batch: mx.array) -> mx.array:
    """Mean cross-entropy of each next character; `batch` is (batch, context + 1)."""
    logits = model(batch[:, :-1]).astype(mx.float32)
    return nn.losses.cross_entropy(logits, batch[:, 1:], reduction="mean")


def mean(losses: list[mx.array]) -> float:
    return float(mx.mean(mx.stack(losses)))


def generate(model: nn.Module, prompt: str, context: int) -> str:
    """The prompt and 200 characters more, at temperature 0.8."""
    characters = [CHARACTERS.index(character) for character in prompt]
    for _ in range(200):
        logits = model(mx.array([characters[-context:]]))[0, -1]
        characters.append(int(mx.random.categorical(logits / 0.8)))
    return "".join(CHARACTERS[character] for character in characters)


class Transformer(nn.Module):
    """A causal, pre-norm transformer with rotary positions and a head of its own."""

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(CHARACTERS), width)
        self.blocks = [Block(width, heads) for _ in range(layers)]
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, len(CHARACTERS), bias=False)

    def __call__(self, characters: mx.array) -> mx.array:
        """Logits of the next characters: (batch, context) to (batch, context, 96)."""
        x = self.embedding(characters)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Block(nn.Module):
    """Attention, then two linear layers, each added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(width)
        self.attention = Attention(width, heads)
        self.mlp_norm = nn.RMSNorm(width)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        """(batch, context, width) to the same shape."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.down(nn.gelu_approx(self.up(self.mlp_norm(x))))


class Attention(nn.Module):
    """Causal attention over the characters so far."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.rope = nn.RoPE(width // heads)
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        """(batch, context, width) to the same shape."""
        batch, context, width = x.shape
        shape = (batch, context, self.heads, width // self.heads)
        query, key, value = (
            project(x).reshape(shape).swapaxes(1, 2)  # (batch, heads, context, width / heads)
            for project in (self.query, self.key, self.value)
        )
        mixed = mx.fast.scaled_dot_product_attention(
            self.rope(query), self.rope(key), value, scale=shape[-1] ** -0.5, mask="causal"
        )
        return self.out(mixed.swapaxes(1, 2).reshape(x.shape))


@dataclass(frozen=True)
class Text:
    """Two texts from different files, as positions in CHARACTERS."""

    training: np.ndarray
    validation: np.ndarray

    @classmethod
    def of_standard_library(cls) -> Text:
        """Read every module; each eighth is for validation."""
        files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-z]*.py"))
        return cls(read([f for i, f in enumerate(files) if i % 8]), read(files[::8]))

    @property
    def unigram_entropy(self) -> float:
        """Of the validation text: the least loss, in nats, of a model that ignores all context."""
        counts = np.bincount(self.validation)
        p = counts[counts > 0] / counts.sum()
        return -float(np.sum(p * np.log(p)))

    def training_batch(self, random: np.random.Generator, arguments: Arguments) -> mx.array:
        """Random windows, the next that the generator gives."""
        starts = random.integers(len(self.training) - arguments.context, size=arguments.batch_size)
        return windows(self.training, starts, arguments.context + 1)

    def validation_batches(self, arguments: Arguments) -> list[mx.array]:
        """The same windows at every evaluation, spread evenly over the held-out files."""
        last = len(self.validation) - arguments.context - 1
        starts = np.linspace(0, last, VALIDATION_BATCHES * arguments.batch_size, dtype=int)
        return [
            windows(self.validation, part, arguments.context + 1)
            for part in np.split(starts, VALIDATION_BATCHES)
        ]


def read(files: list[Path]) -> np.ndarray:
    index = {character: i for i, character in enumerate(CHARACTERS)}
    text = "".join(file.read_text(encoding="utf-8", errors="ignore") for file in files)
    return np.array([index[character] for character in text if character in index], dtype=np.int32)


def windows(text: np.ndarray, starts: np.ndarray, length: int) -> mx.array:
    return mx.array(text[starts[:, None] + np.arange(length)])


def print_results(runs: list[Run], text: Text) -> None:
    row = "{:12} {:>15} {:>15} {:>14} {:>16} {:>8}"
    units = ("", "validation loss", "unigram entropy", "optimizer", "median", "steps")
    print("\n" + row.format(*units))
    print(row.format("optimizer", "nats", "nats", "state, bytes", "seconds per step", "skipped"))
    for run in runs:
        loss, entropy = f"{run.validation_loss[-1]:.3f}", f"{text.unigram_entropy:.3f}"
        seconds = f"{np.median(run.seconds_per_step):.3f}"
        state = f"{run.state_bytes:,}"
        print(row.format(run.optimizer, loss, entropy, state, seconds, run.skipped))
    for run in runs:
        print(f"\n{run.optimizer} writes:\n{run.sample}")


def save_curves(runs: list[Run], text: Text, folder: Path) -> None:
    """Write curves.json and curves.png, where rates have a panel of their own."""
    curves = {"unigram_entropy": text.unigram_entropy, "runs": [asdict(run) for run in runs]}
    finite = json.loads(json.dumps(curves), parse_constant=lambda _: None)  # JSON has no NaN
    (folder / "curves.json").write_text(json.dumps(finite, indent=1), encoding="utf-8")

    figure = Figure(figsize=(12, 8), dpi=100, layout="constrained")
    losses, rates = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    for i, run in enumerate(runs):
        label = f"{run.optimizer}, {run.validation_loss[-1]:.3f} at the end"
        losses.plot(run.steps, run.training_loss, f"C{i}", linewidth=0.7, alpha=0.7)
        losses.plot(run.validation_steps, run.validation_loss, f"C{i}o-", linewidth=2, label=label)
        rates.plot(run.steps, run.learning_rate, f"C{i}")
    losses.axhline(text.unigram_entropy, color="gray", linestyle="--", label="unigram entropy")
    seen = [text.unigram_entropy, *(loss for run in runs for loss in run.validation_loss)]
    losses.set_ylim(top=1.05 * max(filter(math.isfinite, seen)))  # cuts off the first few steps
    losses.set(
        title="Python's standard library: validation loss (thick), training loss (thin)",
        ylabel="nats per character",
    )
    losses.legend()
    rates.set(xlabel="step", ylabel="rate of hidden matrices", yscale="log")
    figure.savefig(folder / "curves.png")
    print(f"\ncurves: {folder / 'curves.png'} and {folder / 'curves.json'}")


class Arguments(argparse.Namespace):
    """The command line, typed."""

    optimizer: str
    compare: list[str] | None
    option: list[tuple[str, Any]]
    learning_rate: float | None
    rest_learning_rate: float
    steps: int
    batch_size: int
    context: int
    layers: int
    width: int
    heads: int
    seed: int
    dtype: str
    rounding: str
    resume: bool
    save_every: int
    keep: int
    eval_every: int
    output: Path


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser that does not print its usage before an error."""

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with status 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse_arguments() -> tuple[Arguments, Text]:
    """Read the command line and the text, and say what is wrong with them before any work."""
    parser = OneLineParser(
        description="Train a character transformer on the source of Python's standard library.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--optimizer", choices=OPTIMIZERS, default="maxfactor", help="one to train")
    which.add_argument("--compare", type=optimizer_names, metavar="A,B,C", help="several to train")
    add = parser.add_argument
    add("--option", type=option, action="append", default=[], metavar="NAME=VALUE")
    add("--learning-rate", type=rate, help="peak on hidden matrices; None: as in RATES")
    add("--rest-learning-rate", type=rate, default=1e-2, help="peak of AdamW on the rest")
    add("--steps", type=integer, default=300, help="updates")
    add("--batch-size", type=integer, default=8, help="windows in a batch")
    add("--context", type=integer, default=64, help="characters in a window")
    add("--layers", type=integer, default=2, help="transformer blocks")
    add("--width", type=integer, default=64, help="channels")
    add("--heads", type=integer, default=2, help="attention heads")
    add("--seed", type=partial(integer, least=0), default=1, help="of weights and batches")
    add("--dtype", choices=DTYPES, default="float32", help="of the weights")
    add("--rounding", choices=["nearest", "stochastic"], default="nearest", help="of such weights")
    add("--resume", action="store_true", help="go on from the newest checkpoint in --output")
    add("--save-every", type=integer, default=100, help="steps between checkpoints")
    add("--keep", type=integer, default=2, help="checkpoints that stay")
    add("--eval-every", type=integer, default=50, help="steps between validations")
    add("--output", type=Path, default=Path("runs/language_model"), help="folder of the curves")
    arguments = parser.parse_args(namespace=Arguments())

    try:
        for name in arguments.compare or [arguments.optimizer]:
            OPTIMIZERS[name](**dict(arguments.option))
    except (TypeError, ValueError) as problem:
        parser.error(f"--option: {problem}")
    if arguments.width % (2 * arguments.heads):
        parser.error("--width must be divisible by twice --heads (rotary positions take pairs)")
    text = Text.of_standard_library()
    shortest = min(len(text.training), len(text.validation))
    if arguments.context >= shortest:
        parser.error(f"--context must be below {shortest}, the length of the shorter text")
    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
        for name in ("curves.json", "curves.png"):
            (arguments.output / name).open("ab").close()
    except OSError as problem:
        parser.error(f"--output {arguments.output}: {problem.strerror}")
    return arguments, text


def integer(argument: str, least: int = 1) -> int:
    if not (argument.isdecimal() and least <= int(argument) < 10**6):
        message = f"must be an integer from {least} to {10**6 - 1}, got {argument!r}"
        raise argparse.ArgumentTypeError(message)
    return int(argument)


def option(argument: str) -> tuple[str, Any]:
    """An option of the optimizer for hidden matrices; its value is JSON."""
    name, equals, value = argument.partition("=")
    try:
        return name, json.loads(value) if equals else True
    except ValueError:
        raise argparse.ArgumentTypeError(f"takes NAME=VALUE, got {argument!r}") from None


def rate(argument: str) -> float:
    try:
        value = float(argument)
    except ValueError:
        value = math.nan
    if not 1e-12 <= value <= 1e3:
        raise argparse.ArgumentTypeError(f"must be a number from 1e-12 to 1e3, got {argument!r}")
    return value


def optimizer_names(argument: str) -> list[str]:
    names = argument.split(",")
    if not set(names) <= set(OPTIMIZERS) or len(set(names)) < len(names):
        choices = ", ".join(OPTIMIZERS)
        raise argparse.ArgumentTypeError(f"takes different names of {choices}, got {argument!r}")
    return names


if __name__ == "__main__":
    main()
