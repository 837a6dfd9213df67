"""Build a small model of every architecture of mlx-lm, and make a step of LoRA and of all weights.

    python examples/compare_architectures.py
    python examples/compare_architectures.py --compiled llama mamba2
    python examples/compare_architectures.py --compiled > examples/records/architectures.md

It prints a table: parameters of each role, and whether both steps ran: every parameter of the plan
with a gradient moved, no other moved, and all stayed finite. `tests/test_architectures.py` compares
the roles with those written down from the code of the models. The last column is the estimate of
`mlx-maxfactor fits` for training all weights in mlx-lm's trainer, over the real peak.
"""

from __future__ import annotations

import argparse
import inspect
import pkgutil
import re
from ast import literal_eval
from collections import Counter
from importlib import import_module
from importlib.metadata import version
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models
from compare_memory import clear, real_peak
from compare_optimizers import markdown
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_maxfactor import create_optimizer
from mlx_maxfactor.finetuning.memory_estimate import Request, estimate
from mlx_maxfactor.routing.roles import find_roles

NO_MODEL = "activations base bitlinear_layers cache gated_delta mla pipeline rope_utils ssm"
SKIPPED = dict.fromkeys([*NO_MODEL.split(), "switch_layers"], "no model") | {
    "olmo": "needs the package ai2-olmo",
    "prism_hadamard_qwen35": "only as weights packed in 2 bits",
}
METAL = "its Metal kernels do not run on a CPU"
NOT_TRAINED = {
    "bitnet": METAL,
    "muse_spark": METAL,
    "deepseek_v41": "it has no gradient: it differentiates the indices of its experts",
    "recurrent_gemma": "its class does not call the constructor of `nn.Module`",
}
"""Why mlx-lm itself cannot make a step."""

SLIDING = ["sliding_attention", "full_attention"]
ROPE: dict[str, Any] = {"rope_theta": 1e4, "rope_type": "default"}

# Most fields have one meaning in all architectures. The widths differ, so that no two shapes match
# by accident.
FIELDS = """
32: hidden_size hidden_dim d_model n_embd model_dim block_dim dim_model_base mamba_d_ssm
50: vocab_size num_vocab vocab_size_per_layer_input
64: intermediate_size n_inner ff_intermediate_size block_ff_dim ffn_hidden_size
64: intermediate_size_mlp dense_intermediate_size max_position_embeddings n_ctx n_positions
64: block_size original_max_position_embeddings model_max_length
2: num_hidden_layers num_layers n_layers n_layer num_transformer_layers layer_group_size
2: group_norm_size num_key_value_heads num_kv_heads n_kv_heads n_shared_head swa_num_key_value_heads
2: num_attention_groups index_n_heads num_experts_per_tok num_experts_per_token moe_topk moe_k
2: moe_top_k mamba_expand linear_num_key_heads conv_window o_groups sliding_window_pattern
2: full_attention_interval dense_attention_every_n_layers cla_share_factor attn_layer_period
2: expert_layer_period attn_res_block_size interleave_moe_layer_step mamba_step
4: num_attention_heads num_heads n_heads n_head swa_num_attention_heads mamba_num_heads
4: mamba_n_heads conv_kernel mamba_d_conv short_conv_kernel_size linear_conv_kernel_dim conv1d_width
4: linear_num_value_heads a_low_rank_dim rotary_dim qk_rope_head_dim index_topk
8: head_dim kv_channels hidden_size_per_head swa_head_dim swa_v_head_dim global_head_dim
8: index_head_dim mamba_d_head mamba_head_dim linear_key_head_dim query_pre_attn_scalar
8: sliding_window sliding_window_size window_size attention_window_size attention_chunk_size
8: qk_nope_head_dim ffn_dim_divisor block_multiple_of ngram_vocab_size_ratio
24: moe_intermediate_size expert_ffn_hidden_size moe_hidden_size
40: shared_expert_intermediate_size shared_intermediate_size moe_shared_expert_intermediate_size
40: share_expert_dim
6: num_experts n_routed_experts num_local_experts moe_num_experts state_size ssm_state_size
6: mamba_d_state hidden_size_per_layer_input gate_low_rank_dim
1: n_shared_experts num_shared_experts num_shared_expert n_group topk_group num_expert_group
1: n_groups mamba_n_groups num_dense_layers decoder_sparse_step first_k_dense_replace moe_layer_freq
1: num_kv_reuse_layers zero_expert_num attn_layer_offset expert_layer_offset
0: num_kv_shared_layers pad_token_id altup_active_idx
5: v_low_rank_dim laurel_rank
7: decay_low_rank_dim o_lora_rank
3: conv_L_cache time_step_rank altup_num_inputs
10: linear_value_head_dim v_head_dim
12: q_lora_rank kv_lora_rank
1e-5: rms_norm_eps layer_norm_eps layer_norm_epsilon norm_eps layernorm_epsilon post_norm_eps
1e4: rope_theta rope_local_base_freq swa_rope_theta
10000: rotary_emb_base
0.5: partial_rotary_factor rotary_pct
1.0: logits_scaling embedding_multiplier residual_multiplier attention_multiplier scale_depth
1.0: scale_emb output_multiplier routed_scaling_factor block_ffn_dim_multiplier
30.0: final_logit_softcapping logits_soft_cap gegelu_limit
100.0: altup_coef_clip
False: tie_word_embeddings attention_bias mlp_bias use_bias mamba_proj_bias conv_bias
False: block_auto_adjust_ff_dim add_full_attention_sink_bias
True: use_qk_norm qk_norm post_norm use_qkv_bias norm_topk_prob use_expert_bias use_conv_bias
True: use_cla linear_allow_neg_eigval mla_scale_q_lora mla_scale_kv_lora use_mixed_mlp_moe
True: altup_correct_scale add_swa_attention_sink_bias
"""
SMALL: dict[str, Any] = {
    name: literal_eval(value)
    for value, _, names in (line.partition(":") for line in FIELDS.split("\n"))
    for name in names.split()
} | {
    "hidden_act": "silu",
    "rope_scaling": None,
    "mlp_only_layers": [],
    "layer_types": ["full_attention"] * 2,
    "time_step_limit": (0.001, 100.0),
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "attention_method": "MLA",
    "zero_expert_type": "identity",
    "rope_parameters": {
        **ROPE,
        **dict.fromkeys(SLIDING, ROPE),
        "factor": 1.0,
        "llama_4_scaling_beta": 0.1,
        "original_max_position_embeddings": 64,
    },
}


def text(family: str, **config: Any) -> dict[str, Any]:
    """The part of a multimodal model's config that describes its language model."""
    return {"text_config": {**SMALL, "model_type": family, **config}}


KIMI_LINEAR = {
    "num_heads": 4,
    "head_dim": 8,
    "short_conv_kernel_size": 4,
    "kda_layers": [1],
    "full_attn_layers": [2],
}
LFM2 = {"layer_types": ["conv", "full_attention"]}
NAS = [{"n_heads_in_group": 2}, {"replace_with_linear": True}]
CORRECTIONS: dict[str, dict[str, Any]] = {
    "baichuan_m1": {"sliding_window_layers": [0]},
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 6, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
    },
    "deepseek_v2": {"rope_scaling": {"factor": 1.0}},
    "exaone4": {"sliding_window_pattern": "LG"},
    "exaone_moe": {"is_moe_layer": [False, True], "layer_types": SLIDING},
    "gemma3": text("gemma3_text"),
    "gemma3n": text("gemma3n", layer_types=SLIDING, activation_sparsity_pattern=[0.0, 0.0]),
    "gemma4": text("gemma4_text"),
    "gpt_oss": {"layer_types": SLIDING},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hunyuan": {"rope_scaling": {"factor": 1.0, "type": "dynamic", "alpha": 1.0}},
    "kimi_k25": text("deepseek_v3"),
    "kimi_k3": {"hidden_act": "situ", "linear_attn_config": KIMI_LINEAR},
    "kimi_linear": {"linear_attn_config": KIMI_LINEAR},
    "kimi_vl": text("kimi_vl"),
    "lfm2": LFM2,
    "lfm2-vl": text("lfm2", **LFM2),
    "lfm2_moe": LFM2,
    "lille-130m": {"n_embd": 64},
    "llama4": text("llama4", num_experts_per_tok=1, num_hidden_layers=4),
    "llama4_text": {"no_rope_layers": [1, 0]},
    "mamba2": {"num_heads": 8},
    "mimo_v2_flash": {"hybrid_layer_pattern": [1, 0], "moe_layer_freq": [0, 1]},
    "minicpm3": {
        "rope_scaling": {
            "original_max_position_embeddings": 64,
            "short_factor": [1.0, 1.0],
            "long_factor": [1.0, 1.0],
        }
    },
    "minimax_m3_vl": text(
        "minimax_m3_vl", moe_layer_freq=[0, 1], layer_types=None, rope_parameters=None
    ),
    "mistral3": text("ministral3"),
    "muse_spark": text(
        "muse_spark", num_shared_experts=0, layer_rope_theta=[1e4, 0], layer_types=SLIDING
    ),
    "nemotron": {"hidden_act": "relu2"},
    "nemotron-nas": {
        "block_configs": [
            {"attention": NAS[0], "ffn": {"ffn_mult": 1.0}},
            {"attention": NAS[1], "ffn": NAS[1]},
        ]
    },
    "nemotron_h": {
        "hybrid_override_pattern": [*"M*-E"],
        "layer_types": None,
        "num_hidden_layers": 4,
    },
    "olmo3": {"layer_types": SLIDING},
    "olmo_hybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "openelm": {
        "num_query_heads": [4, 4],
        "num_kv_heads": [2, 2],
        "ffn_multipliers": [1.0, 2.0],
    },
    "phi3small": {"vocab_size": 100_352},  # it writes to the last hundred
    "pixtral": text("llama"),
    "qwen3_5": text("qwen3_5_text", num_experts=0),
    "qwen3_5_moe": text("qwen3_5_moe_text"),
    "qwen3_vl_moe": text("qwen3_moe"),
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "spark2_5": {"hidden_act": "gelu"},
    "step3p5": {"moe_layers_enum": "1"},
}

ARCHITECTURES = [
    module.name
    for module in pkgutil.iter_modules(mlx_lm.models.__path__)
    if module.name not in SKIPPED
]


def arrays(tree: Any) -> dict[str, Any]:
    """The arrays of a tree by path."""
    return dict(tree_flatten(tree))


def config_of(name: str) -> dict[str, Any]:
    """The config of a small model."""
    return {**SMALL, "model_type": name, **CORRECTIONS.get(name, {})}


def build(name: str) -> nn.Module:
    """A small model with random weights."""
    mx.random.seed(0)
    module = import_module(f"mlx_lm.models.{name}")
    model = module.Model(module.ModelArgs.from_dict(config_of(name)))
    for path, x in arrays(model.parameters()).items():  # RWKV 7 has zeros where weights are to come
        if mx.issubdtype(x.dtype, mx.floating) and not mx.any(x).item():
            model.update(tree_unflatten([(path, 0.1 * mx.random.normal(x.shape))]))
    return model


OTHERS = """Of the three others, dbrx evaluates an array in its forward pass, so that no trainer can compile it. gemma3n and
kimi_k3 read the `weight` of a layer that LoRA has replaced, with mlx-lm's own commands too."""  # noqa: E501


def add_lora(model: nn.Module) -> nn.Module:
    """Freeze the model, and add LoRA of rank 4 to all layers as mlx-lm does."""
    model.freeze()
    config = {"rank": 4, "scale": 20.0, "dropout": 0.0}
    linear_to_lora_layers(model, len(cast(Any, model).layers), config)
    return model


def step_problem(model: nn.Module, compiled: bool = False) -> str:
    """Train for two steps. Say what is wrong with the second, or return an empty string."""
    optimizer = create_optimizer(model)
    planned = {entry.path for entry in optimizer.plan}
    tokens = mx.random.randint(0, 50, (2, 7))

    def loss_of(tokens: mx.array) -> mx.array:
        logits = model(tokens[:, :-1]).astype(mx.float32)
        return nn.losses.cross_entropy(logits, tokens[:, 1:], reduction="mean")

    def step(tokens: mx.array) -> tuple[mx.array, Any]:
        loss, gradients = nn.value_and_grad(model, loss_of)(tokens)
        optimizer.update(model, gradients)
        return loss, gradients

    if compiled:
        state = [model.state, optimizer.state]
        step = mx.compile(step, inputs=state, outputs=state)
    before, loss, gradients = {}, mx.array(0.0), {}
    for _ in range(2):  # in the first, LoRA's B is zero, so that A has no gradient
        before = arrays(model.parameters())
        try:
            loss, gradients = step(tokens)
        except Exception as problem:
            return f"{type(problem).__name__}: {problem}".partition("\n")[0]
        mx.eval(model.state, optimizer.state, loss, gradients)
    if not mx.isfinite(loss).item():
        return "the loss is not finite"
    flat = arrays(gradients)
    for path, new in arrays(model.parameters()).items():
        moved = not mx.array_equal(new, before[path]).item()
        if not mx.all(mx.isfinite(new)).item():
            return f"{path} is not finite"
        if moved and path not in planned:
            return f"{path} is not in the plan, and moved"
        if path in planned and not moved and mx.any(flat[path]).item():
            return f"{path} has a gradient, and did not move"
    return ""


def estimate_over_peak(name: str) -> str:
    """The estimated peak of training all weights over the real one, or why there is none."""
    mx.random.seed(0)
    sizes = {"batch_size": 8, "max_seq_length": 48, "num_layers": -1, "dtype": "float32"}
    request = Request(config_of(name), fine_tune_type="full", **sizes)
    try:
        real = real_peak(request)
        clear()
        return f"{estimate(request).peak / real:.2f}"
    except Exception as problem:
        return f"{type(problem).__name__}: {problem}".partition("\n")[0]


def row(name: str, compiled: bool) -> tuple[str, ...]:
    """What the table says of an architecture."""
    parameters = find_roles(build(name))
    count = Counter(p.note if p.note == "unexplained" else p.role for p in parameters)
    roles = ", ".join(f"{number} {role}" for role, number in count.items())
    if name in NOT_TRAINED:
        return name, roles, NOT_TRAINED[name], "", ""
    problems = [step_problem(model, compiled) for model in (add_lora(build(name)), build(name))]
    return name, roles, *(problem or "yes" for problem in problems), estimate_over_peak(name)


def main() -> None:
    """Print the table, or for some names only their rows."""
    parser = argparse.ArgumentParser(description=inspect.getdoc(inspect.getmodule(main)))
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these")
    parser.add_argument("--compiled", action="store_true", help="compile each step")
    given = parser.parse_args()
    if not given.compiled:
        mx.disable_compile()  # a CPU compiles the kernels of each model for seconds
    header = ("architecture", "parameters of each role", "LoRA", "all weights", "`fits`")
    rows = [row(name, given.compiled) for name in given.names or ARCHITECTURES]
    built = [cells for cells in rows if cells[0] not in NOT_TRAINED]
    right = sum(cells[2:4] == ("yes", "yes") for cells in built)
    print(f"# Architectures of mlx-lm {version('mlx-lm')}\n")
    print(
        f"Both steps are right for {right} of {len(built)} architectures that MLX can train here."
    )
    ratios = [float(cells[4]) for cells in rows if re.fullmatch(r"[\d.]+", cells[4])]
    if ratios:
        near = sum(abs(ratio - 1) <= 0.15 for ratio in ratios)
        print(
            f"The estimate of `fits` is within 15 % of the real peak for {near} of {len(ratios)}."
        )
    print("`python examples/compare_architectures.py --compiled` makes this page, and says what is")
    print("measured.")
    if not given.names:
        print(OTHERS)
    print()
    print(markdown([header, *rows]))
    if not given.names:
        print("\nNot built:", "; ".join(f"{k}: {v}" for k, v in SKIPPED.items() if v != "no model"))


if __name__ == "__main__":
    main()
