"""Make a small model and a task for it, offline, in the formats that mlx-lm reads.

    python examples/small_llama.py

The model is a llama of four layers with its own tokenizer. It is trained for 400 steps on the code
of Python's standard library without comments and docstrings. The task is new to it: to name a
Unicode character from its number. mlx-lm reads both folders, and so does

    mlx-maxfactor lora --model runs/small_llama --data runs/small_task --iters 300

They are made again only if the seed or the settings differ.
"""

import argparse
import ast
import json
import sysconfig
import unicodedata
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm import load
from mlx_lm.models.llama import Model, ModelArgs
from mlx_lm.utils import save_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import trange

from mlx_maxfactor import create_optimizer, warmup_cosine

END = "<|end|>"
TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}<|end|>{% else %}\n{% endif %}{% endfor %}"
)
SHAPE: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 512,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "eos_token_id": 0,
}
BATCH, CONTEXT = 8, 64
LINES = {"train": 4000, "valid": 200, "test": 200}
CHARACTERS = range(0x21, 0x20000)
NUMBERED = ("CJK", "HANGUL SYLLABLE", "IDEOGRAPH", "HIEROGLYPH")  # their names are numbers


def main() -> None:
    """Make both, and show what the model writes."""
    parser = argparse.ArgumentParser(description="Build a small llama and a task for it.")
    parser.add_argument("--model", type=Path, default=Path("runs/small_llama"))
    parser.add_argument("--task", type=Path, default=Path("runs/small_task"))
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    folder = build_model(arguments.model, arguments.seed)
    task = write_task(arguments.task, arguments.seed)
    model, tokenizer = load(str(folder))[:2]
    first = json.loads((task / "test.jsonl").read_text().splitlines()[0])
    prompt = mx.array([tokenizer.encode(first["prompt"] + "\n")])
    print(f"{folder}: the model continues {first['prompt']!r} with", end=" ")
    print(repr(tokenizer.decode(greedily(model, prompt, 20))))
    print(f"{task}: it should learn to write {first['completion']!r}")


# The model


def build_model(folder: str | Path, seed: int = 1, steps: int = 400) -> Path:
    """A folder that ``mlx_lm.load`` reads: a small llama, trained on code, and its tokenizer.

    Args:
        folder: The folder. A model that is already there is kept if it was made alike.
        seed: Seed of the weights and of the order of the text.
        steps: Training steps.

    Returns:
        The folder.
    """
    folder = Path(folder)
    config = {**SHAPE, "built_by": {"seed": seed, "steps": steps}}
    if was_written(folder / "config.json", config):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    documents = [document for tree in modules() for document in code_of(tree)]
    tokenizer = train_tokenizer(documents)
    encoded = tokenizer.encode_batch([document + END for document in documents])
    tokens = np.concatenate([np.array(e.ids, dtype=np.int32) for e in encoded])
    save_model(folder, train_model(tokens, seed, steps))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}
    write_json(folder / "tokenizer_config.json", {**settings, "chat_template": TEMPLATE})
    write_json(folder / "config.json", config)  # last: a folder with this file is complete
    return folder


def train_tokenizer(documents: list[str]) -> Tokenizer:
    """A byte-pair encoding that fills the vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SHAPE["vocab_size"],
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def train_model(tokens: np.ndarray, seed: int, steps: int) -> Model:
    """A llama, trained on random windows of the tokens."""
    mx.random.seed(seed)
    random = np.random.default_rng(seed)
    model = Model(ModelArgs.from_dict(SHAPE))
    warmup = max(1, steps // 10)
    schedule = warmup_cosine(0.1, steps, warmup, min_ratio=0.0, start_ratio=1 / warmup)
    optimizer = create_optimizer(
        model,
        learning_rate=schedule,
        rest_learning_rate=1e-2,
        max_grad_norm=1.0,
        momentum=0,  # as the model of the kept records was trained
        block=None,
    )
    state = [model.state, optimizer.state]

    def loss_of(windows: mx.array) -> mx.array:
        logits = model(windows[:, :-1])
        return nn.losses.cross_entropy(logits, windows[:, 1:], reduction="mean")

    @partial(mx.compile, inputs=state, outputs=state)
    def step(windows: mx.array) -> mx.array:
        loss, gradients = nn.value_and_grad(model, loss_of)(windows)
        optimizer.update(model, gradients)
        return loss

    progress = trange(steps, desc="training a small llama", unit="step")
    for _ in progress:
        starts = random.integers(len(tokens) - CONTEXT, size=BATCH)
        loss = step(mx.array(tokens[starts[:, None] + np.arange(CONTEXT + 1)]))
        mx.eval(state, loss)
        progress.set_postfix(loss=f"{loss.item():.2f}", refresh=False)
    return model


def greedily(model: nn.Module, tokens: mx.array, count: int) -> list[int]:
    """The next tokens after ``(1, length)`` tokens, always the likeliest."""
    length = tokens.shape[1]
    for _ in range(count):
        tokens = mx.concatenate([tokens, mx.argmax(model(tokens)[:, -1:], axis=-1)], axis=1)
    return list(map(int, tokens[0, length:]))


# The task


def write_task(folder: str | Path, seed: int = 1) -> Path:
    """``train.jsonl``, ``valid.jsonl`` and ``test.jsonl`` of numbers and names of characters.

    Each line is ``{"prompt": ..., "completion": ...}``, one of mlx-lm's formats.

    Args:
        folder: The folder. Files that are already there are kept if they were made alike.
        seed: Seed of the characters and their order.

    Returns:
        The folder.
    """
    folder, content = Path(folder), {"seed": seed, "lines": LINES}
    if was_written(folder / "task.json", content):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    examples = named_characters()
    order = iter(np.random.default_rng(seed).permutation(len(examples)))
    for split, count in LINES.items():
        lines = [json.dumps(examples[i]) for i in islice(order, count)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_json(folder / "task.json", content)
    return folder


def named_characters() -> list[dict[str, str]]:
    """Every character whose name is more than its number."""
    names = {number: unicodedata.name(chr(number), "") for number in CHARACTERS}
    return [
        {"prompt": f"name(chr({number:#x}))", "completion": name.lower()}
        for number, name in names.items()
        if name and not any(word in name for word in NUMBERED)
    ]


# Text


def modules() -> Iterator[ast.Module]:
    """Every module of the standard library, parsed."""
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-z]*.py")):
        yield ast.parse(file.read_text(encoding="utf-8", errors="ignore"))


def code_of(tree: ast.Module) -> list[str]:
    """The statements of a module, without comments and docstrings."""
    documented = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return [ast.unparse(statement) for statement in tree.body]


# Files


def was_written(path: Path, content: Any) -> bool:
    """Whether the file holds this content."""
    return path.exists() and json.loads(path.read_text(encoding="utf-8")) == content


def write_json(path: Path, content: Any) -> None:
    """Write a file of JSON."""
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
