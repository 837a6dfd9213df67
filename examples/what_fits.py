"""What fits on which Mac: weights, gradients and optimizer state of models of 0.5 B to 32 B.

    pip install mlx-lm && python examples/what_fits.py

The shapes are those of Qwen2.5 in bf16, from shapes alone: nothing is allocated. Activations come
on top, so that a Mac counts as large enough where these take at most two thirds of its memory.
"""

from __future__ import annotations

import argparse
from typing import Any

import mlx.core as mx
import mlx.optimizers as mlx_optimizers
from mlx.nn import Module
from mlx.utils import tree_flatten
from mlx_lm.models.qwen2 import Model, ModelArgs

from mlx_maxfactor import estimate_state_bytes

MACS = (16, 36, 64, 128)  # GB
SHARE = 2 / 3
GB = 1e9

# Width, layers, hidden width, heads, key and value heads, vocabulary, tied.
SHAPES = {
    "0.5 B": (896, 24, 4864, 14, 2, 151936, True),
    "1.5 B": (1536, 28, 8960, 12, 2, 151936, True),
    "3 B": (2048, 36, 11008, 16, 2, 151936, True),
    "7 B": (3584, 28, 18944, 28, 4, 152064, False),
    "14 B": (5120, 48, 13824, 40, 8, 152064, False),
    "32 B": (5120, 64, 27648, 40, 8, 152064, False),
}


def main() -> None:
    argparse.ArgumentParser(description="What fits on which Mac, from shapes alone.").parse_args()
    few_bits = {"state_dtype": "int4", "factored": True}
    ours = {
        "`create_optimizer(model)`": {},
        "embedding in 4 bits": {"rest_options": few_bits},
        '`rest="adafactor"`': {"rest": "adafactor"},
        "and `momentum=0`": {"rest": "adafactor", "momentum": 0},
    }
    print("| GB, bf16 | weights | `mlx.optimizers.AdamW` |", " | ".join(ours), "|")
    print("|---" * (3 + len(ours)) + "|")
    for name in SHAPES:
        model = build(name)
        weights = bytes_of(model.parameters())
        adamw = mlx_optimizers.AdamW(1e-3)
        adamw.init(model.trainable_parameters())
        states = [bytes_of(adamw.state)]
        states += [estimate_state_bytes(model, **options) for options in ours.values()]
        cells = [cell(2 * weights + state) for state in states]
        print(f"| {name} | {weights / GB:.1f} |", " | ".join(cells), "|")


def build(name: str) -> Module:
    """The model, of which no array is ever made."""
    width, layers, hidden, heads, kv_heads, vocabulary, tied = SHAPES[name]
    model = Model(
        ModelArgs(
            model_type="qwen2",
            hidden_size=width,
            num_hidden_layers=layers,
            intermediate_size=hidden,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            rms_norm_eps=1e-6,
            vocab_size=vocabulary,
            tie_word_embeddings=tied,
        )
    )
    model.set_dtype(mx.bfloat16)
    return model


def bytes_of(tree: Any) -> int:
    arrays: Any = tree_flatten(tree)
    return sum(array.nbytes for _, array in arrays)


def cell(size: float) -> str:
    """A size, and the smallest Mac of which it is at most the share."""
    mac = next((mac for mac in MACS if size <= SHARE * mac * GB), None)
    return f"{size / GB:.1f} ({mac} GB)" if mac else f"{size / GB:.1f}"


if __name__ == "__main__":
    main()
