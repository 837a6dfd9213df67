r"""Train a small transformer on the source of Python's standard library.

    python examples/train_language_model.py
    python examples/train_language_model.py --optimizer muon --steps 1000
    python examples/train_language_model.py --option momentum=0 --learning-rate 0.1
    python examples/train_language_model.py --compare orthomaxfactor,muon,adamw
    python examples/train_language_model.py --tokens words --vocabulary 16384 --tied
    python examples/train_language_model.py --resume

Every machine with Python has this text. Every eighth module is held out for validation. Tokens are
characters, or the most frequent words of the training text.
`training.py`, in the same folder, creates the optimizer and runs the training loop.
"""

from __future__ import annotations

import math
import re
import sysconfig
from collections import Counter
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from training import Arguments, Parser, integer, train_all

CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))  # other characters are removed
# A word or number with the space before it, an indentation, or a single character.
WORDS = re.compile(r" ?[A-Za-z]+| ?[0-9]+|\n *|[ -~]")
UNKNOWN = "\N{REPLACEMENT CHARACTER}"  # stands for every word that is not in the vocabulary
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
    """The task: predict the next token of source code."""

    def __init__(self, text: Text, arguments: LanguageArguments) -> None:
        self.text, self.arguments = text, arguments
        self.identity = f"{text.digest}, {arguments.batch_size} x {arguments.context}"
        name = "unigram entropy"
        if UNKNOWN in text.vocabulary:
            name += f", {text.unknown_share:.1%} unknown"
        self.baselines = {name: {"loss": text.unigram_entropy}}
        self.watched = ("blocks.0.attention.query.weight", "blocks.0.down.weight")
        self._held_out = text.validation_batches(arguments)

    def model(self) -> Transformer:
        """A new transformer."""
        a = self.arguments
        model = Transformer(len(self.text.vocabulary), a.width, a.layers, a.heads, a.tied)
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
        """Mean cross-entropy of the next tokens. Windows are (batch, context + 1)."""
        (windows,) = batch
        logits = model(windows[:, :-1]).astype(mx.float32)
        return nn.losses.cross_entropy(logits, windows[:, 1:], reduction="mean")

    def validate(self, model: nn.Module) -> dict[str, float]:
        """The loss on windows of the held-out files."""
        losses = [self.loss(model, windows) for windows in self._held_out]
        return {"loss": float(mx.mean(mx.stack(losses)))}

    def sample(self, model: nn.Module) -> str:
        """200 tokens that follow "def ", sampled at temperature 0.8."""
        tokens = encode("def ", self.text.vocabulary).tolist()
        for _ in range(200):
            logits = model(mx.array([tokens[-self.arguments.context :]]))[0, -1]
            tokens.append(int(mx.random.categorical(logits / 0.8)))
        return "".join(self.text.vocabulary[token] for token in tokens)


class Transformer(nn.Module):
    """A causal pre-norm transformer with rotary positions."""

    def __init__(self, vocabulary: int, width: int, layers: int, heads: int, tied: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = [Block(width, heads) for _ in range(layers)]
        self.norm = nn.RMSNorm(width)
        if not tied:
            self.head = nn.Linear(width, vocabulary, bias=False)

    def __call__(self, tokens: mx.array) -> mx.array:
        """Map (batch, context) tokens to (batch, context, vocabulary) logits of the next ones."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.head(x) if "head" in self else self.embedding.as_linear(x)


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
    """A training and a validation text, from different files, as indices into the vocabulary."""

    vocabulary: tuple[str, ...]
    training: np.ndarray
    validation: np.ndarray

    @classmethod
    def of(cls, files: list[Path], words: int | None = None) -> Text:
        """Read the files. Every eighth file is for validation. ``words``: size of a vocabulary."""
        texts = [read([f for i, f in enumerate(files) if i % 8]), read(files[::8])]
        vocabulary = tuple(CHARACTERS)
        if words is not None:
            frequent = Counter(WORDS.findall(texts[0])).most_common(words - 1)
            vocabulary = (UNKNOWN, *(word for word, _ in frequent))
        return cls(vocabulary, *(encode(text, vocabulary) for text in texts))

    @property
    def unknown_share(self) -> float:
        """The share of the validation text that is not in a vocabulary of words."""
        return float(np.mean(self.validation == self.vocabulary.index(UNKNOWN)))

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


def read(files: list[Path]) -> str:
    return "".join(file.read_text(encoding="utf-8", errors="ignore") for file in files)


def encode(text: str, vocabulary: tuple[str, ...]) -> np.ndarray:
    """Indices of the text's tokens. What a vocabulary of characters lacks is left out."""
    index = {token: i for i, token in enumerate(vocabulary)}
    if UNKNOWN in index:
        indices = [index.get(word, index[UNKNOWN]) for word in WORDS.findall(text)]
    else:
        indices = [index[character] for character in text if character in index]
    return np.array(indices, np.int32)


def windows(text: np.ndarray, starts: np.ndarray, length: int) -> mx.array:
    return mx.array(text[starts[:, None] + np.arange(length)])


class LanguageArguments(Arguments):
    """The arguments of this program."""

    source: Path | None
    tokens: Literal["characters", "words"]
    vocabulary: int
    tied: bool
    context: int
    zero_outputs: bool


def parse_arguments() -> tuple[LanguageArguments, Text]:
    """Read the command line and the text. Report errors before any work."""
    parser = Parser(
        "Train a transformer on the source of Python's standard library.",
        steps=300,
        batch_size=8,
        eval_every=50,
        output=Path("runs/language_model"),
    )
    source = "train on the Python files below this folder, not on the standard library"
    parser.add_argument("--source", type=Path, metavar="FOLDER", help=source)
    tokens = "what the model reads and writes"
    parser.add_argument(
        "--tokens", choices=["characters", "words"], default="characters", help=tokens
    )
    size = "number of words, the most frequent ones, with --tokens words"
    parser.add_argument("--vocabulary", type=integer, default=4096, help=size)
    tied = "use the embedding as the output layer too"
    parser.add_argument("--tied", action="store_true", help=tied)
    parser.add_argument("--context", type=integer, default=64, help="tokens per window")
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
    text = Text.of(files, arguments.vocabulary if arguments.tokens == "words" else None)
    shortest = min(len(text.training), len(text.validation))
    if arguments.context >= shortest:
        parser.error(f"--context must be below {shortest}, the length of the shorter text")
    parser.open_output(arguments, "curves.json", "curves.png")
    return arguments, text


if __name__ == "__main__":
    main()
