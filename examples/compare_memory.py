"""Compare `mlx-maxfactor fits` with the peaks of real fine-tuning runs.

    python examples/compare_memory.py
    python examples/compare_memory.py --rows 3

Each row makes a small model with random weights, trains it for three updates in mlx-lm's trainer,
with the guard of `mlx-maxfactor lora`, and reads `mx.get_peak_memory()`. The estimate is made
afterwards, from the model's configuration alone. The last columns are what the estimate took:
seconds, and its own peak over that of a real step with two layers.
"""

import argparse
import gc
import itertools
import time
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import numpy as np
from compare_optimizers import markdown
from mlx_lm.tuner.trainer import TrainingArgs, train
from tqdm import tqdm

from mlx_maxfactor.finetuning.memory_estimate import Request, estimate, restoring_layers
from mlx_maxfactor.finetuning.optimizer_names import make_optimizer

HEAD = ["model", "training", "layers x width", "tokens", "optimizer", "real, MB", "estimate, MB"]
HEAD += ["ratio", "seconds", "peak over two layers"]
SHARED = {"rms_norm_eps": 1e-5, "vocab_size": 4096, "num_hidden_layers": 8}
NARROW = {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 4}
WIDE = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "num_key_value_heads": 4, "tie_word_embeddings": True},
    "qwen3": {
        "model_type": "qwen3",
        "num_key_value_heads": 2,
        "head_dim": 64,
        "rope_theta": 1e6,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    },
    "gemma2": {"model_type": "gemma2", "num_key_value_heads": 2, "head_dim": 64},
    "mixtral": {
        "model_type": "mixtral",
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
}
KINDS = list(itertools.product(("lora", "full"), (False, True)))
OPTIMIZERS = ("orthomaxfactor", "mlx_adamw", "muon")
SIZES = ((4, 1024, WIDE), (8, 512, WIDE), (16, 256, WIDE), (8, 1024, NARROW), (16, 512, NARROW))


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare estimates with real peaks.")
    parser.add_argument("--rows", type=int, default=32, help="how many rows (32)")
    parser.add_argument("--checkpointed", action="store_true", help="rows with checkpoints alone")
    given = parser.parse_args()
    wanted = [
        (request, name)
        for request, name in requests()[: given.rows]
        if request.grad_checkpoint or not given.checkpointed
    ]
    rows = [HEAD]
    for request, name in tqdm(wanted):
        rows.append(row(request, name))
        print("|", " | ".join(rows[-1]), "|", flush=True)
    print("\n" + markdown(rows))
    ratios = sorted(float(line[7]) for line in rows[1:])
    print(f"\nratios: {ratios[0]:.2f} to {ratios[-1]:.2f} in {len(ratios)} rows")


def requests() -> list[tuple[Request, str]]:
    """Every model with every kind of training; optimizers and sizes take turns."""
    found, sizes = [], itertools.cycle(SIZES)
    for name, model in MODELS.items():
        for index, (kind, checkpointed) in enumerate(KINDS * 2):
            layers, tokens, width = next(sizes)
            config = {**SHARED, **width, **model, "num_hidden_layers": layers}
            optimizer = OPTIMIZERS[(index + len(found)) % 3]
            request = Request(
                config,
                optimizer,
                fine_tune_type=kind,
                num_layers=-1 if index < 4 else layers // 2,
                batch_size=1024 // tokens,
                max_seq_length=tokens,
                grad_checkpoint=checkpointed,
                grad_accumulation_steps=2 if index in (4, 7) else 1,
                dtype="float32",
            )
            found.append((request, name))
    return found


def row(request: Request, name: str) -> list[str]:
    """A line of the table."""
    real = real_peak(request)
    two = real_peak(replace(request, num_layers=-1), layers=2)
    clear()
    start, peaks, reset = time.perf_counter(), [0], mx.reset_peak_memory

    def note_and_reset() -> None:
        peaks.append(mx.get_peak_memory())
        reset()

    with patch.object(mx, "reset_peak_memory", note_and_reset):
        found = estimate(request)
    seconds, own = time.perf_counter() - start, max(*peaks, mx.get_peak_memory())
    kind = request.fine_tune_type + (", checkpointed" if request.grad_checkpoint else "")
    if request.trained_layers < request.layers:
        kind += f", {request.trained_layers} layers"
    if request.grad_accumulation_steps > 1:
        kind += ", 2 batches"
    return [
        name,
        kind,
        f"{request.layers} x {request.config['hidden_size']}",
        f"{request.batch_size} x {request.max_seq_length}",
        request.optimizer,
        f"{real / 1e6:.0f}",
        f"{found.peak / 1e6:.0f}",
        f"{found.peak / real:.3f}",
        f"{seconds:.0f}",
        f"{own / two:.2f}",
    ]


def real_peak(request: Request, layers: int | None = None) -> int:
    """Peak bytes of three updates in mlx-lm's trainer."""
    clear()
    model = request.build(layers)
    optimizer = make_optimizer(model, request.optimizer)
    mx.eval(model.parameters(), optimizer.state)
    random = np.random.default_rng(0)
    shape = (4 * request.batch_size, request.max_seq_length)
    data = [(line, 0) for line in random.integers(request.config["vocab_size"], size=shape)]
    mx.clear_cache()
    mx.reset_peak_memory()
    with TemporaryDirectory() as folder, redirect_stdout(StringIO()), restoring_layers(model):
        arguments = TrainingArgs(
            batch_size=request.batch_size,
            iters=3 * request.grad_accumulation_steps,
            max_seq_length=request.max_seq_length,
            grad_checkpoint=request.grad_checkpoint,
            grad_accumulation_steps=request.grad_accumulation_steps,
            adapter_file=f"{folder}/adapters.safetensors",
        )
        train(model, optimizer, data, args=arguments)
    return mx.get_peak_memory()


def clear() -> None:
    gc.collect()
    mx.clear_cache()
    mx.reset_peak_memory()


if __name__ == "__main__":
    main()
