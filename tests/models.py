"""Small models, and the role and layout that the router should give to each parameter.

`Case.roles` maps fnmatch patterns to (role, layout); the first pattern that matches a path decides.
A comment on a case says what is easy to get wrong.
"""

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import import_module
from itertools import pairwise
from typing import Any

import mlx.core as mx
import mlx.nn as nn

LAYOUTS = dict.fromkeys(("conv", "conv_input", "depthwise"), "conv") | {"experts": "experts"}
LAYOUTS |= dict.fromkeys(("lora_a", "lora_b"), "transposed")
"""The layout of a role, unless it is "matrix"."""


def roles(**patterns: str) -> dict[str, tuple[str, str]]:
    """The role and its layout by pattern, from the patterns of each role."""
    return {
        pattern: (role, LAYOUTS.get(role, "matrix"))
        for role, listed in patterns.items()
        for pattern in listed.split()
    }


# Inputs and losses. The widths differ, so that no two shapes match by accident.

VOCAB, DIMS, INNER, CLASSES = 50, 32, 64, 5


def noise(*shape: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(0))


TOKENS = mx.random.randint(0, VOCAB, (2, 9), key=mx.random.key(1))


def language_loss(model: Any) -> mx.array:
    return nn.losses.cross_entropy(model(TOKENS[:, :-1]), TOKENS[:, 1:], reduction="mean")


def loss_on(*shape: int) -> Callable[[Any], mx.array]:
    """A loss: the mean square of (output - 1) on noise of this shape."""
    return lambda model: (model(noise(*shape)) - 1).square().mean()


def loss_on_tokens(model: Any) -> mx.array:
    return (model(TOKENS) - 1).square().mean()


@dataclass(frozen=True, eq=False)
class Case:
    name: str
    build: Callable[[], Any]
    roles: dict[str, tuple[str, str]]
    forward: Callable[[Any], mx.array] = language_loss
    guessed: tuple[str, ...] = ()  # paths of heads that the plan marks "guessed"
    absent: tuple[str, ...] = ()  # paths that the model reports and the plan must not list

    def expected(self, path: str) -> tuple[str, str]:
        return next(pair for pattern, pair in self.roles.items() if fnmatchcase(path, pattern))


# Models of mlx_lm


def mlx_lm_model(family: str, **config: Any) -> Any:
    module = import_module(f"mlx_lm.models.{family}")
    small = {
        "model_type": family,
        "vocab_size": VOCAB,
        "hidden_size": DIMS,
        "intermediate_size": INNER,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 64,
        "moe_intermediate_size": 24,
        "num_experts_per_tok": 2,
    }
    return module.Model(module.ModelArgs.from_dict(small | config))


def llama(tied: bool = False) -> Any:
    return mlx_lm_model("llama", tie_word_embeddings=tied)


def qwen2_moe() -> Any:
    return mlx_lm_model("qwen2_moe", num_experts=6, shared_expert_intermediate_size=40)


def deepseek_v3() -> Any:
    return mlx_lm_model(
        "deepseek_v3",
        n_routed_experts=6,
        n_shared_experts=1,
        first_k_dense_replace=1,
        q_lora_rank=None,
        kv_lora_rank=12,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=10,
    )


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


LLAMA_TIED = roles(
    embedding="model.embed_tokens.weight", norm="*norm.weight", hidden="*_proj.weight"
)
LLAMA = LLAMA_TIED | roles(head="lm_head.weight")
LORA = roles(lora_a="*.lora_a", lora_b="*.lora_b")


# Models defined here: shared blocks first, then the models


class Attention(nn.Module):
    def __init__(self, dims: int):
        super().__init__()
        self.query = nn.Linear(dims, dims)
        self.key = nn.Linear(dims, dims, bias=False)
        self.value = nn.Linear(dims, dims)
        self.out = nn.Linear(dims, dims)

    def __call__(self, x: mx.array, memory: mx.array) -> mx.array:
        scores = self.query(x) @ self.key(memory).swapaxes(-1, -2)
        return self.out(mx.softmax(scores, axis=-1) @ self.value(memory))


class Block(nn.Module):
    """Pre-norm attention and MLP, with optional cross attention; names are those of Whisper."""

    def __init__(self, dims: int, cross: bool = False):
        super().__init__()
        self.attn, self.attn_ln = Attention(dims), nn.LayerNorm(dims)
        if cross:
            self.cross_attn, self.cross_attn_ln = Attention(dims), nn.LayerNorm(dims)
        self.mlp1, self.mlp2 = nn.Linear(dims, INNER), nn.Linear(INNER, dims)
        self.mlp_ln = nn.LayerNorm(dims)

    def __call__(self, x: mx.array, memory: mx.array | None = None) -> mx.array:
        y = self.attn_ln(x)
        x = x + self.attn(y, y)
        if memory is not None:
            x = x + self.cross_attn(self.cross_attn_ln(x), memory)
        return x + self.mlp2(nn.gelu(self.mlp1(self.mlp_ln(x))))


BLOCK = roles(norm="*ln*.weight *ln*.bias", bias="*.bias", hidden="*attn.*.weight *.mlp[12].weight")


class Stack(nn.Module):
    """Parts that are defined in the order of `parts` and called in the order of `calls`."""

    def __init__(self, calls: str, **parts: Any):
        super().__init__()
        self._calls = calls.split()
        for name, part in parts.items():
            self[name] = part

    def __call__(self, x: mx.array) -> mx.array:
        for name in self._calls:
            for part in self[name] if isinstance(self[name], list) else [self[name]]:
                x = part(x)
        return x


class Fork(nn.Module):
    """Parts that all read the output of the part called `trunk`, if there is one."""

    def __init__(self, trunk: str | None, /, **parts: Any):
        super().__init__()
        self._trunk = trunk
        for name, part in parts.items():
            self[name] = part

    def __call__(self, x: mx.array) -> mx.array:
        ends = {name: part for name, part in self.children().items() if name != self._trunk}
        x = nn.relu(self[self._trunk](x)) if self._trunk else x
        parts = [part if isinstance(part, list) else [part] for part in ends.values()]
        heads = [head for part in parts for head in part]
        return mx.concatenate([head(x) for head in heads], axis=-1)


def pool(images: mx.array) -> mx.array:
    return images.mean(axis=(1, 2))


class Table(nn.Module):
    """An embedding, a hidden layer, an output layer."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(100, 64)
        self.linear1 = nn.Linear(64, 128)
        self.output = nn.Linear(64, 10)

    def __call__(self, tokens: mx.array) -> mx.array:
        return self.output(nn.glu(self.linear1(self.embedding(tokens))))


def mlp(*widths: int) -> nn.Module:
    layers = [nn.Linear(n, m) for n, m in pairwise(widths)]
    return nn.Sequential(*[part for layer in layers for part in (layer, nn.ReLU())][:-1])


class WhisperEncoder(nn.Module):
    def __init__(self, mels: int, dims: int):
        super().__init__()
        self.conv1 = nn.Conv1d(mels, dims, 3, padding=1)
        self.conv2 = nn.Conv1d(dims, dims, 3, stride=2, padding=1)
        self._positional_embedding = noise(6, dims)  # not a parameter: its name starts with _
        self.blocks = [Block(dims) for _ in range(2)]
        self.ln_post = nn.LayerNorm(dims)

    def __call__(self, mel: mx.array) -> mx.array:
        x = nn.gelu(self.conv2(nn.gelu(self.conv1(mel)))) + self._positional_embedding
        for block in self.blocks:
            x = block(x)
        return self.ln_post(x)


class WhisperDecoder(nn.Module):
    def __init__(self, dims: int):
        super().__init__()
        self.token_embedding = nn.Embedding(VOCAB, dims)
        self.positional_embedding = mx.zeros((8, dims))
        self.blocks = [Block(dims, cross=True) for _ in range(2)]
        self.ln = nn.LayerNorm(dims)

    def __call__(self, tokens: mx.array, memory: mx.array) -> mx.array:
        x = self.token_embedding(tokens) + self.positional_embedding
        for block in self.blocks:
            x = block(x, memory)
        return self.token_embedding.as_linear(self.ln(x))


class Whisper(nn.Module):
    def __init__(self, alignment: bool = False):
        super().__init__()
        self.encoder, self.decoder = WhisperEncoder(10, DIMS), WhisperDecoder(DIMS)
        if alignment:
            self.alignment_heads = mx.array([[0, 1], [1, 0]])

    def __call__(self, tokens: mx.array) -> mx.array:
        return self.decoder(tokens, self.encoder(noise(2, 12, 10)))


WHISPER = BLOCK | roles(
    conv_input="encoder.conv1.weight",
    conv="encoder.conv2.weight",
    embedding="decoder.token_embedding.weight",
    unknown="decoder.positional_embedding",
)


class ViT(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, DIMS, 4, stride=4)
        self.class_token = mx.zeros((1, 1, DIMS))
        self.position = mx.zeros((1, 5, DIMS))
        self.blocks = [Block(DIMS) for _ in range(2)]
        self.ln = nn.LayerNorm(DIMS)
        self.head = nn.Linear(DIMS, CLASSES)

    def __call__(self, images: mx.array) -> mx.array:
        patches = self.patches(images).flatten(1, 2)
        token = mx.broadcast_to(self.class_token, (len(images), 1, DIMS))
        x = mx.concatenate([token, patches], axis=1) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.ln(x[:, 0]))


class ResidualBlock(nn.Module):
    def __init__(self, channels_in: int, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm(channels)
        self.shortcut = nn.Conv2d(channels_in, channels, 1, stride=2, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        y = self.bn2(self.conv2(nn.relu(self.bn1(self.conv1(x)))))
        return nn.relu(y + self.shortcut(x))


def resnet(frozen_ends: bool = False) -> Any:
    model = Stack(
        "conv1 bn1 stages pool fc",
        conv1=nn.Conv2d(3, 8, 3, padding=1, bias=False),
        bn1=nn.BatchNorm(8),
        stages=[ResidualBlock(8, 12), ResidualBlock(12, 16)],
        pool=pool,
        fc=nn.Linear(16, CLASSES),
    )
    for part in (model.conv1, model.fc) if frozen_ends else ():
        part.freeze()
    return model


class ConvNeXtBlock(nn.Module):
    """A depthwise convolution, one of four groups, and two that mix all channels."""

    def __init__(self):
        super().__init__()
        self.dwconv = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.grouped = nn.Conv2d(16, 24, 3, padding=1, groups=4)
        self.pwconv = nn.Conv2d(24, 16, 1)
        self.wide = nn.Conv2d(16, 32, 3, padding=1, groups=16)  # two kernels for each channel
        self.shrink = nn.Conv2d(32, 16, 1, groups=16)  # each output has its own two inputs

    def __call__(self, x: mx.array) -> mx.array:
        x = x + self.pwconv(nn.gelu(self.grouped(self.dwconv(x))))
        return x + self.shrink(nn.gelu(self.wide(x)))


def convnext() -> nn.Module:
    parts = {"stem": nn.Conv2d(3, 16, 2, stride=2), "blocks": [ConvNeXtBlock() for _ in range(2)]}
    return Stack("stem blocks pool head", **parts, pool=pool, head=nn.Linear(16, CLASSES))


def conv_autoencoder() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1),
        nn.GroupNorm(2, 8),
        nn.Conv2d(8, 12, 3, padding=1),
        nn.ConvTranspose2d(12, 8, 4, stride=2, padding=1),
        nn.Conv2d(8, 1, 3, padding=1),
    )


def head_first(head: str) -> nn.Module:
    """A language model that defines its head before its blocks, under a name of choice."""
    parts = {"embedding": nn.Embedding(VOCAB, DIMS), head: nn.Linear(DIMS, VOCAB)}
    return Stack(f"embedding blocks {head}", **parts, blocks=[Block(DIMS) for _ in range(2)])


class Shared(nn.Module):
    """One embedding with two names and one block used three times; MLX gives the gradient to the
    last path."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, DIMS)
        self.blocks = [Block(DIMS)] * 3
        self.head = self.embedding

    def __call__(self, tokens: mx.array) -> mx.array:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head.as_linear(x)


def shared_array() -> nn.Module:
    """Two layers that start from the same array: MLX does not tie them, each has its gradient."""
    parts = {"embedding": nn.Embedding(VOCAB, DIMS), "block": Block(DIMS)}
    model = Stack("embedding block lm_head", **parts, lm_head=nn.Linear(DIMS, VOCAB, bias=False))
    model.lm_head.weight = model.embedding.weight
    return model


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.gru, self.rnn = nn.LSTM(6, 16), nn.GRU(16, 12), nn.RNN(12, 8)
        self.readout = nn.Linear(8, CLASSES)

    def __call__(self, x: mx.array) -> mx.array:
        return self.readout(self.rnn(self.gru(self.lstm(x)[0])))


class RawExperts(nn.Module):
    """A dense mixture over raw (experts, in, out) arrays; the router cannot know their axes.

    The only Linear of its expert gate is called like a head, as in mlx_lm's longcat_flash.
    """

    def __init__(self, experts: int = 6):
        super().__init__()
        self.router = Stack("classifier", classifier=nn.Linear(DIMS, experts))
        self.w_in = 0.1 * noise(experts, DIMS, INNER)
        self.w_out = 0.1 * noise(experts, INNER, DIMS)

    def __call__(self, x: mx.array) -> mx.array:
        y = nn.relu(x[..., None, None, :] @ self.w_in) @ self.w_out
        return x + (mx.softmax(self.router(x))[..., None] * y.squeeze(-2)).sum(axis=-2)


def raw_mixture() -> nn.Module:
    parts = {"embed": nn.Embedding(VOCAB, DIMS), "moe": RawExperts()}
    return Stack("embed moe lm_head", **parts, lm_head=nn.Linear(DIMS, VOCAB))


class Encoder(nn.Module):
    """transformer_lm of mlx-examples: the head is called like a projection of attention."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, DIMS)
        self.transformer = nn.TransformerEncoder(2, DIMS, 4, INNER)
        self.out_proj = nn.Linear(DIMS, VOCAB)

    def __call__(self, tokens: mx.array) -> mx.array:
        mask = nn.MultiHeadAttention.create_additive_causal_mask(tokens.shape[1])
        return self.out_proj(self.transformer(self.embedding(tokens), mask))


class BertLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.norm1 = nn.MultiHeadAttention(DIMS, 4), nn.LayerNorm(DIMS)
        self.intermediate = nn.Linear(DIMS, INNER)
        self.output, self.norm2 = nn.Linear(INNER, DIMS), nn.LayerNorm(DIMS)

    def __call__(self, x: mx.array) -> mx.array:
        x = self.norm1(x + self.attention(x, x, x))
        return self.norm2(x + self.output(nn.gelu(self.intermediate(x))))


class Bert(nn.Module):
    """Blocks with a Linear called `output`; only the classifier is the head."""

    def __init__(self):
        super().__init__()
        self.words, self.positions = nn.Embedding(VOCAB, DIMS), nn.Embedding(16, DIMS)
        self.layers = [BertLayer() for _ in range(2)]
        self.pooler = nn.Linear(DIMS, DIMS)
        self.classifier = nn.Linear(DIMS, CLASSES)

    def __call__(self, tokens: mx.array) -> mx.array:
        x = self.words(tokens) + self.positions(mx.arange(tokens.shape[1]))
        for layer in self.layers:
            x = layer(x)
        return self.classifier(mx.tanh(self.pooler(x[:, 0])))


def dqn() -> nn.Module:
    """A DQN with as many actions as frames, so the output is as wide as the input."""
    parts = {"conv1": nn.Conv2d(4, 8, 3), "conv2": nn.Conv2d(8, 12, 3)}
    parts["flatten"] = lambda images: images.flatten(1)
    ends = {"fc1": nn.Linear(12 * 16, DIMS), "fc2": nn.Linear(DIMS, 4)}
    return Stack("conv1 conv2 flatten fc1 fc2", **parts, **ends)


class VAE(nn.Module):
    """A VAE as in mlx-examples: two parallel layers make the code."""

    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(20, DIMS)
        self.fc_mean, self.fc_spread = nn.Linear(DIMS, 6), nn.Linear(DIMS, 6)
        self.fc3, self.fc4 = nn.Linear(6, DIMS), nn.Linear(DIMS, 20)

    def __call__(self, x: mx.array) -> mx.array:
        x = nn.relu(self.fc1(x))
        code = self.fc_mean(x) + mx.exp(0.5 * self.fc_spread(x)) * 0.1
        return self.fc4(nn.relu(self.fc3(code)))


class TimedBlock(nn.Module):
    def __init__(self, channels_in: int, channels: int):
        super().__init__()
        self.norm = nn.GroupNorm(2, channels_in)
        self.conv = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.time = nn.Linear(DIMS, channels)

    def __call__(self, x: mx.array, time: mx.array) -> mx.array:
        return self.conv(nn.silu(self.norm(x))) + self.time(time)[:, None, None]


class UNet(nn.Module):
    """A U-Net that defines its time embedding before the convolution that reads the image."""

    def __init__(self):
        super().__init__()
        self.time_embed = mlp(10, DIMS, DIMS)
        self.conv_in = nn.Conv2d(3, 8, 3, padding=1)
        self.down, self.up = [TimedBlock(8, 12)], [TimedBlock(12, 8)]
        self.norm_out = nn.GroupNorm(2, 8)
        self.conv_out = nn.Conv2d(8, 3, 3, padding=1)

    def __call__(self, images: mx.array) -> mx.array:
        time, x = self.time_embed(noise(2, 10)), self.conv_in(images)
        for block in [*self.down, *self.up]:
            x = block(x, time)
        return self.conv_out(nn.silu(self.norm_out(x)))


class WeightNorm(nn.Module):
    """A Linear that stores directions and lengths separately, as torch's weight_norm does."""

    def __init__(self, dims_in: int, dims: int):
        super().__init__()
        self.weight_v, self.weight_g = noise(dims, dims_in), mx.ones((dims, 1))
        self.bias = mx.zeros(dims)

    def __call__(self, x: mx.array) -> mx.array:
        length = mx.linalg.norm(self.weight_v, axis=1, keepdims=True)
        return x @ (self.weight_g * self.weight_v / length).T + self.bias


class ZeroBlock(nn.Module):
    """adaLN-zero: a projection that starts at zero makes gains and shifts from the condition."""

    def __init__(self):
        super().__init__()
        self.attention = Attention(DIMS)
        self.mlp1, self.mlp2 = nn.Linear(DIMS, INNER), nn.Linear(INNER, DIMS)
        self.norm = nn.LayerNorm(DIMS, affine=False)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(DIMS, 2 * DIMS))
        layer = self.adaLN_modulation.layers[1]
        layer.weight = mx.zeros_like(layer.weight)

    def __call__(self, x: mx.array, condition: mx.array) -> mx.array:
        gain, shift = mx.split(self.adaLN_modulation(condition)[:, None], 2, axis=-1)
        y = (1 + gain) * self.norm(x) + shift
        return x + self.attention(y, y) + self.mlp2(nn.gelu(self.mlp1(y)))


class FinalLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(DIMS, 12)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(DIMS, 2 * DIMS))

    def __call__(self, x: mx.array, condition: mx.array) -> mx.array:
        gain, shift = mx.split(self.adaLN_modulation(condition)[:, None], 2, axis=-1)
        return self.linear((1 + gain) * x + shift)


class DiT(nn.Module):
    def __init__(self):
        super().__init__()
        self.x_embedder = nn.Linear(12, DIMS)
        self.t_embedder = mlp(10, DIMS, DIMS)
        self.y_embedder = nn.Embedding(7, DIMS)
        self.blocks = [ZeroBlock() for _ in range(2)]
        self.final_layer = FinalLayer()

    def __call__(self, patches: mx.array) -> mx.array:
        condition = self.t_embedder(noise(2, 10)) + self.y_embedder(mx.array([1, 3]))
        x = self.x_embedder(patches)
        for block in self.blocks:
            x = block(x, condition)
        return self.final_layer(x, condition)


def tower(dims: int) -> nn.Module:
    return Stack("embed blocks", embed=nn.Embedding(VOCAB, dims), blocks=[Block(dims)])


class Clip(nn.Module):
    """Two towers of different widths; both are projected to the width of the text tower."""

    def __init__(self):
        super().__init__()
        self.text_model, self.vision_model = tower(DIMS), tower(2 * DIMS)
        self.visual_projection = nn.Linear(2 * DIMS, DIMS, bias=False)
        self.text_projection = nn.Linear(DIMS, DIMS, bias=False)
        self.logit_scale = mx.array(2.6)

    def __call__(self, tokens: mx.array) -> mx.array:
        text = self.text_projection(self.text_model(tokens).mean(axis=1))
        image = self.visual_projection(self.vision_model(tokens).mean(axis=1))
        return mx.exp(self.logit_scale) * text @ image.T


class Adapted(nn.Module):
    """A frozen Linear with two low-rank parts of choice: arrays in two orientations, or Linears."""

    def __init__(
        self,
        a: str,
        b: str,
        kind: str,
        *,
        inputs: int = DIMS,
        outputs: int = 24,
        rank: int = 4,
        scale: float = 1.0,
    ):
        super().__init__()
        self.names, self.kind, self.scale = (a, b), kind, scale
        self.linear = nn.Linear(inputs, outputs)
        self.freeze()
        down, up = nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=False)
        up.weight = mx.zeros((outputs, rank))
        forms = {"linears": lambda x: x, "arrays": lambda x: x.weight}
        form = forms.get(kind, lambda x: x.weight.T)
        self[a], self[b] = form(down), form(up)

    def __call__(self, x: mx.array) -> mx.array:
        y = x
        for part in (self[name] for name in self.names):
            if self.kind == "linears":
                y = part(y)
            else:
                y = y @ (part.T if self.kind == "arrays" else part)
        return self.linear(x) + self.scale * y


def low_rank(name: str, a: str, b: str, kind: str = "arrays") -> Case:
    """A frozen model in which only the adapters of the middle layer are trained."""

    def build() -> nn.Module:
        ends = nn.Linear(12, DIMS), nn.Linear(24, CLASSES)
        for end in ends:
            end.freeze()
        return nn.Sequential(ends[0], Adapted(a, b, kind), ends[1])

    found = roles(lora_a="*[aA] *[aA].weight *down.weight", lora_b="*[bB] *[bB].weight *up.weight")
    layout = "transposed" if kind == "transposed" else "matrix"
    found = {pattern: (role, layout) for pattern, (role, _) in found.items()}
    return Case(name, build, found, loss_on(2, 12))


CASES = [
    Case(
        "table",
        Table,
        roles(embedding="embedding.weight", hidden="linear1.weight", head="output.weight")
        | roles(bias="*.bias"),
        loss_on_tokens,
    ),
    Case(
        "mlp",
        lambda: mlp(12, INNER, DIMS, CLASSES),
        roles(first="layers.0.weight", head="layers.4.weight", hidden="*.weight", bias="*.bias"),
        loss_on(2, 12),
        guessed=("layers.4.weight",),
    ),
    # The output is as wide as the input, but the first layer is no head.
    Case(
        "mlp_autoencoder",
        lambda: mlp(12, INNER, 4, INNER, 12),
        roles(first="layers.0.weight", head="layers.6.weight", hidden="*.weight", bias="*.bias"),
        loss_on(2, 12),
        guessed=("layers.6.weight",),
    ),
    Case("llama", llama, LLAMA),
    # With tied embeddings, the last Linear in definition order is layers.1.mlp.up_proj: no head.
    Case("llama_tied", lambda: llama(tied=True), LLAMA_TIED),
    Case("qwen3_tied", lambda: mlx_lm_model("qwen3", tie_word_embeddings=True), LLAMA_TIED),
    # gate_proj belongs to an expert or a dense layer; it is no expert gate.
    Case(
        "qwen2_moe",
        qwen2_moe,
        roles(router="*.gate.weight *.shared_expert_gate.weight", experts="*.switch_mlp.*")
        | roles(bias="*_proj.bias")
        | LLAMA,
    ),
    # MoEGate holds bare arrays; embed_q and unembed_out are stacks of projections, no embeddings.
    Case(
        "deepseek_v3",
        deepseek_v3,
        roles(router="*.gate.weight", bias="*.e_score_correction_bias")
        | roles(experts="*.switch_mlp.* *embed_q.weight *unembed_out.weight")
        | roles(hidden="*.kv_a_proj_with_mqa.weight")
        | LLAMA,
    ),
    Case(
        "gpt2",
        gpt2,
        roles(embedding="model.w[tp]e.weight", norm="*.ln_*", hidden="*.c_*.weight")
        | roles(bias="*.c_*.bias"),
    ),
    # No convolution reads the input, not even that of the first block. A_log is (inner, state).
    Case(
        "mamba",
        mamba,
        roles(embedding="backbone.embeddings.weight", norm="*norm*.weight")
        | roles(depthwise="*.conv1d.weight", hidden="*_proj.weight", unknown="*.A_log")
        | roles(vector="*.D", bias="*.bias"),
    ),
    # The biases of the experts have two axes, (experts, out), but are no matrices.
    Case(
        "gpt_oss",
        lambda: mlx_lm_model("gpt_oss", num_local_experts=6),
        roles(router="*.router.weight", experts="*.experts.*.weight", vector="*.sinks")
        | roles(bias="*.bias")
        | LLAMA,
    ),
    Case("whisper", Whisper, WHISPER),
    # trainable_parameters() lists integer arrays, and value_and_grad gives them int32 gradients.
    Case(
        "whisper_alignment_heads",
        lambda: Whisper(alignment=True),
        WHISPER,
        absent=("alignment_heads",),
    ),
    Case(
        "vit",
        ViT,
        roles(conv_input="patches.weight", vector="class_token", unknown="position")
        | roles(head="head.weight")
        | BLOCK,
        loss_on(2, 8, 8, 3),
    ),
    Case(
        "resnet",
        resnet,
        roles(conv_input="conv1.weight", head="fc.weight", bias="fc.bias", norm="*bn[12].*")
        | roles(conv="stages.*.weight"),
        loss_on(2, 8, 8, 3),
        guessed=("fc.weight",),
    ),
    # The frozen layers still read the input and make the output: no other layer gets their roles.
    Case(
        "resnet_frozen_ends",
        lambda: resnet(frozen_ends=True),
        roles(norm="*bn[12].*", conv="stages.*.weight"),
        loss_on(2, 8, 8, 3),
        absent=("conv1.weight", "fc.weight", "fc.bias", "bn1.running_mean"),
    ),
    Case(
        "conv_transpose",
        conv_autoencoder,
        roles(conv_input="layers.0.weight", norm="layers.1.*", bias="*.bias", conv="*.weight"),
        loss_on(2, 8, 8, 1),
    ),
    Case(
        "convnext",
        convnext,
        {"*.grouped.weight": ("conv", "conv/4")}
        | roles(conv_input="stem.weight", conv="*.pwconv.weight", depthwise="blocks.*.weight")
        | roles(head="head.weight", bias="*.bias"),
        loss_on(2, 8, 8, 3),
    ),
    Case("lora", lambda: adapted(llama()), LORA),
    Case("qlora", lambda: adapted(llama(), bits=4), LORA),
    Case(
        "lora_moe",
        lambda: adapted(qwen2_moe()),
        {f"*.switch_mlp.*.{name}": (name, "experts") for name in ("lora_a", "lora_b")} | LORA,
    ),
    Case(
        "lora_embedding",
        lambda: adapted(llama(tied=True), "model.embed_tokens", "self_attn.q_proj"),
        roles(embedding="model.embed_tokens.lora_a") | LORA,
    ),
    Case(
        "dora",
        lambda: adapted(llama(tied=True), "model.embed_tokens", "self_attn.q_proj", dora=True),
        roles(embedding="model.embed_tokens.lora_a", vector="*.m") | LORA,
    ),
    Case(
        "head_by_name",
        lambda: head_first("lm_head"),
        roles(embedding="embedding.weight", head="lm_head.weight") | BLOCK,
    ),
    Case(
        "head_by_shape",
        lambda: head_first("to_tokens"),
        roles(embedding="embedding.weight", head="to_tokens.weight") | BLOCK,
    ),
    Case(
        "shared_modules",
        Shared,
        roles(embedding="head.weight") | BLOCK,
        absent=("embedding.weight", "blocks.0.mlp1.weight", "blocks.1.mlp1.weight"),
    ),
    Case(
        "shared_array",
        shared_array,
        roles(embedding="embedding.weight", head="lm_head.weight") | BLOCK,
    ),
    Case(
        "recurrent",
        Recurrent,
        roles(head="readout.weight", first="lstm.Wx", hidden="*.W*", bias="*.bias gru.b gru.bhn"),
        loss_on(2, 7, 6),
        guessed=("readout.weight",),
    ),
    # A head can be a module: its last Linear is the head, the one before it is hidden.
    Case(
        "two_heads",
        lambda: Fork(
            "trunk",
            policy_head=nn.Linear(DIMS, CLASSES),
            value_head=mlp(DIMS, 20, 1),
            trunk=mlp(12, INNER, DIMS),
        ),
        roles(head="policy_head.weight value_head.layers.2.weight", first="trunk.layers.0.weight")
        | roles(hidden="*.layers.*.weight", bias="*.bias"),
        loss_on(2, 12),
    ),
    Case(
        "raw_experts",
        raw_mixture,
        roles(embedding="embed.weight", router="moe.router.classifier.weight", unknown="moe.w_*")
        | roles(head="lm_head.weight", bias="*.bias"),
    ),
    Case(
        "transformer_encoder",
        Encoder,
        roles(embedding="embedding.weight", head="out_proj.weight", norm="*.ln*", bias="*.bias")
        | roles(hidden="transformer.*.weight"),
    ),
    Case(
        "bert",
        Bert,
        roles(embedding="words.weight positions.weight", head="classifier.weight")
        | roles(norm="*.norm[12].*", bias="*.bias", hidden="layers.*.weight pooler.weight"),
        loss_on_tokens,
    ),
    # A trunk with three output layers; none is called a head.
    Case(
        "actor_critic",
        lambda: Fork(
            "trunk",
            trunk=mlp(12, INNER, DIMS),
            **{name: nn.Linear(DIMS, 4) for name in ("actor", "log_std")},
            critic=nn.Linear(DIMS, 1),
        ),
        roles(first="trunk.layers.0.weight", hidden="trunk.*.weight", head="*.weight")
        | roles(bias="*.bias"),
        loss_on(2, 12),
        guessed=("actor.weight", "log_std.weight", "critic.weight"),
    ),
    # An actor and a critic that share no layer.
    Case(
        "two_networks",
        lambda: Fork(None, actor=mlp(12, DIMS, 4), critic=mlp(12, INNER, 1)),
        roles(first="*.layers.0.weight", head="*.layers.2.weight", bias="*.bias"),
        loss_on(2, 12),
        guessed=("actor.layers.2.weight", "critic.layers.2.weight"),
    ),
    # Two equal output layers; only one is called a head.
    Case(
        "twin_heads",
        lambda: Fork(
            "hidden",
            hidden=nn.Linear(12, DIMS),
            **{name: nn.Linear(DIMS, 4) for name in ("policy_head", "spread")},
        ),
        roles(first="hidden.weight", head="*.weight", bias="*.bias"),
        loss_on(2, 12),
    ),
    # A list of output layers; one is as wide as their common input.
    Case(
        "branches",
        lambda: Fork(
            "hidden",
            hidden=nn.Linear(12, DIMS),
            branches=[nn.Linear(DIMS, outputs) for outputs in (4, DIMS, 1)],
        ),
        roles(first="hidden.weight", head="branches.*.weight", bias="*.bias"),
        loss_on(2, 12),
        guessed=("branches.0.weight", "branches.1.weight", "branches.2.weight"),
    ),
    Case(
        "dqn",
        dqn,
        roles(conv_input="conv1.weight", conv="conv2.weight", hidden="fc1.weight")
        | roles(head="fc2.weight", bias="*.bias"),
        loss_on(2, 8, 8, 4),
        guessed=("fc2.weight",),
    ),
    Case(
        "vae",
        VAE,
        roles(first="fc1.weight", head="fc4.weight", hidden="*.weight", bias="*.bias"),
        loss_on(2, 20),
        guessed=("fc4.weight",),
    ),
    Case(
        "unet",
        UNet,
        {"conv_out.weight": ("head", "conv")}
        | roles(first="time_embed.layers.0.weight", hidden="time_embed.*.weight *.time.weight")
        | roles(conv_input="conv_in.weight", norm="*norm*", conv="*.conv.weight", bias="*.bias"),
        loss_on(2, 8, 8, 3),
    ),
    # MLX does not know that weight_v is a matrix. weight_g holds lengths along one long axis.
    Case(
        "weight_norm",
        lambda: nn.Sequential(WeightNorm(12, DIMS), nn.ReLU(), nn.Linear(DIMS, CLASSES)),
        roles(unknown="*.weight_v", vector="*.weight_g", head="layers.2.weight", bias="*.bias"),
        loss_on(2, 12),
        guessed=("layers.2.weight",),
    ),
    Case(
        "adaln_zero",
        DiT,
        roles(first="x_embedder.weight t_embedder.layers.0.weight", embedding="y_embedder.weight")
        | roles(head="final_layer.linear.weight", hidden="*.weight", bias="*.bias"),
        loss_on(2, 4, 12),
    ),
    Case(
        "clip",
        Clip,
        roles(embedding="*.embed.weight", head="*_projection.weight", vector="logit_scale") | BLOCK,
        loss_on_tokens,
    ),
    low_rank("lora_arrays", "A", "B", kind="transposed"),
    low_rank("lora_arrays_of_linears", "A", "B"),
    low_rank("lora_capitals", "lora_A", "lora_B"),
    low_rank("lora_linears", "lora_a", "lora_b", kind="linears"),
    low_rank("lora_down_up", "lora_down", "lora_up", kind="linears"),
]
CASES_BY_NAME = {case.name: case for case in CASES}
