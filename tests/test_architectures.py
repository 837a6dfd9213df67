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
    "vector": "*.A_log *.D *.sinks *_scale",
    "router": "*.gate.weight *.gate.*.weight *_gate.weight *.router.*weight *_router.weight",
    "experts": "*.switch_mlp.*.weight *.experts.* *.embed_q.weight *.unembed_out.weight",
    "embedding": "*embed_tokens*.weight *embeddings.weight *model.embedding.weight *.wte.weight"
    " *.wpe.weight",
    "head": "lm_head.weight language_model.lm_head.weight",
    "depthwise": "*conv1d.weight *conv.conv.weight",
    "hidden": "*_proj.weight *.kv_a_proj_with_mqa.weight *.c_*.weight *.w[123].weight"
    " *.query_key_value.weight *.dense.weight *.indexer.w*.weight *.in_proj_*.weight *.Wqkv.weight",
}
GEMMA = {"norm": "*norm.weight", "vector": "*.layer_scalar *_scale"}
GEMMA |= {"hidden": "*_coefs.weight *.laurel.linear_* *_projections.* *.per_layer_*"}

# What a model has beside these.
ROLES: dict[str, dict[str, str]] = {
    "Klear": {"hidden": "*.coefficient.weight"},
    "afm7": {"vector": "*.quant_*_scale"},
    "apertus": {"vector": "*.alpha_[np] *.beta *.eps"},
    "baichuan_m1": {"hidden": "*.W_pack.weight", "unknown": "*.conv_[kv]"},
    "dbrx": {"hidden": "*.experts.*.[vw][12].weight"},
    # The hyper-connections mix the streams by bare arrays.
    "deepseek_v41": {"unknown": "*_hc.fn", "vector": "*_hc.scale *_hc.base *.sinks"}
    | {"experts": "*.o_a_proj.weight *.switch_mlp.*"},
    **dict.fromkeys(("gemma3n", "gemma4", "gemma4_text"), GEMMA),
    "gpt_neox": {"embedding": "*.embed_in.weight", "head": "*.embed_out.weight"}
    | {"hidden": "*.dense*.weight"},
    "gptj": {"hidden": "*.fc_*.weight *.*_proj.weight"},
    "granitemoehybrid": {"hidden": "*.shared_mlp.*.weight"},
    "internlm2": {"embedding": "*tok_embeddings.weight", "head": "output.weight"}
    | {"hidden": "*.wqkv.weight *.wo.weight"},
    "iquestloopcoder": {"unknown": "*.gate_projections.*.weight"},
    "jamba": {"unknown": "*.A_log"},
    "llama4_text": {"head": "output.weight"},
    "longcat_flash_ngram": {"embedding": "*.embedders.*.weight", "hidden": "*.post_projs.*.weight"},
    "mamba": {"unknown": "*.A_log"},
    "muse_spark": {"vector": "*.add_*"},
    "nemotron-nas": {"hidden": "*.linear.weight"},
    "openelm": {"hidden": "*.ffn.proj_[12].weight"},
    "phi": {"hidden": "*.fc[12].weight"},
    "phixtral": {"head": "lm_head.linear.weight"},
    # Two gains for each attention head are bare arrays.
    "plamo2": {"unknown": "*.[qk]_weight", "vector": "*_norm_weight *.A_log *.D"},
    # Its own convolution and gates are bare arrays.
    "recurrent_gemma": {"unknown": "*.conv_1d.weight *_gate_weight *_gate_bias"}
    | {"hidden": "*.linear_*.weight", "vector": "*.recurrent_param"},
    "rwkv7": {"vector": "*.x_?", "unknown": "*.k_k *.k_a *.r_k"}
    | {"hidden": "*.lora.*.weight *.ffn.*.weight"},
    # The output layer is a bare array.
    "talkie": {"embedding": "*.embed.weight", "vector": "*_g", "head": "lm_head"}
    | {"hidden": "*.attn_*.weight *.mlp_*.weight"},
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
