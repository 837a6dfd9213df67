"""Small models, and the role and layout that the router should give to each parameter.

`Case.roles` maps fnmatch patterns to (role, layout); the first pattern that matches a path decides.
Most models only hold their layers: the router
looks at names, classes and shapes, and at code that makes the output by an embedding.
"""

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from importlib import import_module
from itertools import pairwise
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.nn import Conv2d, Embedding, Linear

LAYOUTS = dict.fromkeys(("conv", "conv_input", "depthwise"), "conv") | {"experts": "experts"}
LAYOUTS |= dict.fromkeys(("lora_a", "lora_b"), "transposed")
"""The layout of a role, unless it is "matrix"."""


def roles(text: str) -> dict[str, tuple[str, str]]:
    """The role and its layout by pattern, from a list of each role and its patterns."""
    listed = [part.split() for part in text.split(",")]
    return {x: (role, LAYOUTS.get(role, "matrix")) for role, *patterns in listed for x in patterns}


# The widths differ, so that no two shapes match by accident.
VOCAB, DIMS, INNER, CLASSES = 50, 32, 64, 5


@dataclass(frozen=True, eq=False)
class Case:
    build: Callable[[], Any]
    roles: dict[str, tuple[str, str]]
    guessed: bool
    absent: tuple[str, ...]

    def expected(self, path: str) -> tuple[str, str]:
        patterns = self.roles | roles("bias *.bias")  # a pattern of the case keeps its place
        return next(pair for pattern, pair in patterns.items() if fnmatchcase(path, pattern))


# Models of mlx_lm


def mlx_lm_model(family: str, **config: Any) -> Any:
    module = import_module(f"mlx_lm.models.{family}")
    small = {"model_type": family, "vocab_size": VOCAB, "hidden_size": DIMS, "head_dim": 8}
    small |= {"intermediate_size": INNER, "moe_intermediate_size": 24, "num_experts_per_tok": 2}
    small |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    small |= {"rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 64}
    return module.Model(module.ModelArgs.from_dict(small | config))


def llama(tied: bool = False) -> Any:
    return mlx_lm_model("llama", tie_word_embeddings=tied)


def qwen2_moe() -> Any:
    return mlx_lm_model("qwen2_moe", num_experts=6, shared_expert_intermediate_size=40)


def deepseek_v3() -> Any:
    sizes = {"n_routed_experts": 6, "n_shared_experts": 1, "first_k_dense_replace": 1}
    sizes |= {"q_lora_rank": None, "kv_lora_rank": 12, "v_head_dim": 10}
    return mlx_lm_model("deepseek_v3", qk_nope_head_dim=8, qk_rope_head_dim=4, **sizes)


def gpt2() -> Any:
    # As in gpt2-medium, there are as many positions as dimensions, so the position table has the
    # shape of c_proj.
    sizes = {"n_ctx": DIMS, "n_positions": DIMS, "n_embd": DIMS, "n_head": 4, "n_layer": 2}
    return mlx_lm_model("gpt2", layer_norm_epsilon=1e-5, **sizes)


def mamba() -> Any:
    sizes = {"state_size": 6, "conv_kernel": 4, "time_step_rank": 3}
    return mlx_lm_model("mamba", use_bias=False, use_conv_bias=True, **sizes)


def adapted(model: Any, *keys: str, dora: bool = False, bits: int = 0) -> Any:
    """Freeze the model and add LoRA to its last layer as mlx_lm does: to `keys`, or everywhere."""
    from mlx_lm.tuner.utils import linear_to_lora_layers

    if bits:
        nn.quantize(model, group_size=32, bits=bits)
    model.freeze()
    config = {"rank": 4, "scale": 2.0, "dropout": 0.0, "keys": set(keys) or None}
    linear_to_lora_layers(model, 1, config, use_dora=dora)
    return model


LLAMA_TIED = roles("embedding model.embed_tokens.weight, norm *norm.weight, hidden *_proj.weight")
LLAMA = LLAMA_TIED | roles("head lm_head.weight")
LORA = roles("lora_a *.lora_a, lora_b *.lora_b")


# Models defined here: shared blocks first, then the models


def model_of(kind: type[nn.Module] = nn.Module, /, **parts: Any) -> Any:
    """A model that holds these parts, in this order."""
    model = kind()
    for name, part in parts.items():
        model[name] = part
    return model


def attention(dims: int) -> nn.Module:
    names = ("query", "key", "value", "out")
    return model_of(**{name: Linear(dims, dims, bias=name != "key") for name in names})


def block(dims: int, **cross: nn.Module) -> nn.Module:
    """Pre-norm attention, perhaps cross attention, and MLP; names are those of Whisper."""
    mlp = {"mlp1": Linear(dims, INNER), "mlp2": Linear(INNER, dims)}
    parts = {"attn": attention(dims), "attn_ln": nn.LayerNorm(dims)} | cross | mlp
    return model_of(**parts, mlp_ln=nn.LayerNorm(dims))


BLOCK = roles("norm *ln*.weight *ln*.bias, hidden *attn.*.weight *.mlp[12].weight")


class Table(nn.Module):
    """An embedding, a hidden layer, an output layer."""

    def __init__(self):
        super().__init__()
        self.embedding = Embedding(100, 64)
        self.linear1 = Linear(64, 128)
        self.output = Linear(64, 10)


def mlp(*widths: int) -> Any:
    layers = [Linear(n, m) for n, m in pairwise(widths)]
    return nn.Sequential(*[part for layer in layers for part in (layer, nn.ReLU())][:-1])


class WhisperDecoder(nn.Module):
    def __call__(self, x: mx.array) -> mx.array:
        return self.token_embedding.as_linear(x)


def whisper(**more: mx.array) -> Any:
    encoder = model_of(
        conv1=nn.Conv1d(10, DIMS, 3, padding=1),
        conv2=nn.Conv1d(DIMS, DIMS, 3, stride=2, padding=1),
        _positional_embedding=mx.ones((6, DIMS)),  # not a parameter: its name starts with _
        blocks=[block(DIMS) for _ in range(2)],
        ln_post=nn.LayerNorm(DIMS),
    )
    cross = [{"cross_attn": attention(DIMS), "cross_attn_ln": nn.LayerNorm(DIMS)} for _ in "12"]
    decoder = model_of(
        WhisperDecoder,
        token_embedding=Embedding(VOCAB, DIMS),
        positional_embedding=mx.zeros((8, DIMS)),
        blocks=[block(DIMS, **parts) for parts in cross],
        ln=nn.LayerNorm(DIMS),
    )
    return model_of(encoder=encoder, decoder=decoder, **more)


WHISPER = BLOCK | roles(
    "conv_input encoder.conv1.weight, conv encoder.conv2.weight, embedding"
    " decoder.token_embedding.weight, unknown decoder.positional_embedding"
)


def vit() -> Any:
    arrays = {"class_token": mx.zeros((1, 1, DIMS)), "position": mx.zeros((1, 5, DIMS))}
    body = {"blocks": [block(DIMS) for _ in range(2)], "ln": nn.LayerNorm(DIMS)}
    patches, head = Conv2d(3, DIMS, 4, stride=4), Linear(DIMS, CLASSES)
    return model_of(patches=patches, **arrays, **body, head=head)


class ResidualBlock(nn.Module):
    def __init__(self, channels_in: int, channels: int):
        super().__init__()
        self.conv1 = Conv2d(channels_in, channels, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm(channels)
        self.conv2 = Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm(channels)
        self.shortcut = Conv2d(channels_in, channels, 1, stride=2, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        y = self.bn2(self.conv2(nn.relu(self.bn1(self.conv1(x)))))
        return nn.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    def __init__(self, frozen_ends: bool = False):
        super().__init__()
        self.conv1, self.bn1 = Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm(8)
        self.stages = [ResidualBlock(8, 12), ResidualBlock(12, 16)]
        self.fc = Linear(16, CLASSES)
        for part in (self.conv1, self.fc) if frozen_ends else ():
            part.freeze()

    def __call__(self, x: mx.array) -> mx.array:
        x = self.bn1(self.conv1(x))
        for stage in self.stages:
            x = stage(x)
        return self.fc(x.mean(axis=(1, 2)))


def convnext_block() -> nn.Module:
    """A depthwise convolution, one of four groups, and two that mix all channels."""
    return model_of(
        dwconv=Conv2d(16, 16, 3, padding=1, groups=16),
        grouped=Conv2d(16, 24, 3, padding=1, groups=4),
        pwconv=Conv2d(24, 16, 1),
        wide=Conv2d(16, 32, 3, padding=1, groups=16),  # two kernels for each channel
        shrink=Conv2d(32, 16, 1, groups=16),  # each output has its own two inputs
    )


def convnext() -> nn.Module:
    stem, blocks = Conv2d(3, 16, 2, stride=2), [convnext_block() for _ in range(2)]
    return model_of(stem=stem, blocks=blocks, head=Linear(16, CLASSES))


def conv_autoencoder() -> nn.Module:
    return nn.Sequential(
        Conv2d(1, 8, 3, stride=2, padding=1),
        nn.GroupNorm(2, 8),
        Conv2d(8, 12, 3, padding=1),
        nn.ConvTranspose2d(12, 8, 4, stride=2, padding=1),
        Conv2d(8, 1, 3, padding=1),
    )


def head_first(head: str) -> nn.Module:
    """A language model that defines its head before its blocks, under a name of choice."""
    parts = {"embedding": Embedding(VOCAB, DIMS), head: Linear(DIMS, VOCAB)}
    return model_of(**parts, blocks=[block(DIMS) for _ in range(2)])


class Shared(nn.Module):
    """One embedding with two names and one block used three times; MLX gives the gradient to the
    last path."""

    def __init__(self):
        super().__init__()
        self.embedding = Embedding(VOCAB, DIMS)
        self.blocks = [block(DIMS)] * 3
        self.head = self.embedding

    def __call__(self, tokens: mx.array) -> mx.array:
        return self.head.as_linear(self.embedding(tokens))


def shared_array() -> nn.Module:
    """Two layers that start from the same array: MLX does not tie them, each has its gradient."""
    parts = {"embedding": Embedding(VOCAB, DIMS), "block": block(DIMS)}
    model = model_of(**parts, lm_head=Linear(DIMS, VOCAB, bias=False))
    model.lm_head.weight = model.embedding.weight
    return model


def raw_mixture() -> nn.Module:
    """A mixture over raw (experts, in, out) arrays; the router cannot know their axes.

    The only Linear of its expert gate is called like a head, as in mlx_lm's longcat_flash.
    """
    arrays = {"w_in": mx.ones((6, DIMS, INNER)), "w_out": mx.ones((6, INNER, DIMS))}
    moe = model_of(router=model_of(classifier=Linear(DIMS, 6)), **arrays)
    return model_of(embed=Embedding(VOCAB, DIMS), moe=moe, lm_head=Linear(DIMS, VOCAB))


def encoder() -> nn.Module:
    """transformer_lm of mlx-examples: the head is called like a projection of attention."""
    transformer = nn.TransformerEncoder(2, DIMS, 4, INNER)
    embedding, out_proj = Embedding(VOCAB, DIMS), Linear(DIMS, VOCAB)
    return model_of(embedding=embedding, transformer=transformer, out_proj=out_proj)


def bert_layer() -> nn.Module:
    linears = {"intermediate": Linear(DIMS, INNER), "output": Linear(INNER, DIMS)}
    start = {"attention": nn.MultiHeadAttention(DIMS, 4), "norm1": nn.LayerNorm(DIMS)}
    return model_of(**start, **linears, norm2=nn.LayerNorm(DIMS))


def bert() -> nn.Module:
    """Blocks with a Linear called `output`; only the classifier is the head."""
    tables = {"words": Embedding(VOCAB, DIMS), "positions": Embedding(16, DIMS)}
    ends = {"pooler": Linear(DIMS, DIMS), "classifier": Linear(DIMS, CLASSES)}
    return model_of(**tables, layers=[bert_layer() for _ in range(2)], **ends)


def dqn() -> nn.Module:
    """A DQN with as many actions as frames, so the output is as wide as the input."""
    kernels = {"conv1": Conv2d(4, 8, 3), "conv2": Conv2d(8, 12, 3)}
    return model_of(**kernels, fc1=Linear(12 * 16, DIMS), fc2=Linear(DIMS, 4))


def vae() -> nn.Module:
    """A VAE as in mlx-examples: two parallel layers make the code."""
    code = {"fc_mean": Linear(DIMS, 6), "fc_spread": Linear(DIMS, 6)}
    return model_of(fc1=Linear(20, DIMS), **code, fc3=Linear(6, DIMS), fc4=Linear(DIMS, 20))


def timed_block(channels_in: int, channels: int) -> nn.Module:
    conv, time = Conv2d(channels_in, channels, 3, padding=1), Linear(DIMS, channels)
    return model_of(norm=nn.GroupNorm(2, channels_in), conv=conv, time=time)


def unet() -> nn.Module:
    """A U-Net that defines its time embedding before the convolution that reads the image."""
    time, norm = mlp(10, DIMS, DIMS), nn.GroupNorm(2, 8)
    conv_in, conv_out = (Conv2d(n, m, 3, padding=1) for n, m in ((3, 8), (8, 3)))
    body = {"down": [timed_block(8, 12)], "up": [timed_block(12, 8)], "norm_out": norm}
    return model_of(time_embed=time, conv_in=conv_in, **body, conv_out=conv_out)


class WeightNorm(nn.Module):
    """A Linear that stores directions and lengths separately, as torch's weight_norm does."""

    def __init__(self, dims_in: int, dims: int):
        super().__init__()
        self.weight_v, self.weight_g = mx.ones((dims, dims_in)), mx.ones((dims, 1))
        self.bias = mx.zeros(dims)


def modulation() -> nn.Module:
    return nn.Sequential(nn.SiLU(), Linear(DIMS, 2 * DIMS))


def zero_block() -> nn.Module:
    """adaLN-zero: a projection that starts at zero makes gains and shifts from the condition."""
    mlp = {"mlp1": Linear(DIMS, INNER), "mlp2": Linear(INNER, DIMS)}
    parts = {"attention": attention(DIMS), **mlp, "norm": nn.LayerNorm(DIMS, affine=False)}
    model = model_of(**parts, adaLN_modulation=modulation())
    model.adaLN_modulation.layers[1].weight *= 0
    return model


def dit() -> nn.Module:
    return model_of(
        x_embedder=Linear(12, DIMS),
        t_embedder=mlp(10, DIMS, DIMS),
        y_embedder=Embedding(7, DIMS),
        blocks=[zero_block() for _ in range(2)],
        final_layer=model_of(linear=Linear(DIMS, 12), adaLN_modulation=modulation()),
    )


def clip() -> nn.Module:
    """Two towers of different widths; both are projected to the width of the text tower."""
    towers = {
        name: model_of(embed=Embedding(VOCAB, dims), blocks=[block(dims)])
        for name, dims in (("text_model", DIMS), ("vision_model", 2 * DIMS))
    }
    visual, text = (Linear(dims, DIMS, bias=False) for dims in (2 * DIMS, DIMS))
    ends = {"visual_projection": visual, "text_projection": text}
    return model_of(**towers, **ends, logit_scale=mx.array(2.6))


class Adapted(nn.Module):
    """A frozen Linear with two low-rank parts of choice: arrays in two orientations, or Linears."""

    def __init__(self, a: str, b: str, kind: str, inputs=DIMS, outputs=24, scale=1.0):
        super().__init__()
        self.names, self.scale = (a, b), scale
        self.linear = Linear(inputs, outputs)
        self.freeze()
        down, up = Linear(inputs, 4, bias=False), Linear(4, outputs, bias=False)
        up.weight = mx.zeros((outputs, 4))
        forms = {"linears": lambda x: x, "arrays": lambda x: x.weight}
        form = forms.get(kind, lambda x: x.weight.T)
        self[a], self[b] = form(down), form(up)

    def __call__(self, x: mx.array) -> mx.array:
        a, b = self.names
        return self.linear(x) + self.scale * self[b](self[a](x))


def low_rank(a: str, b: str, kind: str) -> nn.Module:
    """A frozen model in which only the adapters of the middle layer are trained."""
    ends = Linear(12, DIMS), Linear(24, CLASSES)
    for end in ends:
        end.freeze()
    return nn.Sequential(ends[0], Adapted(a, b, kind), ends[1])


TRANSPOSED = roles("lora_a *[aA], lora_b *[bB]")
LOW_RANK = roles("lora_a *[aA] *[aA].weight *down.weight, lora_b *[bB] *[bB].weight *up.weight")
LOW_RANK = {pattern: (role, "matrix") for pattern, (role, _) in LOW_RANK.items()}

BUILDS: dict[str, Callable[[], Any]] = {
    "table": Table,
    "mlp": lambda: mlp(12, INNER, DIMS, CLASSES),
    "autoencoder": lambda: mlp(12, INNER, 4, INNER, 12),
    "llama": llama,
    "llama_tied": lambda: llama(tied=True),
    "qwen3_tied": lambda: mlx_lm_model("qwen3", tie_word_embeddings=True),
    "qwen2_moe": qwen2_moe,
    "deepseek_v3": deepseek_v3,
    "gpt2": gpt2,
    "mamba": mamba,
    "gpt_oss": lambda: mlx_lm_model("gpt_oss", num_local_experts=6),
    "whisper": whisper,
    "whisper_alignment_heads": lambda: whisper(alignment_heads=mx.array([[0, 1], [1, 0]])),
    "vit": vit,
    "resnet": ResNet,
    "resnet_frozen_ends": lambda: ResNet(frozen_ends=True),
    "conv_transpose": conv_autoencoder,
    "convnext": convnext,
    "lora": lambda: adapted(llama()),
    "qlora": lambda: adapted(llama(), bits=4),
    "lora_moe": lambda: adapted(qwen2_moe()),
    "lora_embedding": lambda: adapted(llama(tied=True), "model.embed_tokens", "self_attn.q_proj"),
    "dora": lambda: adapted(llama(tied=True), "model.embed_tokens", "self_attn.q_proj", dora=True),
    "head_by_name": lambda: head_first("lm_head"),
    "head_by_shape": lambda: head_first("to_tokens"),
    "shared_modules": Shared,
    "shared_array": shared_array,
    "recurrent": lambda: model_of(
        lstm=nn.LSTM(6, 16), gru=nn.GRU(16, 12), rnn=nn.RNN(12, 8), readout=Linear(8, CLASSES)
    ),
    "two_heads": lambda: model_of(
        policy_head=Linear(DIMS, CLASSES), value_head=mlp(DIMS, 20, 1), trunk=mlp(12, INNER, DIMS)
    ),
    "raw_experts": raw_mixture,
    "transformer_encoder": encoder,
    "bert": bert,
    "actor_critic": lambda: model_of(
        trunk=mlp(12, INNER, DIMS),
        **{name: Linear(DIMS, 4) for name in ("actor", "log_std")},
        critic=Linear(DIMS, 1),
    ),
    "two_networks": lambda: model_of(actor=mlp(12, DIMS, 4), critic=mlp(12, INNER, 1)),
    "twin_heads": lambda: model_of(
        hidden=Linear(12, DIMS), **{name: Linear(DIMS, 4) for name in ("policy_head", "spread")}
    ),
    "branches": lambda: model_of(
        hidden=Linear(12, DIMS), branches=[Linear(DIMS, outputs) for outputs in (4, DIMS, 1)]
    ),
    "dqn": dqn,
    "vae": vae,
    "unet": unet,
    "weight_norm": lambda: nn.Sequential(WeightNorm(12, DIMS), nn.ReLU(), Linear(DIMS, CLASSES)),
    "adaln_zero": dit,
    "clip": clip,
    "lora_arrays": partial(low_rank, "A", "B", "transposed"),
    "lora_arrays_of_linears": partial(low_rank, "A", "B", "arrays"),
    "lora_capitals": partial(low_rank, "lora_A", "lora_B", "arrays"),
    "lora_linears": partial(low_rank, "lora_a", "lora_b", "linears"),
    "lora_down_up": partial(low_rank, "lora_down", "lora_up", "linears"),
}

# What each parameter is, by hand. A comment says what is easy to get wrong.
PLANS = {
    "table": roles("embedding embedding.weight, hidden linear1.weight, head output.weight"),
    "mlp": roles("first layers.0.weight, head layers.4.weight, hidden *.weight"),
    # The output is as wide as the input, but the first layer is no head.
    "autoencoder": roles("first layers.0.weight, head layers.6.weight, hidden *.weight"),
    "llama": LLAMA,
    # With tied embeddings, the last Linear in definition order is layers.1.mlp.up_proj: no head.
    "llama_tied": LLAMA_TIED,
    "qwen3_tied": LLAMA_TIED,
    # gate_proj belongs to an expert or a dense layer; it is no expert gate.
    "qwen2_moe": roles("router *.gate.weight *.shared_expert_gate.weight, experts *.switch_mlp.*")
    | LLAMA,
    # MoEGate holds bare arrays; embed_q and unembed_out are stacks of projections, no embeddings.
    "deepseek_v3": roles(
        "router *.gate.weight, bias *.e_score_correction_bias, experts *.switch_mlp.*"
        " *embed_q.weight *unembed_out.weight, hidden *.kv_a_proj_with_mqa.weight"
    )
    | LLAMA,
    "gpt2": roles("embedding model.w[tp]e.weight, norm *.ln_*, hidden *.c_*.weight"),
    # No convolution reads the input, not even that of the first block. A_log is (inner, state).
    "mamba": roles(
        "embedding backbone.embeddings.weight, norm *norm*.weight, depthwise *.conv1d.weight,"
        " hidden *_proj.weight, unknown *.A_log, vector *.D"
    ),
    # The biases of the experts have two axes, (experts, out), but are no matrices.
    "gpt_oss": roles("router *.router.weight, experts *.experts.*.weight, vector *.sinks") | LLAMA,
    "whisper": WHISPER,
    # trainable_parameters() lists integer arrays, and value_and_grad gives them int32 gradients.
    "whisper_alignment_heads": WHISPER,
    "vit": roles(
        "conv_input patches.weight, vector class_token, unknown position, head head.weight"
    )
    | BLOCK,
    "resnet": roles(
        "conv_input conv1.weight, head fc.weight, norm *bn[12].*, conv stages.*.weight"
    ),
    # The frozen layers still read the input and make the output: no other layer gets their roles.
    "resnet_frozen_ends": roles("norm *bn[12].*, conv stages.*.weight"),
    "conv_transpose": roles("conv_input layers.0.weight, norm layers.1.*, conv *.weight"),
    "convnext": {"*.grouped.weight": ("conv", "conv/4")}
    | roles(
        "conv_input stem.weight, conv *.pwconv.weight, depthwise blocks.*.weight, head head.weight"
    ),
    "lora": LORA,
    "qlora": LORA,
    "lora_moe": {f"*.switch_mlp.*.{name}": (name, "experts") for name in ("lora_a", "lora_b")}
    | LORA,
    "lora_embedding": roles("embedding model.embed_tokens.lora_a") | LORA,
    "dora": roles("embedding model.embed_tokens.lora_a, vector *.m") | LORA,
    "head_by_name": roles("embedding embedding.weight, head lm_head.weight") | BLOCK,
    "head_by_shape": roles("embedding embedding.weight, head to_tokens.weight") | BLOCK,
    "shared_modules": roles("embedding head.weight") | BLOCK,
    "shared_array": roles("embedding embedding.weight, head lm_head.weight") | BLOCK,
    "recurrent": roles(
        "head readout.weight, first lstm.Wx, hidden *.W*, bias *.bias gru.b gru.bhn"
    ),
    # A head can be a module: its last Linear is the head, the one before it is hidden.
    "two_heads": roles(
        "head policy_head.weight value_head.layers.2.weight, first trunk.layers.0.weight, hidden"
        " *.layers.*.weight"
    ),
    "raw_experts": roles(
        "embedding embed.weight, router moe.router.classifier.weight, unknown moe.w_*, head"
        " lm_head.weight"
    ),
    "transformer_encoder": roles(
        "embedding embedding.weight, head out_proj.weight, norm *.ln*, hidden transformer.*.weight"
    ),
    "bert": roles(
        "embedding words.weight positions.weight, head classifier.weight, norm *.norm[12].*,"
        " hidden layers.*.weight pooler.weight"
    ),
    # A trunk with three output layers; none is called a head.
    "actor_critic": roles("first trunk.layers.0.weight, hidden trunk.*.weight, head *.weight"),
    # An actor and a critic that share no layer.
    "two_networks": roles("first *.layers.0.weight, head *.layers.2.weight"),
    # Two equal output layers; only one is called a head.
    "twin_heads": roles("first hidden.weight, head *.weight"),
    # A list of output layers; one is as wide as their common input.
    "branches": roles("first hidden.weight, head branches.*.weight"),
    "dqn": roles("conv_input conv1.weight, conv conv2.weight, hidden fc1.weight, head fc2.weight"),
    "vae": roles("first fc1.weight, head fc4.weight, hidden *.weight"),
    "unet": {"conv_out.weight": ("head", "conv")}
    | roles(
        "first time_embed.layers.0.weight, hidden time_embed.*.weight *.time.weight, conv_input"
        " conv_in.weight, norm *norm*, conv *.conv.weight"
    ),
    # MLX does not know that weight_v is a matrix. weight_g holds lengths along one long axis.
    "weight_norm": roles("unknown *.weight_v, vector *.weight_g, head layers.2.weight"),
    "adaln_zero": roles(
        "first x_embedder.weight t_embedder.layers.0.weight, embedding y_embedder.weight, head"
        " final_layer.linear.weight, hidden *.weight"
    ),
    "clip": roles("embedding *.embed.weight, head *_projection.weight, vector logit_scale") | BLOCK,
    "lora_arrays": TRANSPOSED,
    "lora_arrays_of_linears": LOW_RANK,
    "lora_capitals": LOW_RANK,
    "lora_linears": LOW_RANK,
    "lora_down_up": LOW_RANK,
}
GUESSED = "mlp autoencoder resnet recurrent actor_critic two_networks branches dqn vae weight_norm"
"""Models whose heads the plan marks as guesses."""

ABSENT = {
    "whisper_alignment_heads": ("alignment_heads",),
    "resnet_frozen_ends": ("conv1.weight", "fc.weight", "fc.bias", "bn1.running_mean"),
    "shared_modules": ("embedding.weight", "blocks.0.mlp1.weight", "blocks.1.mlp1.weight"),
}
"""Paths that a model reports and its plan must not list."""

CASES_BY_NAME = {
    name: Case(build, PLANS[name], name in GUESSED.split(), ABSENT.get(name, ()))
    for name, build in BUILDS.items()
}
