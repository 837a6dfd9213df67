"""Compare `mlx-maxfactor fits` with the peaks of real fine-tuning runs.

    python examples/compare_memory.py
    python examples/compare_memory.py --rows 3 --models gpt2 mamba2

Each row makes a small model with random weights, trains it for three updates in mlx-lm's trainer,
with the guard of `mlx-maxfactor lora`, and reads `mx.get_peak_memory()`. The estimate is made
afterwards, from the model's configuration alone. The last columns are what the estimate took:
seconds, and its own peak over the real one.
"""

import argparse
import gc
import itertools
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import numpy as np
from mlx_lm.tuner.trainer import TrainingArgs, train
from tqdm import tqdm

from mlx_maxfactor.finetuning.memory_estimate import Request, estimate, restoring_layers
from mlx_maxfactor.finetuning.optimizer_names import make_optimizer

HEAD = ["model", "training", "layers x width", "tokens", "optimizer", "weights", "real, MB"]
HEAD += ["estimate, MB", "ratio", "seconds", "peak over real"]
SHARED = {"rms_norm_eps": 1e-5, "layer_norm_epsilon": 1e-5, "norm_eps": 1e-5, "vocab_size": 1024}
SHARED |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "rope_theta": 1e4}
SHARED |= {"max_position_embeddings": 2048, "attention_bias": False, "tie_word_embeddings": True}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
EXPERTS |= {"moe_intermediate_size": 96, "shared_expert_intermediate_size": 96}
MAMBA = {"state_size": 16, "conv_kernel": 4, "n_groups": 1, "use_bias": False}
MAMBA |= {"use_conv_bias": True, "time_step_rank": "auto", "time_step_limit": [0.0, 1e3]}
HYBRID = {f"mamba_{key}": x for key, x in {"n_heads": 8, "d_head": 64, "d_state": 16}.items()}
HYBRID |= {"mamba_d_conv": 4, "mamba_n_groups": 1, "mamba_conv_bias": True, "mamba_expand": 2}
HYBRID |= {"mamba_proj_bias": False, "shared_intermediate_size": 256, "embedding_multiplier": 1.0}
HYBRID |= {"attention_multiplier": 0.1, "logits_scaling": 1.0, "residual_multiplier": 1.0}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "gemma2": {},
    "phi3": {},
    "gpt2": {"n_ctx": 1024, "n_positions": 1024, "n_head": 4},
    "mixtral": EXPERTS,
    "gpt_oss": EXPERTS,
    "openelm": {
        "ffn_dim_divisor": 64,
        "num_query_heads": [4] * 8,
        "num_kv_heads": [2] * 8,
        "ffn_multipliers": [0.5 + 0.5 * i for i in range(8)],
    },
    "deepseek_v3": EXPERTS
    | {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "first_k_dense_replace": 3,
        "kv_lora_rank": 64,
        "q_lora_rank": None,
        "qk_rope_head_dim": 32,
        "qk_nope_head_dim": 64,
        "v_head_dim": 64,
    },
    "gemma4_text": {
        "global_head_dim": 128,
        "num_kv_shared_layers": 4,
        "hidden_size_per_layer_input": 32,
        "vocab_size_per_layer_input": 2048,
        "sliding_window_pattern": 2,
        "sliding_window": 128,
    },
    "mamba2": MAMBA | {"num_heads": 8, "intermediate_size": 512},
    "granitemoehybrid": {**HYBRID, "layer_types": ["mamba", "mamba", "attention", "mamba"] * 2},
    "nemotron_h": MAMBA
    | {
        "hybrid_override_pattern": list("M-M*M-M*"),
        "mamba_num_heads": 8,
        "mamba_head_dim": 64,
        "mamba_proj_bias": False,
        "mlp_bias": False,
        "ssm_state_size": 16,
    },
    "lfm2": {
        "conv_bias": False,
        "conv_L_cache": 3,
        "block_multiple_of": 64,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
        "full_attn_idxs": [2, 5],
    },
    "qwen3_next": EXPERTS
    | {
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "linear_conv_kernel_dim": 4,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "partial_rotary_factor": 0.5,
    },
    "hunyuan": EXPERTS
    | {
        "moe_topk": 2,
        "rope_scaling": {"type": "dynamic", "factor": 1.0, "alpha": 1000.0},
        "num_shared_expert": 1,
        "use_mixed_mlp_moe": True,
        "use_qk_norm": True,
        "use_cla": True,
        "cla_share_factor": 2,
    },
}
WAYS = list(itertools.product(("lora", "full"), (False, True)))
OPTIMIZERS = ("orthomaxfactor", "mlx_adamw", "muon", "orthomaxfactor", "adamw")
WEIGHTS = ("float32", "float32", "4 bits", "bfloat16", "float32", "float32")
TOKENS = ((4, 64), (2, 128), (1, 256))
USABLE = [2 / 3 * x if x <= 32 else 3 / 4 * x for x in (8, 16, 24, 32, 36, 48, 64, 96, 128)]


def main() -> None:
    from compare_optimizers import markdown  # which imports matplotlib

    parser = argparse.ArgumentParser(description="Compare estimates with real peaks.")
    parser.add_argument("--rows", type=int, default=64, help="how many rows (64)")
    parser.add_argument("--models", nargs="*", default=list(MODELS), help="these alone")
    given = parser.parse_args()
    wanted = [line for line in requests() if line[1] in given.models][: given.rows]
    rows, peaks = [HEAD], []
    for request, name in tqdm(wanted):
        line, both = row(request, name)
        rows.append(line)
        peaks.append(both)
        print("|", " | ".join(line), "|", flush=True)
    print(f"\n{markdown(rows)}\n\n{summary(peaks)}")


def requests() -> list[tuple[Request, str]]:
    """Every model with every way of training; optimizers, weights and lengths take turns."""
    found = []
    optimizers, lengths = itertools.cycle(OPTIMIZERS), itertools.cycle(TOKENS)
    weights = itertools.cycle(WEIGHTS)
    for number, (name, model) in enumerate(MODELS.items()):
        for index, (kind, checkpointed) in enumerate(WAYS):
            dtype, (batch, tokens) = next(weights), next(lengths)
            if dtype == "bfloat16" and "num_experts" in model:
                dtype = "float32"  # a CPU has no other product with gathered experts
            width, layers = 192 if index % 2 else 256, model.get("num_hidden_layers", 8)
            sizes = {"hidden_size": width, "n_embd": width, "model_dim": width, "block_dim": width}
            counts = dict.fromkeys(
                ("num_hidden_layers", "n_layer", "num_transformer_layers"), layers
            )
            config = SHARED | {"intermediate_size": 2 * width + 64} | sizes | counts | model
            bits = 4 if dtype == "4 bits" and kind == "lora" else None
            request = Request(
                config | {"model_type": name},
                next(optimizers),
                fine_tune_type=kind,
                num_layers=5 if number % 3 == 2 and index % 2 else -1,
                batch_size=batch,
                max_seq_length=tokens,
                grad_checkpoint=checkpointed,
                grad_accumulation_steps=2 if (number + index) % 5 == 4 else 1,
                dtype="bfloat16" if dtype == "bfloat16" else "float32",
                bits=bits,
            )
            found.append((request, name))
    return found


def row(request: Request, name: str) -> tuple[list[str], tuple[float, float]]:
    """A line of the table, and the real and the estimated peak in bytes."""
    real = real_peak(request)
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
    line = [
        name,
        kind,
        f"{request.layers} x {request.config['hidden_size']}",
        f"{request.batch_size} x {request.max_seq_length}",
        request.optimizer,
        f"{request.bits} bits" if request.bits else str(request.dtype),
        f"{real / 1e6:.0f}",
        f"{found.peak / 1e6:.0f}",
        f"{found.peak / real:.3f}",
        f"{seconds:.0f}",
        f"{own / real:.2f}",
    ]
    return line, (real, found.peak)


def summary(peaks: Sequence[tuple[float, float]]) -> str:
    """The ratios, and what would have been said of Macs a hundredth of the size."""
    ratios = sorted(estimated / real for real, estimated in peaks)
    near = sum(abs(ratio - 1) <= 0.1 for ratio in ratios)
    asked = [(real, found, x * 2**30 / 100) for real, found in peaks for x in USABLE]
    said = [real > limit for real, found, limit in asked if found <= limit]
    refused = [real <= limit for real, found, limit in asked if found > limit]
    return (
        f"ratios: {ratios[0]:.3f} to {ratios[-1]:.3f}; {near} of {len(ratios)} within 10 %; "
        f"{sum(ratio < 1 for ratio in ratios)} below 1\n"
        f'"fits" was said {len(said)} times, wrongly {sum(said)} times; '
        f'"does not fit" {len(refused)} times, wrongly {sum(refused)} times'
    )


def real_peak(request: Request) -> int:
    """Peak bytes of three updates in mlx-lm's trainer."""
    clear()
    before = mx.get_active_memory()
    model = request.build()
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
    return mx.get_peak_memory() - before


def clear() -> None:
    gc.collect()
    mx.clear_cache()
    mx.reset_peak_memory()


if __name__ == "__main__":
    main()
