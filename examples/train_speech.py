r"""Train a small Whisper-like speech recognizer on speech synthesized by eSpeak NG.

    python examples/train_speech.py
    python examples/train_speech.py --compare orthomaxfactor,muon,adamw
    python examples/train_speech.py --option 'momentum={"bands": 10}' \
        --convolution-option 'momentum={"bands": 10}' --convolution-option cautious=true
    python examples/train_speech.py --data my_recordings
    python examples/train_speech.py --resume

The clips are digits and commands, in seven accents of English. Four voices are held out for
validation. `speech_data.py`, in the same folder, makes the clips; `training.py` runs the training
loop.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import jiwer
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from matplotlib.figure import Figure
from speech_data import HOP, MELS, SAMPLE_RATE, Clip, clips_of_folder, load_synthetic, log_mel
from training import Arguments, Parser, Run, integer, option, rate, run_main, train_all

from mlx_maxfactor import MaxFactor

VALIDATION_BATCH = 64
END = "\n"  # the first and last character of every text

# Peak rates of the hidden matrices, for optimizers whose rate the library does not pick: the best
# rates that compare_optimizers.py found, or guesses.
RATES = {"maxfactor": 0.05, "adafactor": 5e-3, "signsgd": 2e-3}
RATES |= {"mlx_adamw": 0.0015, "mlx_adafactor": 0.015, "normuon": 0.03}


def main() -> None:
    arguments, clips = parse_arguments()
    task = Speech(*clips, arguments)
    runs = train_all(task, RATES, "Held-out voices", arguments)
    save_transcripts(runs[-1], task, arguments.output)


class Speech:
    """The task: turn sound into characters."""

    watched = ("encoder.conv1.weight", "encoder.blocks.0.up.weight")

    def __init__(
        self, training: Sequence[Clip], held_out: Sequence[Clip], arguments: SpeechArguments
    ) -> None:
        self.arguments, self.held_out = arguments, held_out
        clips = [*training, *held_out]
        digest = sha256(b"".join(c.text.encode() + c.samples.tobytes() for c in clips)).hexdigest()
        self.identity = f"{digest}, batches of {arguments.batch_size}"
        self.characters = END + "".join(sorted({c for clip in clips for c in clip.text}))
        self.longest_text = 1 + max(len(clip.text) for clip in clips)
        self.samples = 2 * HOP * math.ceil(max(len(clip.samples) for clip in clips) / (2 * HOP))
        self.training_features, self.training_texts = self.arrays(training)
        self.features, self.texts = self.arrays(held_out)
        self.baselines = {
            "most frequent": self.error_rates([most_frequent(training)] * len(held_out)),
            "untrained": self.untrained(),
        }

    def arrays(self, clips: Sequence[Clip]) -> tuple[mx.array, mx.array]:
        """Features (clips, frames, 80) of clips padded with silence, and texts padded with -1."""
        features = [log_mel(np.pad(c.samples, (0, self.samples - len(c.samples)))) for c in clips]
        texts = np.full((len(clips), self.longest_text + 1), -1, dtype=np.int32)
        for row, clip in zip(texts, clips, strict=True):
            row[: len(clip.text) + 2] = [self.characters.index(c) for c in END + clip.text + END]
        return mx.array(np.stack(features)), mx.array(texts)

    def model(self) -> Recognizer:
        """A new recognizer."""
        a = self.arguments
        return Recognizer(len(self.characters), self.longest_text, a.width, a.layers, a.heads)

    def rules(self) -> dict[str, Any]:
        """Rules for the position table and, with --convolution-option, for the first convolution.

        The first convolution is the only layer whose inputs are ordered by frequency (mel bins).
        """
        rules: dict[str, Any] = {"decoder.positions": "embedding"}
        if self.arguments.convolution_option:
            rules["encoder.conv1.weight"] = convolution_optimizer(self.arguments)
        return rules

    def training_batch(self, random: np.random.Generator) -> tuple[mx.array, mx.array]:
        """A batch of random clips."""
        count = len(self.training_features)
        chosen = mx.array(random.integers(count, size=self.arguments.batch_size))
        return self.training_features[chosen], self.training_texts[chosen]

    def loss(self, model: nn.Module, *batch: mx.array) -> mx.array:
        """Mean cross-entropy of the next characters, including the end of the text."""
        features, texts = batch
        texts, known = mx.maximum(texts, 0), texts[:, 1:] >= 0
        logits = model(features, texts[:, :-1]).astype(mx.float32)
        losses = nn.losses.cross_entropy(logits, texts[:, 1:])
        return mx.sum(losses * known) / mx.sum(known)

    def validate(self, model: nn.Module) -> dict[str, float]:
        """The loss on held-out speakers, and the error rates of greedy transcripts."""
        total, characters, transcripts = 0.0, 0, []
        for start in range(0, len(self.held_out), VALIDATION_BATCH):
            part = slice(start, start + VALIDATION_BATCH)
            features, texts = self.features[part], self.texts[part]
            count = int(mx.sum(texts[:, 1:] >= 0))
            total += count * float(self.loss(model, features, texts))
            characters += count
            transcripts += self.transcribe(model, features)
        return {"loss": total / characters, **self.error_rates(transcripts)}

    def transcribe(self, model: nn.Module, features: mx.array) -> list[str]:
        """Greedy decoding: add the most likely character until every text has ended."""
        assert isinstance(model, Recognizer)
        sound = model.encoder(features)
        texts = mx.zeros((len(features), 1), mx.int32)
        ended = False
        while texts.shape[1] <= self.longest_text and not ended:
            newest = mx.argmax(model.decoder(texts, sound)[:, -1:], axis=-1).astype(mx.int32)
            texts = mx.concatenate([texts, newest], axis=1)
            ended = mx.all(mx.any(texts[:, 1:] == 0, axis=1)).item()
        rows = ("".join(self.characters[i] for i in row[1:]) for row in np.array(texts))
        return [row.partition(END)[0] for row in rows]

    def error_rates(self, transcripts: Sequence[str]) -> dict[str, float]:
        """Edit distance divided by the length of the true text, in characters and in words."""
        said = [clip.text for clip in self.held_out]
        return {
            "character error": float(jiwer.cer(said, list(transcripts))),
            "word error": float(jiwer.wer(said, list(transcripts))),
        }

    def untrained(self) -> dict[str, float]:
        """The measures of an untrained model."""
        mx.random.seed(self.arguments.seed)
        return self.validate(self.model())

    def sample(self, model: nn.Module) -> str:
        """The true text and the transcript of a few held-out clips."""
        few = self.held_out[:8]
        transcripts = self.transcribe(model, self.features[: len(few)])
        width = max(len(clip.text) for clip in few)
        lines = [
            f"{clip.text:{width}}  {text}" for clip, text in zip(few, transcripts, strict=True)
        ]
        return "\n".join([f"{'said':{width}}  understood", *lines])


def most_frequent(clips: Sequence[Clip]) -> str:
    return Counter(clip.text for clip in clips).most_common(1)[0][0]


def convolution_optimizer(arguments: SpeechArguments) -> MaxFactor:
    """MaxFactor with `min_rms` 1. Its rate is then absolute, like AdamW's."""
    rate = arguments.convolution_learning_rate or arguments.rest_learning_rate or 2e-2
    return MaxFactor(
        rate,  # create_optimizer applies the schedule to it as well
        min_rms=1.0,
        rounding=arguments.rounding,
        seed=arguments.seed + 1000,  # differs from the seeds of the router's own members
        **dict(arguments.convolution_option),
    )


# The model


class Recognizer(nn.Module):
    """A small Whisper: an encoder of sound, and a decoder of text that attends to the sound."""

    def __init__(
        self, characters: int, longest_text: int, width: int, layers: int, heads: int
    ) -> None:
        super().__init__()
        self.encoder = Encoder(width, layers, heads)
        self.decoder = Decoder(characters, longest_text, width, layers, heads)

    def __call__(self, features: mx.array, texts: mx.array) -> mx.array:
        """Map (batch, frames, 80) and (batch, text) to (batch, text, characters) logits."""
        return self.decoder(texts, self.encoder(features))


class Encoder(nn.Module):
    """Two convolutions, then transformer blocks. The second convolution halves the frames.

    The activation is ReLU. On a CPU, Whisper's GELU takes longer than the matrix products.
    """

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(MELS, width, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(width, width, kernel_size=3, padding=1)
        self.blocks = [Block(width, heads) for _ in range(layers)]
        self.norm = nn.LayerNorm(width)

    def __call__(self, features: mx.array) -> mx.array:
        """Map (batch, frames, 80) to (batch, frames / 2, width)."""
        x = nn.relu(self.conv1(features.astype(self.conv1.weight.dtype)))
        # Slicing, not a stride: MLX's gradient of a strided convolution is 5x slower on a CPU.
        x = nn.relu(self.conv2(x)[:, ::2])
        x = x + sinusoids(*x.shape[1:]).astype(x.dtype)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Decoder(nn.Module):
    """Transformer blocks with cross-attention. The embedding is also the output layer."""

    def __init__(
        self, characters: int, longest_text: int, width: int, layers: int, heads: int
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, width)
        self.positions = mx.random.normal((longest_text, width), scale=0.02)
        self.blocks = [CrossBlock(width, heads) for _ in range(layers)]
        self.norm = nn.LayerNorm(width)

    def __call__(self, texts: mx.array, sound: mx.array) -> mx.array:
        """Map (batch, text) and (batch, frames / 2, width) to (batch, text, characters) logits."""
        x = self.embedding(texts) + self.positions[: texts.shape[1]]
        for block in self.blocks:
            x = block(x, sound)
        return self.embedding.as_linear(self.norm(x))


class Block(nn.Module):
    """A transformer block: attention and a two-layer MLP, each with a residual connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def __call__(self, x: mx.array) -> mx.array:
        """Map (batch, length, width) to the same shape."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(x)

    def feed_forward(self, x: mx.array) -> mx.array:
        """Apply the MLP to (batch, length, width). The shape stays the same."""
        return self.down(nn.relu(self.up(self.mlp_norm(x))))


class CrossBlock(Block):
    """A causal block with cross-attention to the sound before its MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads)
        self.cross_norm = nn.LayerNorm(width)
        self.cross_attention = Attention(width, heads)

    def __call__(self, x: mx.array, sound: mx.array) -> mx.array:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Map (batch, text, width) to the same shape. `sound` is (batch, frames / 2, width)."""
        x = x + self.attention(self.attention_norm(x), mask="causal")
        x = x + self.cross_attention(self.cross_norm(x), sound)
        return x + self.feed_forward(x)


class Attention(nn.Module):
    """Self-attention, or cross-attention to another sequence."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def __call__(
        self, x: mx.array, source: mx.array | None = None, mask: str | None = None
    ) -> mx.array:
        """Map (batch, length, width) to the same shape. `source` is (batch, any length, width)."""
        source = x if source is None else source
        query, key, value = (
            y.reshape(*y.shape[:2], self.heads, -1).swapaxes(1, 2)  # (batch, heads, length, -1)
            for y in (self.query(x), self.key(source), self.value(source))
        )
        mixed = mx.fast.scaled_dot_product_attention(
            query, key, value, scale=query.shape[-1] ** -0.5, mask=mask
        )
        return self.out(mixed.swapaxes(1, 2).reshape(x.shape))


def sinusoids(length: int, width: int) -> mx.array:
    """Sinusoidal position embeddings, (length, width)."""
    half = width // 2
    frequencies = mx.exp(-math.log(10_000) / (half - 1) * mx.arange(half))
    angles = mx.arange(length)[:, None] * frequencies
    return mx.concatenate([mx.sin(angles), mx.cos(angles)], axis=1)


# Pictures and the command line


def save_transcripts(run: Run, task: Speech, folder: Path) -> None:
    """Write transcripts.png: spectrograms of held-out clips with their texts and transcripts."""
    figure = Figure(figsize=(12, 10), dpi=100, layout="constrained")
    panels = zip(
        figure.subplots(4, 2).flat, task.held_out, run.sample.splitlines()[1:], strict=False
    )
    for axes, clip, line in panels:
        understood = line[len(clip.text) :].strip()
        image = log_mel(clip.samples).T
        seconds = len(clip.samples) / SAMPLE_RATE
        axes.imshow(image, origin="lower", aspect="auto", extent=(0, seconds, 0, MELS))
        title = f"said: {clip.text}\nunderstood: {understood}"
        axes.set_title(title, loc="left", parse_math=False)
    figure.supxlabel("seconds")
    figure.supylabel("mel bin")
    figure.savefig(folder / "transcripts.png")
    print(f"transcripts: {folder / 'transcripts.png'}")


class SpeechArguments(Arguments):
    """The arguments of this program."""

    convolution_option: list[tuple[str, Any]]
    convolution_learning_rate: float | None
    data: Path | None
    cache: Path
    clips: int


def parse_arguments() -> tuple[SpeechArguments, tuple[list[Clip], list[Clip]]]:
    """Read the command line and the sound. Report errors before any work."""
    parser = Parser(
        "Train a small Whisper-like speech recognizer on speech synthesized by eSpeak NG.",
        steps=400,
        batch_size=16,
        eval_every=100,
        output=Path("runs/speech"),
    )
    add = parser.add_argument
    add(
        "--convolution-option",
        type=option,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="train the first convolution with MaxFactor and this option of it; VALUE is JSON",
    )
    convolution_rate = "peak rate of the first convolution; None: the rate of the rest"
    add("--convolution-learning-rate", type=rate, help=convolution_rate)
    own = "folder of NAME.wav and NAME.txt files, used in place of synthesized speech"
    add("--data", type=Path, help=own)
    cache = "folder that keeps the synthesized clips"
    add("--cache", type=Path, default=Path("runs/speech_clips"), help=cache)
    clips_help = "clips to synthesize for training; a tenth as many are held out"
    add("--clips", type=integer, default=3000, help=clips_help)
    arguments = SpeechArguments()
    parser.parse(arguments)
    try:
        convolution_optimizer(arguments)
    except (TypeError, ValueError) as problem:
        parser.error(f"--convolution-option: {problem}")
    if arguments.width % arguments.heads or arguments.width % 2 or arguments.width < 4:
        parser.error("--width must be even, at least 4, and divisible by --heads")
    try:
        if arguments.data:
            clips = clips_of_folder(arguments.data)
        else:
            held_out = max(10, arguments.clips // 10)
            clips = load_synthetic(arguments.cache, arguments.clips, held_out)
    except (OSError, RuntimeError, ValueError) as problem:
        parser.error(str(problem))
    parser.open_output(arguments, "curves.json", "curves.png", "transcripts.png")
    return arguments, clips


if __name__ == "__main__":
    run_main(main)
