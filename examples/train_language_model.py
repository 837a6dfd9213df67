r"""Train a small character transformer on the source of Python's standard library.

    python examples/train_language_model.py
    python examples/train_language_model.py --optimizer muon --steps 1000
    python examples/train_language_model.py --option momentum=0 --learning-rate 0.1
    python examples/train_language_model.py --compare orthomaxfactor,muon,adamw
    python examples/train_language_model.py --resume

Every machine with Python has this text. Every eighth module is held out for validation.
`training.py`, in the same folder, creates the optimizer and runs the training loop.
"""

from __future__ import annotations

import math
import sysconfig
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from training import Arguments, Parser, integer, train_all

CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))  # other characters are removed
VALIDATION = (16, 8)  # batches, windows in each

# Peak rates of the hidden matrices, for optimizers whose rate the library does not pick: the best
# of a small grid.
RATES = {"maxfactor": 0.1, "adafactor": 5e-3, "signsgd": 5e-3}
RATES |= {"mlx_adamw": 7e-4, "mlx_adafactor": 0.05, "normuon": 0.03}


def main() -> None:
    arguments, text = parse_arguments()
    title = str(arguments.source or "Python's standard library")
    train_all(LanguageModel(text, arguments), RATES, title, arguments)


class LanguageModel:
    """The task: predict the next character of source code."""

    def __init__(self, text: Text, arguments: LanguageArguments) -> None:
        self.text, self.arguments = text, arguments
        self.identity = f"{text.digest}, {arguments.batch_size} x {arguments.context}"
        self.baselines = {"unigram entropy": {"loss": text.unigram_entropy}}
        self.watched = ("blocks.0.attention.query.weight", "blocks.0.down.weight")
        self._held_out = text.validation_batches(arguments)

    def model(self) -> Transformer:
        """A new transformer."""
        a = self.arguments
        model = Transformer(a.width, a.layers, a.heads)
        if a.zero_outputs:
            for block in model.blocks:
                for layer in (block.attention.out, block.down):
                    layer.weight = mx.zeros_like(layer.weight)
        return model

    def rules(self) -> dict[str, Any]:
        """No rules: the router knows every layer."""
        return {}

    def training_batch(self, random: np.random.Generator) -> tuple[mx.array]:
        """A batch of random windows."""
        return (self.text.training_batch(random, self.arguments),)

    def loss(self, model: nn.Module, *batch: mx.array) -> mx.array:
        """Mean cross-entropy of the next characters. Windows are (batch, context + 1)."""
        (windows,) = batch
        logits = model(windows[:, :-1]).astype(mx.float32)
        return nn.losses.cross_entropy(logits, windows[:, 1:], reduction="mean")

    def validate(self, model: nn.Module) -> dict[str, float]:
        """The loss on windows of the held-out files."""
        losses = [self.loss(model, windows) for windows in self._held_out]
        return {"loss": float(mx.mean(mx.stack(losses)))}

    def sample(self, model: nn.Module) -> str:
        """200 characters that follow "def ", sampled at temperature 0.8."""
        characters = [CHARACTERS.index(character) for character in "def "]
        for _ in range(200):
            logits = model(mx.array([characters[-self.arguments.context :]]))[0, -1]
            characters.append(int(mx.random.categorical(logits / 0.8)))
        return "".join(CHARACTERS[character] for character in characters)


class Transformer(nn.Module):
    """A causal pre-norm transformer with rotary positions and an untied output layer."""

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(CHARACTERS), width)
        self.blocks = [Block(width, heads) for _ in range(layers)]
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, len(CHARACTERS), bias=False)

    def __call__(self, characters: mx.array) -> mx.array:
        """Map (batch, context) characters to (batch, context, 96) logits of the next ones."""
        x = self.embedding(characters)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Block(nn.Module):
    """A transformer block: attention and a two-layer MLP, each with a residual connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(width)
        self.attention = Attention(width, heads)
        self.mlp_norm = nn.RMSNorm(width)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        """Map (batch, context, width) to the same shape."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.down(nn.gelu_approx(self.up(self.mlp_norm(x))))


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.rope = nn.RoPE(width // heads)
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        """Map (batch, context, width) to the same shape."""
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
    """A training and a validation text, from different files, as indices into CHARACTERS."""

    training: np.ndarray
    validation: np.ndarray

    @classmethod
    def of(cls, files: list[Path]) -> Text:
        """Read the files. Every eighth file is for validation."""
        return cls(read([f for i, f in enumerate(files) if i % 8]), read(files[::8]))

    @property
    def digest(self) -> str:
        """A hash of the text."""
        return sha256(self.training.tobytes() + self.validation.tobytes()).hexdigest()

    @property
    def unigram_entropy(self) -> float:
        """The lowest validation loss, in nats, that a model without context can reach."""
        counts = np.bincount(self.validation)
        p = counts[counts > 0] / counts.sum()
        return -float(np.sum(p * np.log(p)))

    def training_batch(self, random: np.random.Generator, arguments: LanguageArguments) -> mx.array:
        """A batch of random windows of the training text."""
        starts = random.integers(len(self.training) - arguments.context, size=arguments.batch_size)
        return windows(self.training, starts, arguments.context + 1)

    def validation_batches(self, arguments: LanguageArguments) -> list[mx.array]:
        """Windows at equal distances in the held-out text, the same at every validation."""
        last = len(self.validation) - arguments.context - 1
        starts = np.linspace(0, last, math.prod(VALIDATION), dtype=int)
        return [
            windows(self.validation, part, arguments.context + 1)
            for part in starts.reshape(VALIDATION)
        ]


def read(files: list[Path]) -> np.ndarray:
    indices = np.full(256, -1, dtype=np.int32)
    indices[[ord(character) for character in CHARACTERS]] = np.arange(len(CHARACTERS))
    text = "".join(file.read_text(encoding="utf-8", errors="ignore") for file in files)
    found = indices[np.frombuffer(text.encode("ascii", "ignore"), dtype=np.uint8)]
    return found[found >= 0]


def windows(text: np.ndarray, starts: np.ndarray, length: int) -> mx.array:
    return mx.array(text[starts[:, None] + np.arange(length)])


class LanguageArguments(Arguments):
    """The arguments of this program."""

    source: Path | None
    context: int
    zero_outputs: bool


def parse_arguments() -> tuple[LanguageArguments, Text]:
    """Read the command line and the text. Report errors before any work."""
    parser = Parser(
        "Train a character transformer on the source of Python's standard library.",
        steps=300,
        batch_size=8,
        eval_every=50,
        output=Path("runs/language_model"),
    )
    source = "train on the Python files below this folder, not on the standard library"
    parser.add_argument("--source", type=Path, metavar="FOLDER", help=source)
    parser.add_argument("--context", type=integer, default=64, help="characters per window")
    zeros = "start the output projections of attention and MLP at zero"
    parser.add_argument("--zero-outputs", action="store_true", help=zeros)
    arguments = LanguageArguments()
    parser.parse(arguments)
    if arguments.width % (2 * arguments.heads):
        parser.error(
            "--width must be divisible by twice --heads (rotary positions need an even head size)"
        )
    standard_library = Path(sysconfig.get_paths()["stdlib"]).glob("[a-z]*.py")
    files = sorted(arguments.source.rglob("*.py") if arguments.source else standard_library)
    if not files:
        parser.error(f"--source {arguments.source} contains no Python files")
    text = Text.of(files)
    shortest = min(len(text.training), len(text.validation))
    if arguments.context >= shortest:
        parser.error(f"--context must be below {shortest}, the length of the shorter text")
    parser.open_output(arguments, "curves.json", "curves.png")
    return arguments, text


if __name__ == "__main__":
    main()
