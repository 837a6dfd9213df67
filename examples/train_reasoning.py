r"""Train a small hierarchical reasoning model on generated puzzles.

    python examples/train_reasoning.py rules
    python examples/train_reasoning.py sudoku
    python examples/train_reasoning.py rules --optimizer hrm
    python examples/train_reasoning.py sudoku --compare orthomaxfactor,muon,adamw
    python examples/train_reasoning.py rules --resume

In *rules*, each puzzle is a hidden transformation of small grids. Only the puzzle's embedding can
store it. In *Sudoku*, the embedding carries no information, and the recurrence must find the
solution. `puzzles.py`, in the same folder, makes the puzzles; `training.py` runs the training loop.

The model is that of Wang et al. 2025, arXiv 2506.21734, without halting. It has two recurrent
modules. The fast one runs several times for each run of the slow one. The gradient flows only
through the last run of each module. A puzzle stays for several updates, called *segments*. Each
segment starts from the states of the segment before, and no gradient flows through these states.
Each update adds a few new puzzles and removes the oldest ones.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from puzzles import RULE_SIDE, SIDE, SYMBOLS, Examples, Puzzles, Rules, Sudoku, shares
from training import (
    NAMES,
    Arguments,
    Parser,
    Probe,
    integer,
    make_optimizer,
    option,
    rate,
    run_main,
    train_all,
)

from mlx_maxfactor import RoutedOptimizer, SignSGD, create_optimizer, create_optimizer_for_hrm

PAIR = "hrm"  # AdamW and SignSGD of create_optimizer_for_hrm
PUZZLE_RATE = 3e-2  # SignSGD's default rate, except in hrm
VALIDATION_BATCH = 64
PICTURED = 3


def main() -> None:
    arguments = parse_arguments()
    kind = KINDS[arguments.puzzles]
    task = Reasoning(kind, arguments)
    train_all(task, kind.rates, f"Held-out {arguments.puzzles}", arguments, make=make)
    draw_solving(task.solving, kind.draw).savefig(arguments.output / "solving.png")
    print(f"puzzles being solved: {arguments.output / 'solving.png'}")


def make(
    name: str,
    model: nn.Module,
    rules: Mapping[str, Any],
    rates: Mapping[str, float],
    arguments: ReasoningArguments,
) -> RoutedOptimizer:
    """Make the optimizer as in the other examples, or combine those for `hrm` into one."""
    if name != PAIR:
        given = argparse.Namespace(**vars(arguments))
        given.option = [*OPTIONS.get(name, []), *arguments.option]
        return make_optimizer(name, model, rules, rates, given)  # pyright: ignore[reportArgumentType]
    main_rate = arguments.learning_rate or rates[name]
    puzzle_rate = arguments.puzzle_learning_rate or 100 * main_rate
    pair = create_optimizer_for_hrm(model, main_rate, puzzle_rate, **dict(arguments.option))
    others = {"*puzzle*": pair["puzzle"]} if "puzzle" in pair else {}
    return create_optimizer(
        model,
        pair["main"],
        pair["main"],
        total_steps=arguments.steps,
        rules=others,
        max_grad_norm=1.0,
        skip_nonfinite=True,
    )


class Reasoning:
    """The task: solve puzzles of one kind, each in several segments."""

    watched = ()
    solving: Solving  # of the last model that was sampled

    def __init__(self, kind: Kind, arguments: ReasoningArguments) -> None:
        self.kind, self.arguments = kind, arguments
        self.puzzles = kind.puzzles(arguments.count)
        self.baselines = self.puzzles.baselines
        a = arguments
        self.identity = f"{self.puzzles.digest}, {a.batch_size} over {a.segments} segments"

    def model(self) -> Reasoner:
        """A new model."""
        return Reasoner(self.kind, self.puzzles, self.arguments)

    def rules(self) -> dict[str, Any]:
        """Send puzzle embeddings to SignSGD, unless --puzzle-optimizer is "rest"."""
        a = self.arguments
        return {"puzzles*": puzzle_optimizer(a)} if a.puzzle_optimizer == "signsgd" else {}

    def training_batch(self, random: np.random.Generator) -> tuple[mx.array, ...]:
        """The new puzzles of an update. They replace the oldest ones."""
        new = self.arguments.batch_size // self.arguments.segments
        return arrays(self.puzzles.training(new, random))

    def loss(self, model: nn.Module, *batch: mx.array) -> mx.array:
        """Run a segment of each current puzzle. Return the mean cross-entropy of the cells."""
        assert isinstance(model, Reasoner)
        carry = model.carry
        carry.take(*batch)
        x = model.read(carry.identities, carry.questions)
        low, high = model.segment(carry.low, carry.high, x)
        carry.low, carry.high = mx.stop_gradient(low), mx.stop_gradient(high)
        return cross_entropy(model.answer(high), carry.answers)

    def validate(self, model: nn.Module) -> dict[str, float]:
        """The loss after the last segment, and the shares of solved puzzles and correct cells."""
        assert isinstance(model, Reasoner)
        total, found = 0.0, []
        held_out = self.puzzles.held_out
        for start in range(0, len(held_out.answers), VALIDATION_BATCH):
            part = slice(start, start + VALIDATION_BATCH)
            identities, questions, answers = arrays(Examples(*(array[part] for array in held_out)))
            *_, logits = model.think(identities, questions, self.arguments.validation_segments)
            total += len(answers) * float(cross_entropy(logits, answers))
            found.append(np.array(mx.argmax(logits, axis=-1)))
        loss = total / len(held_out.answers)
        return {"loss": loss, **shares(np.concatenate(found), held_out.answers)}

    def sample(self, model: nn.Module) -> str:
        """The number of correct cells of a few held-out puzzles after each segment."""
        assert isinstance(model, Reasoner)
        held_out = self.puzzles.held_out
        chosen = np.unique(np.linspace(0, len(held_out.answers) - 1, PICTURED, dtype=int))
        few = Examples(*(array[chosen] for array in held_out))
        identities, questions, _ = arrays(few)
        segments = self.arguments.validation_segments
        thoughts = model.think(identities, questions, segments)
        beliefs = np.stack([np.array(mx.softmax(logits, axis=-1)) for logits in thoughts])
        self.solving = Solving(few, beliefs)
        right = (beliefs.argmax(axis=-1) == few.answers).sum(axis=-1)
        width = len(str(few.answers.shape[1]))
        lines = (" ".join(f"{count:{width}}" for count in counts) for counts in right.T)
        head = f"correct cells of {few.answers.shape[1]} after each of {segments} segments"
        return "\n".join([head, *lines])


def arrays(examples: Examples) -> tuple[mx.array, mx.array, mx.array]:
    identities, questions, answers = (mx.array(array.astype(np.int32)) for array in examples)
    return identities, questions, answers


def cross_entropy(logits: mx.array, answers: mx.array) -> mx.array:
    """Mean over the cells with a known answer, which is not -1."""
    known = answers >= 0
    losses = nn.losses.cross_entropy(logits, mx.maximum(answers, 0))
    return mx.sum(losses * known) / mx.maximum(mx.sum(known), 1)


def puzzle_optimizer(arguments: ReasoningArguments) -> SignSGD:
    """The optimizer of the puzzle embeddings."""
    return SignSGD(
        arguments.puzzle_learning_rate or PUZZLE_RATE,
        rounding=arguments.rounding,
        seed=arguments.seed + 1000,  # differs from the seeds of the router's own members
        **{"sparse_rows": True, **dict(arguments.puzzle_option)},
    )


# The model


class Reasoner(nn.Module):
    """Two recurrent modules at two time scales, with their states for the current puzzles."""

    def __init__(self, kind: Kind, puzzles: Puzzles, arguments: ReasoningArguments) -> None:
        super().__init__()
        a, cells = arguments, puzzles.held_out.answers.shape[1]
        places = cells * SYMBOLS // kind.symbols
        self.cycles, self.low_steps = a.cycles, a.low_steps
        self.puzzles = nn.Embedding(puzzles.identities, 2 * a.width)
        self.scale = nn.Linear(2 * a.width, a.width)
        self.shift = nn.Linear(2 * a.width, a.width)
        self.question = kind.question(a.width)
        self.low = Stack(kind.block, a)
        self.high = Stack(kind.block, a)
        self.head = nn.Linear(a.width, kind.symbols, bias=False)
        self.carry = Carry(a.batch_size, places, a.width, cells)

    def read(self, identities: mx.array, questions: mx.array) -> mx.array:
        """The input of every run, (batch, places, width)."""
        puzzle = self.puzzles(identities)[:, None]
        return self.question(questions) * (1 + self.scale(puzzle)) + self.shift(puzzle)

    def segment(self, low: mx.array, high: mx.array, x: mx.array) -> tuple[mx.array, mx.array]:
        """The new states of both modules. The gradient flows only through each one's last run."""
        runs = self.cycles * self.low_steps
        for run in range(1, runs + 1):
            if run == runs:
                low, high = mx.stop_gradient(low), mx.stop_gradient(high)
            low = self.low(low + high + x)
            if run % self.low_steps == 0:
                high = self.high(high + low)
        return low, high

    def answer(self, high: mx.array) -> mx.array:
        """Map (batch, places, width) to float32 logits, (batch, cells, symbols)."""
        return self.head(high).reshape(len(high), -1, SYMBOLS).astype(mx.float32)

    def think(self, identities: mx.array, questions: mx.array, segments: int) -> Iterator[mx.array]:
        """Yield the logits after each segment. The first states are zero."""
        x = self.read(identities, questions)
        low = high = mx.zeros_like(x)
        for _ in range(segments):
            low, high = self.segment(low, high, x)
            logits = self.answer(high)
            mx.eval(low, high, logits)
            yield logits


class Carry(nn.Module):
    """The current puzzles and both modules' states. Checkpoints save them with the model."""

    def __init__(self, batch: int, places: int, width: int, cells: int) -> None:
        super().__init__()
        self.identities = mx.zeros((batch,), mx.int32)
        self.questions = mx.zeros((batch, cells), mx.int32)
        self.answers = mx.full((batch, cells), -1, mx.int32)  # unknown: no loss yet
        self.low = mx.zeros((batch, places, width))
        self.high = mx.zeros((batch, places, width))
        self.freeze()

    def take(self, identities: mx.array, questions: mx.array, answers: mx.array) -> None:
        """Replace the oldest puzzles by new ones. States of new puzzles are zero."""
        new = len(identities)
        states = mx.zeros((new, *self.low.shape[1:]), self.low.dtype)

        def follow(old: mx.array, array: mx.array) -> mx.array:
            return mx.concatenate([old[new:], array])

        self.identities = follow(self.identities, identities)
        self.questions = follow(self.questions, questions)
        self.answers = follow(self.answers, answers)
        self.low, self.high = follow(self.low, states), follow(self.high, states)


class Stack(nn.Module):
    """A recurrent module: blocks, and a norm that bounds its state."""

    def __init__(self, block: Callable[[ReasoningArguments], nn.Module], a: ReasoningArguments):
        super().__init__()
        self.blocks = [block(a) for _ in range(a.layers)]
        self.norm = nn.RMSNorm(a.width)

    def __call__(self, x: mx.array) -> mx.array:
        """Map (batch, places, width) to the same shape."""
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class RuleQuestion(nn.Module):
    """Embed each cell by colour, row and column. Each cell is a place."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.colour = nn.Embedding(SYMBOLS, width)
        self.row = nn.Embedding(RULE_SIDE, width)
        self.column = nn.Embedding(RULE_SIDE, width)

    def __call__(self, colours: mx.array) -> mx.array:
        """Map (batch, cells) to (batch, cells, width)."""
        cells = mx.arange(colours.shape[1])
        row, column = self.row(cells // RULE_SIDE), self.column(cells % RULE_SIDE)
        # The embeddings are scaled like the states, which have an RMS of 1.
        return math.sqrt(row.shape[-1]) * (self.colour(colours) + row + column)


class SudokuQuestion(nn.Module):
    """Embed each digit of each cell: given, ruled out by the given digit, or open."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.given = nn.Embedding(3, width)

    def __call__(self, digits: mx.array) -> mx.array:
        """Map (batch, cells) to (batch, cells * digits, width)."""
        digits = digits[..., None]
        given = mx.where(digits == mx.arange(1, SYMBOLS + 1), 2, mx.where(digits == 0, 0, 1))
        embedded = self.given(given.reshape(len(digits), -1))
        return math.sqrt(embedded.shape[-1]) * embedded


class AttentionBlock(nn.Module):
    """A transformer block: attention and a two-layer MLP, each with a residual connection."""

    def __init__(self, arguments: ReasoningArguments) -> None:
        super().__init__()
        width, self.heads = arguments.width, arguments.heads
        self.attention_norm = nn.RMSNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.RMSNorm(width)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        """Map (batch, places, width) to the same shape."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.down(nn.relu(self.up(self.mlp_norm(x))))

    def attention(self, x: mx.array) -> mx.array:
        """Map (batch, places, width) to the same shape."""
        query, key, value = (
            y.reshape(*y.shape[:2], self.heads, -1).swapaxes(1, 2)  # (batch, heads, places, -1)
            for y in (self.query(x), self.key(x), self.value(x))
        )
        mixed = mx.fast.scaled_dot_product_attention(
            query, key, value, scale=query.shape[-1] ** -0.5
        )
        return self.out(mixed.swapaxes(1, 2).reshape(x.shape))


class UnitBlock(nn.Module):
    """An MLP. Its inputs are a digit of a cell, and means over the digits that conflict with it.

    The means are over all digits of the cell, and over the same digit in its row, column and box.
    All digits and cells share the weights, so what the block learns for one holds for all.
    """

    def __init__(self, arguments: ReasoningArguments) -> None:
        super().__init__()
        width = arguments.width
        self.norm = nn.RMSNorm(width)
        self.own = nn.Linear(width, 2 * width)
        self.cell = nn.Linear(width, 2 * width, bias=False)
        self.row = nn.Linear(width, 2 * width, bias=False)
        self.column = nn.Linear(width, 2 * width, bias=False)
        self.box = nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        """Map (batch, places, width) to the same shape."""
        # Axes: band of two rows, row in it, stack of three columns, column in it, digit.
        y = self.norm(x).reshape(len(x), 3, 2, 2, 3, SYMBOLS, -1)
        hidden = self.own(y)
        for linear, axes in (
            (self.cell, (5,)),
            (self.row, (3, 4)),
            (self.column, (1, 2)),
            (self.box, (2, 4)),
        ):
            hidden = hidden + linear(mx.mean(y, axis=axes, keepdims=True))
        return x + self.down(nn.relu(hidden)).reshape(x.shape)


# Pictures


@dataclass(frozen=True)
class Solving:
    """A few puzzles, and the probability of each symbol in each cell after each segment."""

    puzzles: Examples
    beliefs: np.ndarray  # (segments, puzzles, cells, symbols)


def draw_solving(solving: Solving, draw: Callable[..., None]) -> Figure:
    """Draw a row for each puzzle: question, predictions after some segments, answer."""
    last = len(solving.beliefs)
    shown = sorted({n for n in (1, 2, 3, 4, 6, 8, 12, last) if n <= last})
    _, questions, answers = solving.puzzles
    columns = len(shown) + 2
    figure = Figure(figsize=(2 * columns, 2.2 * len(answers)), dpi=80, layout="constrained")
    for row, question, answer, belief in zip(
        figure.subplots(len(answers), columns, squeeze=False),
        questions,
        answers,
        solving.beliefs.swapaxes(0, 1),
        strict=True,
    ):
        draw(row[0], question)
        row[0].set_title("question")
        for axes, segment in zip(row[1:], shown, strict=False):
            symbols = belief[segment - 1].argmax(axis=-1)
            draw(axes, question, symbols, symbols == answer)
            axes.set_title(f"segment {segment}" if segment > 1 else "1 segment")
        draw(row[-1], question, answer)
        row[-1].set_title("answer")
    return figure


def draw_colours(
    axes: Axes, question: np.ndarray, symbols: np.ndarray | None = None, right: Any = None
) -> None:
    """Draw a grid of colours. A cross marks wrong cells."""
    colours = (question if symbols is None else symbols).reshape(RULE_SIDE, -1)
    axes.imshow(colours, cmap="tab10", vmin=0, vmax=9)
    axes.set(xticks=[], yticks=[])
    if right is not None:
        rows, columns = np.divmod(np.flatnonzero(~right), RULE_SIDE)
        axes.plot(columns, rows, "kx", markersize=8)


def draw_digits(
    axes: Axes, question: np.ndarray, symbols: np.ndarray | None = None, right: Any = None
) -> None:
    """Draw digits: given ones black, correct ones blue, wrong ones red."""
    for i, given in enumerate(question):
        if given or symbols is not None:
            digit = given or symbols[i] + 1  # pyright: ignore[reportOptionalSubscript]
            wrong = right is not None and not right[i]
            colour = "red" if wrong else "black" if given else "tab:blue"
            weight = "bold" if given or wrong else "normal"
            row, column = divmod(i, SIDE)
            style: dict[str, Any] = {
                "ha": "center",
                "va": "center",
                "color": colour,
                "weight": weight,
            }
            axes.text(column + 0.5, SIDE - row - 0.5, str(digit), **style)
    for i in range(SIDE + 1):
        axes.axhline(i, color="black", linewidth=1.5 if i % 2 == 0 else 0.3)
        axes.axvline(i, color="black", linewidth=1.5 if i % 3 == 0 else 0.3)
    axes.set(xlim=(0, SIDE), ylim=(0, SIDE), xticks=[], yticks=[], aspect="equal")


# The command line


@dataclass(frozen=True)
class Kind:
    """A kind of puzzles, with the parts of the model and the settings that suit it.

    Attributes:
        puzzles: Makes the puzzles, given the number to train on.
        question: Makes the layer that embeds a question, given a width.
        block: Makes a block of either module, given the arguments.
        symbols: Logits per place: all symbols of a cell, or one.
        draw: Draws a question, an answer or a prediction.
        rates: Peak rates of the hidden matrices, each the best of a few with the defaults. The rate
            of `hrm` is for everything except the puzzle embeddings.
        defaults: Defaults of the command line.
    """

    puzzles: Callable[[int], Puzzles]
    question: Callable[[int], nn.Module]
    block: Callable[[ReasoningArguments], nn.Module]
    symbols: int
    draw: Callable[..., None]
    rates: Mapping[str, float]
    defaults: Mapping[str, Any]


OPTIONS = {"muon": [("momentum", 0.8)]}
RATES = {"adafactor": 5e-3, "signsgd": 2e-3, "adamw": 4e-3, PAIR: 4e-3}
RATES |= {"mlx_adamw": 4e-3, "mlx_adafactor": 0.02, "normuon": 0.02}
KINDS = {
    "rules": Kind(
        Rules,
        RuleQuestion,
        AttentionBlock,
        SYMBOLS,
        draw_colours,
        RATES | {"orthomaxfactor": 0.03, "muon": 0.04},
        {
            "steps": 1500,
            "count": 100,
            "width": 64,
            "layers": 1,
            "batch_size": 64,
            "segments": 2,
            "validation_segments": 4,
        },
    ),
    "sudoku": Kind(
        Sudoku,
        SudokuQuestion,
        UnitBlock,
        1,
        draw_digits,
        RATES | {"orthomaxfactor": 0.03, "muon": 0.04},
        {
            "steps": 800,
            "count": 400,
            "width": 32,
            "layers": 2,
            "batch_size": 32,
            "segments": 8,
            "validation_segments": 16,
        },
    ),
}


class ReasoningArguments(Arguments):
    """The arguments of this program."""

    puzzles: str
    count: int
    segments: int
    validation_segments: int
    cycles: int
    low_steps: int
    puzzle_optimizer: str
    puzzle_option: list[tuple[str, Any]]
    puzzle_learning_rate: float | None


def parse_arguments() -> ReasoningArguments:
    """Read the command line and report wrong arguments before any work."""
    kind = next((argument for argument in sys.argv[1:] if argument in KINDS), "rules")
    parser = Parser(
        "Train a small hierarchical reasoning model on generated puzzles.",
        choices=(*NAMES, PAIR),
        heads=4,
        rest_learning_rate=3e-3,
        eval_every=200,
        output=Path("runs/reasoning") / kind,
    )
    add = parser.add_argument
    add("puzzles", nargs="?", choices=KINDS, default="rules", help="kind of puzzles")
    add("--count", type=integer, help="number of training puzzles")
    add("--segments", type=integer, help="updates for each puzzle")
    add("--validation-segments", type=integer, help="segments for each held-out puzzle")
    add("--cycles", type=integer, default=1, help="runs of the slow module per segment")
    add("--low-steps", type=integer, default=2, help="runs of the fast module per slow run")
    add("--puzzle-optimizer", choices=["signsgd", "rest"], default="signsgd", help="for embeddings")
    options = {"type": option, "action": "append", "default": [], "metavar": "NAME=VALUE"}
    add(
        "--puzzle-option", **options, help="an option of SignSGD; sparse_rows=false decays all rows"
    )
    add("--puzzle-learning-rate", type=rate, help="peak; None: 0.03, or 100x AdamW's in hrm")
    parser.set_defaults(**KINDS[kind].defaults)
    arguments = ReasoningArguments()
    parser.parse(arguments)
    if arguments.batch_size % arguments.segments:
        parser.error("--batch-size must be divisible by --segments: each update replaces one part")
    if arguments.width % arguments.heads:
        parser.error("--width must be divisible by --heads")
    try:
        puzzle_optimizer(arguments)
        for name in arguments.compare or [arguments.optimizer]:
            make(name, Probe(), {}, {name: 1.0}, arguments)
    except (TypeError, ValueError) as problem:
        parser.error(f"--puzzle-option or --option: {problem}")
    parser.open_output(arguments, "curves.json", "curves.png", "solving.png")
    return arguments


if __name__ == "__main__":
    run_main(main)
