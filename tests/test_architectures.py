"""The roles of every parameter of mlx-lm's architectures, written down from the models' code.

`examples/compare_architectures.py` builds the small models, and makes the steps of the record.
"""

from fnmatch import fnmatchcase
from importlib.metadata import version

import mlx.core as mx
import pytest
from compare_architectures import ARCHITECTURES, NOT_TRAINED, add_lora, build, step_problem

from mlx_maxfactor.routing.roles import find_roles

pytestmark = pytest.mark.skipif(
    tuple(map(int, version("mlx-lm").split(".")[:3])) < (0, 32, 2),
    reason="the configs are for mlx-lm 0.32.2",
)

# Patterns of paths by role, for names that mean the same in all models. The first that matches
# decides, and a model's own patterns come before them.
COMMON = {
    "norm": "*norm.weight *norm.bias *layernorm.?.weight *norm_f.weight *.norm_[12].weight"
    " *.ln*.weight *.ln*.bias",
    "bias": "*bias",
    "vector": "*.D *.sinks *_scale",
    "router": "*.gate.weight *.router.weight *.router.layer.weight",
    "experts": "*.switch_mlp.*.weight *.embed_q.weight *.unembed_out.weight",
    "embedding": "*embed_tokens.weight *embeddings.weight *.wte.weight *.wpe.weight",
    "head": "lm_head.weight language_model.lm_head.weight",
    "depthwise": "*conv1d.weight *conv.conv.weight",
    "hidden": "*_proj.weight *.kv_a_proj_with_mqa.weight",
}
GROUPED_GATE = {"router": "*.gate.gate_proj.weight", "embedding": "*word_embeddings.weight"}
FUSED = {"hidden": "*.query_key_value.weight *.dense.weight"}
GPT = {"hidden": "*.c_*.weight"}
FEED_FORWARD = {"hidden": "*.feed_forward.w[123].weight"}
GEMMA4 = {
    "norm": "*norm.weight",
    "embedding": "*embed_tokens*.weight",
    "hidden": "*.per_layer_*.weight",
    "vector": "*.layer_scalar",
}
SHARED_EXPERT = {"router": "*.gate.weight *.shared_expert_gate.weight"}
A_LOG = {"vector": "*.A_log *.D"}

# What a model has beside these.
ROLES: dict[str, dict[str, str]] = {
    "Klear": {"experts": "*.mlp.experts.*", "hidden": "*.coefficient.weight"},
    "afm7": {"embedding": "model.embedding.weight", "vector": "*.quant_*_scale"},
    "afmoe": {"router": "*.router.gate.weight", "experts": "*.mlp.experts.*"},
    "apertus": {"vector": "*.alpha_[np] *.beta *.eps"},
    "baichuan_m1": {"hidden": "*.W_pack.weight", "unknown": "*.conv_[kv]"},
    "bailing_hybrid": GROUPED_GATE | FUSED,
    "bailing_moe": GROUPED_GATE | FUSED,
    "bailing_moe_linear": GROUPED_GATE | FUSED,
    "bailing_moe_v3": {"embedding": "*word_embeddings.weight", "hidden": "*.dense.weight"} | A_LOG,
    "dbrx": {"hidden": "*.experts.*.[vw][12].weight *.Wqkv.weight"},
    "deepseek_v32": {"hidden": "*.indexer.w*.weight"},
    # The hyper-connections mix the streams by bare arrays.
    "deepseek_v41": {"unknown": "*_hc.fn", "vector": "*_hc.scale *_hc.base *.sinks"}
    | {"experts": "*.o_a_proj.weight *.switch_mlp.*"},
    "dots1": {"experts": "*.mlp.experts.*"},
    "exaone": GPT,
    "falcon_h1": A_LOG,
    "gemma3n": {
        "norm": "*norm.weight",
        "embedding": "*embed_tokens*.weight",
        "router": "*.modality_router.weight",
        "hidden": "*_coefs.weight *.laurel.linear_* *.per_layer_* *_projections.*",
        "vector": "*.correct_output_scale",
    },
    "gemma4": GEMMA4,
    "gemma4_text": GEMMA4,
    "glm_moe_dsa": {"hidden": "*.indexer.w*.weight"},
    "gpt2": GPT,
    "gpt_bigcode": GPT,
    "gpt_neox": FUSED
    | {"embedding": "*.embed_in.weight", "head": "*.embed_out.weight"}
    | {"hidden": "*.query_key_value.weight *.dense*.weight"},
    "gpt_oss": {"experts": "*.mlp.experts.*.weight"},
    "gptj": {"hidden": "*.fc_*.weight *.*_proj.weight"},
    "granitemoehybrid": A_LOG | {"hidden": "*.shared_mlp.*.weight"},
    "hunyuan": {"router": "*.gate.wg.weight"},
    "internlm2": {
        "embedding": "*tok_embeddings.weight",
        "head": "output.weight",
        "hidden": "*.wqkv.weight *.wo.weight *.w[123].weight",
    },
    "iquestloopcoder": {"unknown": "*.gate_projections.*.weight"},
    "jamba": {"unknown": "*.A_log"},
    "kimi_k3": A_LOG,
    "kimi_linear": A_LOG,
    "laguna": {"router": "*.gate.proj.weight"},
    "lfm2": FEED_FORWARD,
    "lfm2-vl": FEED_FORWARD,
    "llama4": {"experts": "*.feed_forward.experts.*"},
    "llama4_text": {"head": "output.weight"},
    "longcat_flash": {"router": "*.router.classifier.weight"},
    "longcat_flash_ngram": {
        "router": "*.router.classifier.weight",
        "embedding": "*embeddings.weight *.embedders.*.weight",
        "hidden": "*.post_projs.*.weight",
    },
    "mamba": {"unknown": "*.A_log"},
    "mamba2": A_LOG,
    "muse_spark": {"vector": "*.add_*", "experts": "*.experts.*_proj.weight"},
    "nanochat": GPT,
    "nemotron-nas": {"hidden": "*.linear.weight"},
    "nemotron_h": A_LOG,
    "olmo_hybrid": A_LOG,
    "openelm": {"hidden": "*.ffn.proj_[12].weight"},
    "phi": {"hidden": "*.dense.weight *.fc[12].weight"},
    "phi3small": FUSED,
    "phixtral": {"head": "lm_head.linear.weight", "hidden": "*.Wqkv.weight"},
    # Two gains for each attention head are bare arrays.
    "plamo2": A_LOG | {"unknown": "*.[qk]_weight", "vector": "*_norm_weight *.A_log *.D"},
    "qwen": GPT | {"hidden": "*.c_*.weight *.w[12].weight"},
    "qwen2_moe": SHARED_EXPERT,
    "qwen3_5": A_LOG | {"hidden": "*.in_proj_*.weight"},
    "qwen3_5_moe": A_LOG | SHARED_EXPERT | {"hidden": "*.in_proj_*.weight"},
    "qwen3_next": A_LOG | SHARED_EXPERT | {"hidden": "*.in_proj_*.weight"},
    # Its own convolution and gates are bare arrays.
    "recurrent_gemma": {
        "unknown": "*.conv_1d.weight *_gate_weight *_gate_bias",
        "hidden": "*.linear_*.weight",
        "vector": "*.recurrent_param",
    },
    "rwkv7": {
        "vector": "*.x_?",
        "unknown": "*.k_k *.k_a *.r_k",
        "hidden": "*.lora.*.weight *.ffn.*.weight",
    },
    "spark2_5": {"embedding": "model.embedding.weight"},
    "starcoder2": GPT,
    "step3p5": {"router": "*.gate.gate.weight"},
    # The output layer is a bare array.
    "talkie": {
        "embedding": "*.embed.weight",
        "hidden": "*.attn_*.weight *.mlp_*.weight",
        "vector": "*_g",
        "head": "lm_head",
    },
}


def expected_role(name: str, path: str) -> str:
    for patterns in (ROLES.get(name, {}), COMMON):
        for role, globs in patterns.items():
            if any(fnmatchcase(path, glob) for glob in globs.split()):
                return role
    return "not written down"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_roles_are_those_of_the_code(name):
    found = {p.path: p.role for p in find_roles(build(name))}
    assert found == {path: expected_role(name, path) for path in found}


def test_roles_are_those_of_known_architectures():
    assert set(ROLES) <= set(ARCHITECTURES)


@pytest.mark.examples
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in NOT_TRAINED])
def test_both_steps_are_right(name):
    mx.disable_compile()
    try:
        # mlx-lm's own model reads the weight of a layer that became one of LoRA.
        if name not in ("gemma3n", "kimi_k3"):
            assert not step_problem(add_lora(build(name)))
        assert not step_problem(build(name))
    finally:
        mx.enable_compile()
