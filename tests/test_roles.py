"""Roles and layouts of the parameters of many models, and the plan that shows them."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from arrays import random_gradients
from mlx.nn import Conv2d, Embedding, Linear
from mlx.utils import tree_flatten
from models import CASES_BY_NAME, mlp, model_of, vit, whisper

from mlx_maxfactor import create_optimizer
from mlx_maxfactor.routing.roles import ROLES, find_roles


@pytest.mark.parametrize("name", CASES_BY_NAME)
def test_every_parameter_has_the_right_role(name):
    case = CASES_BY_NAME[name]
    model = case.build()
    plan = create_optimizer(model).plan
    found = {e.path: (e.role, {"batched": "matrix"}.get(e.layout, e.layout)) for e in plan}
    assert found == {path: case.expected(path) for path in found}
    assert all((e.note == "guessed") == (case.guessed and e.role == "head") for e in plan)
    listed = {path for path, _ in tree_flatten(model.trainable_parameters())}
    assert set(found) <= listed
    assert not set(found) & set(case.absent)
    # Any other path is a second name of a planned array, or an integer array.
    parameters = dict(tree_flatten(model.trainable_parameters()))
    planned_arrays = {id(parameters[path]) for path in found}
    for path in listed - set(found):
        assert id(parameters[path]) in planned_arrays or parameters[path].dtype == mx.int32


@pytest.mark.parametrize("name", CASES_BY_NAME)
@pytest.mark.parametrize("hidden", ["maxfactor", "orthomaxfactor"])
def test_a_step_moves_what_is_in_the_plan_and_nothing_else(name, hidden):
    mx.random.seed(0)
    model = CASES_BY_NAME[name].build()
    before = dict(tree_flatten(model.parameters()))
    optimizer = create_optimizer(model, hidden, weight_decay=0.1)
    optimizer.update(model, random_gradients(model))
    after = dict(tree_flatten(model.parameters()))
    planned_arrays = {id(after[entry.path]) for entry in optimizer.plan}
    for path, old in before.items():
        new = after[path]
        assert (new.dtype, new.shape) == (old.dtype, old.shape)
        assert mx.all(mx.isfinite(new)).item()
        assert mx.array_equal(new, old).item() == (id(new) not in planned_arrays), path


def test_models_cover_every_documented_role():
    found = {p.role for case in CASES_BY_NAME.values() for p in find_roles(case.build())}
    assert found == set(ROLES)


def test_rule_that_names_a_head_ends_the_search_for_heads():
    model = mlp(12, 8, 12)  # an autoencoder: its first layer takes the width of its last output
    rules = {"layers.2.weight": "head"}
    roles = {e.path: e.role for e in create_optimizer(model, rules=rules).plan}
    assert roles["layers.2.weight"] == "head"
    plan = create_optimizer(vit(), rules={"blocks.0.mlp1.*": "head"}).plan
    roles = {e.path: e.role for e in plan}
    assert roles["blocks.0.mlp1.weight"] == "head"
    assert roles["head.weight"] == "hidden"


def test_plan_is_a_table_with_a_total():
    optimizer = create_optimizer(whisper(), "muon")
    plan = optimizer.plan
    states = [array for _, array in tree_flatten(optimizer.state)]
    scalars = sum(a.nbytes for a in states) - plan.state_bytes
    kept = [m.state[key] for m in optimizer.optimizers for key in ("step", "learning_rate")]
    assert scalars == sum(array.nbytes for array in kept)
    lines = str(plan).splitlines()
    assert len(lines) == len(plan) + 3
    assert len({len(line) for line in lines}) == 1
    assert lines[-1].endswith(f"{plan.state_bytes:,}")
    marked = [line for line in lines if "(unexplained)" in line]
    assert [line.split()[0] for line in marked] == ["decoder.positional_embedding"]
    assert plan[0].path == "encoder.conv1.weight"


def test_strict_names_all_unexplained_parameters():
    with pytest.raises(ValueError, match=r"1 parameters .*: position .*give each a rule"):
        create_optimizer(vit(), strict=True)
    create_optimizer(vit(), strict=True, rules={"position": "embedding"})


def test_unexplained_parameters_are_not_decayed():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.A_log = mx.ones((6, 4))
            self.weight_g, self.alpha = mx.ones((6, 1, 1)), mx.ones((1, 1, 6))
            self.layer = Linear(4, 6)

    plan = {entry.path: entry for entry in create_optimizer(Own()).plan}
    assert plan["A_log"].role == "unknown"
    assert plan["weight_g"].role == plan["alpha"].role == "vector"
    for path in ("A_log", "weight_g", "alpha"):
        assert plan[path].optimizer == "adamw, no decay"
    explained = create_optimizer(Own(), rules={"A_log": "embedding"}).plan
    assert {e.path: e.optimizer for e in explained}["A_log"] == "adamw"


def roles_of(**parts):
    return {p.path: p.role for p in find_roles(model_of(**parts))}


class WeightNormLinear(Linear):
    def __init__(self):
        super().__init__(4, 4)
        self.basis, self.beta = mx.zeros((3, 3)), mx.zeros((4,))


def test_subclass_of_linear_gets_the_roles_of_a_linear():
    roles = roles_of(a=WeightNormLinear(), b=Linear(4, 4))
    assert roles["a.weight"] == "first"
    assert (roles["a.basis"], roles["a.beta"], roles["a.bias"]) == ("unknown", "vector", "bias")


def test_gate_is_a_router_only_next_to_experts():
    moe = model_of(experts=[Linear(16, 16) for _ in range(4)], gate=Linear(16, 4))
    block = model_of(gate=Linear(16, 16), up=Linear(16, 16), moe=moe)
    roles = roles_of(embed=Embedding(9, 16), block=block)
    assert roles["block.gate.weight"] == "hidden"
    assert roles["block.moe.gate.weight"] == "router"


def roles_of_arrays(a, b, **layers):
    model = model_of(first=Linear(8, 8), **layers)
    model.part = model_of(**layers)
    model.part.A, model.part.B = mx.zeros(a), mx.zeros(b)
    return {p.path: (p.role, p.layout) for p in find_roles(model)}


def test_layout_of_low_rank_arrays_follows_their_shapes():
    layer = Linear(32, 32)
    for a, b, layout in (((32, 4), (4, 32), "transposed"), ((4, 32), (32, 4), "batched")):
        found = roles_of_arrays(a, b, layer=layer)
        assert (found["part.A"], found["part.B"]) == (("lora_a", layout), ("lora_b", layout))


def test_state_space_a_and_b_are_not_lora():
    layer = Linear(6, 4)
    for a, b in (((6, 6), (6, 4)), ((6, 4), (4, 4)), ((6, 3), (5, 6))):
        found = roles_of_arrays(a, b, layer=layer)
        assert (found["part.A"][0], found["part.B"][0]) == ("unknown", "unknown")
    found = roles_of_arrays((32, 4), (4, 32))  # no layer that they could adapt
    assert (found["part.A"][0], found["part.B"][0]) == ("unknown", "unknown")


class GroupNorm(nn.Module):
    """A norm with gains per attention head, as in mlx_lm's rwkv7."""


def test_norm_can_hold_gains_per_attention_head():
    norm = model_of(GroupNorm, weight=mx.ones((4, 8)), bias=mx.zeros((4, 8)))
    roles = roles_of(first=Linear(8, 32), norm=norm, last=Linear(32, 4))
    assert (roles["norm.weight"], roles["norm.bias"]) == ("norm", "norm")


def test_low_rank_linears_are_not_heads():
    part = model_of(layer=Linear(8, 24))
    part.lora_down, part.lora_up = Linear(8, 2), Linear(2, 24)
    found = roles_of(first=Linear(6, 8), last=Linear(24, 3), part=part)
    assert found["part.lora_down.weight"] == "lora_a"
    assert found["part.lora_up.weight"] == "lora_b"


LINEARS = Linear(24, 4), Linear(4, 32)
KERNELS = Conv2d(24, 4, 3), Conv2d(4, 32, 1)
LOW_RANK = {  # how each of A and B is held, and in which layout
    "default.weight": (lambda layer: {"default": layer}, LINEARS, "batched"),  # PEFT
    "own.weight": (lambda layer: model_of(own=layer), LINEARS, "batched"),
    "0.weight": (lambda layer: [layer], LINEARS, "batched"),
    "array": (lambda layer: {"array": layer.weight}, LINEARS, "batched"),
    "weight": (lambda layer: layer, KERNELS, "conv"),
    "x.weight": (lambda layer: {"x": layer}, KERNELS, "conv"),
    "": (lambda layer: layer.weight, KERNELS, "conv"),
}


@pytest.mark.parametrize("name", LOW_RANK)
@pytest.mark.parametrize("base", [Linear(24, 32), Conv2d(24, 32, 3)], ids=["Linear", "conv"])
@pytest.mark.parametrize("names", [("lora_A", "lora_B"), ("lora_down", "lora_up")], ids=str)
def test_low_rank_parts_may_lie_in_containers_and_be_convolutions(names, base, name):
    hold, layers, layout = LOW_RANK[name]
    part = model_of(base_layer=base, **{n: hold(x) for n, x in zip(names, layers, strict=True)})
    model = model_of(first=Linear(8, 24), q_proj=part, head=Linear(32, 5))
    found = {p.path: (p.role, p.layout) for p in find_roles(model)}
    for part_name, role in zip(names, ("lora_a", "lora_b"), strict=True):
        assert found[f"q_proj.{part_name}.{name}".strip(".")] == (role, layout)
    assert found["q_proj.base_layer.weight"][0] in ("hidden", "conv")


def test_table_of_an_adapter_is_an_embedding():
    parts = {"lora_embedding_A": mx.zeros((4, 50)), "lora_embedding_B": mx.zeros((32, 4))}
    held = model_of(base_layer=Embedding(50, 32), **{n: {"x": a} for n, a in parts.items()})
    layers = model_of(lora_A=Embedding(50, 4), lora_B=Linear(4, 32))
    roles = roles_of(first=Linear(8, 24), held=held, layers=layers)
    assert roles["held.lora_embedding_A.x"] == roles["layers.lora_A.weight"] == "embedding"
    assert roles["held.lora_embedding_B.x"] == roles["layers.lora_B.weight"] == "lora_b"


def mlp_of(dims):
    up = Linear(dims, 4 * dims)
    return model_of(up_proj=up, down_proj=Linear(4 * dims, dims))


def test_full_rank_linears_called_a_and_b_are_not_lora():
    wide = model_of(A=Linear(64, 64), B=Linear(64, 64))
    roles = roles_of(emb=Embedding(100, 64), part=wide, head=Linear(64, 100))
    assert roles["part.A.weight"] == roles["part.B.weight"] == "hidden"


def test_only_the_convolution_that_reads_the_input_is_conv_input():
    found = roles_of(fc=Linear(100, 128 * 49), up=nn.ConvTranspose2d(128, 64, 4))
    assert found["up.weight"] == "conv"
    time = nn.Sequential(Linear(32, 128), nn.SiLU(), Linear(128, 128))
    first = nn.Sequential(Conv2d(3, 16, 3), nn.ReLU(), Conv2d(16, 16, 3))
    found = roles_of(time_mlp=time, inc=first, outc=Conv2d(16, 3, 1))
    assert found["inc.layers.0.weight"] == "conv_input"
    assert found["inc.layers.2.weight"] == "conv"
    assert (found["time_mlp.layers.2.weight"], found["outc.weight"]) == ("hidden", "head")


def positions_as_wide_as_the_model():
    """BERT with as many positions as dimensions: the pooler has the shape of their table."""
    tables = {"words": Embedding(50, 32), "positions": Embedding(32, 32)}
    blocks = [mlp_of(32) for _ in range(2)]
    return model_of(**tables, layers=blocks, pooler=Linear(32, 32), relation=Linear(32, 3))


def bytes_as_wide_as_the_model():
    """A language model of as many tokens as dimensions, with its output layer before its blocks."""
    embedding, output = Embedding(256, 256), Linear(256, 256)
    return model_of(embedding=embedding, to_bytes=output, blocks=[mlp_of(256) for _ in range(2)])


def gated_experts(**parts):
    """Klear: the last Linear of each block mixes two experts."""
    blocks = [model_of(mlp=mlp_of(32), coefficient=Linear(32, 2)) for _ in range(2)]
    return model_of(embedding=Embedding(50, 32), layers=blocks, **parts)


class Tied(nn.Module):
    """Gemma 4: the last Linear projects the inputs of all layers."""

    def __init__(self):
        super().__init__()
        self.embedding, self.layers = Embedding(50, 32), [mlp_of(32) for _ in range(2)]
        self.per_layer_model_projection = Linear(32, 12)

    def __call__(self, tokens):
        return self.embedding.as_linear(self.embedding(tokens))


def language_model_of(trunk):
    return model_of(model=trunk, lm_head=Linear(32, 50))


def critics():
    return model_of(critics=[model_of(fc1=Linear(6, 32), fc2=Linear(32, 1)) for _ in "ab"])


def diffusion_blocks():
    return [model_of(mlp=mlp_of(32), ada=Linear(32, 192)) for _ in range(2)]


def seedvr():
    """The output layer is in `vid_out`; a projection of the time is called as an output layer."""
    time = model_of(proj_in=Linear(16, 32), proj_out=Linear(32, 192))
    vid_in, vid_out = model_of(proj=Linear(8, 32)), model_of(proj=Linear(32, 8))
    return model_of(vid_in=vid_in, emb_in=time, blocks=diffusion_blocks(), vid_out=vid_out)


def z_image():
    """The output layers are in a dictionary by patch size, before the blocks."""
    final = model_of(linear=Linear(32, 8), adaLN_modulation=Linear(32, 32))
    first = Linear(8, 32)
    parts = {"all_x_embedder": {"2-1": first}, "all_final_layer": {"2-1": final}}
    return model_of(**parts, layers=diffusion_blocks())


def two_towers():
    towers = (
        model_of(inp=Linear(8, 32), blocks=[mlp_of(32)] * 2, proj=Linear(32, 5)) for _ in range(2)
    )
    return model_of(**dict(zip(("queries", "answers"), towers, strict=True)))


def attention_and_mlp():
    attention = model_of(q=Linear(32, 32), kv=Linear(32, 16))
    blocks = [model_of(mlp=mlp_of(32), attn=attention) for _ in range(2)]
    return model_of(embedding=Embedding(50, 32), blocks=blocks, head=Linear(32, 50))


def diffusion_transformer():
    final = model_of(linear=Linear(32, 8), ada=Linear(32, 64))
    return model_of(patch=Conv2d(4, 32, 2, 2), blocks=diffusion_blocks(), final_layer=final)


def norms_of_heads(width):
    """The output is as wide as one attention head, which has a norm."""
    block = model_of(to_q=Linear(32, 32, bias=False), norm_q=nn.RMSNorm(width))
    ends = {"embedder": Linear(6, 32), "final_linear": Linear(32, 8, bias=False)}
    return model_of(layers=[block], **ends)


def medusa(**parts):
    """Heads for later tokens: each is a list of a hidden layer and an output layer."""
    heads = [[Linear(32, 32), Linear(32, 50)] for _ in range(2)]
    return model_of(**parts, medusa=heads)


def convolutions(last, **parts):
    first, second = Conv2d(3, 16, 3), Conv2d(16, 32, 3)
    return model_of(**parts, conv1=first, bn1=nn.BatchNorm(16), conv2=second, **last)


def two_outputs(kind):
    outputs = kind((("a", Linear(16, 3)), ("b", Linear(16, 4))))
    return model_of(trunk=Linear(8, 16), heads=outputs)


def attention_and_output():
    return model_of(attention=nn.MultiHeadAttention(16, 2), output=Linear(16, 16))


MEDUSA = "medusa.0.1 medusa.1.1"
HEADS = {
    "Linears called output": (
        lambda: model_of(a=attention_and_output(), b=attention_and_output(), fc=Linear(16, 3)),
        "fc",
    ),
    "attn": (lambda: model_of(multi_head=nn.MultiHeadAttention(16, 2), fc=Linear(16, 3)), "fc"),
    "fc_out": (lambda: model_of(mlp=model_of(fc_out=Linear(8, 16)), head=Linear(16, 3)), "head"),
    "list": (lambda: two_outputs(lambda pairs: [layer for _, layer in pairs]), "heads.0 heads.1"),
    "dictionary": (lambda: two_outputs(dict), "heads.a heads.b"),
    "attention": (attention_and_mlp, "head"),
    "diffusion": (diffusion_transformer, "final_layer.linear"),
    "norms of heads": (lambda: norms_of_heads(16), "final_linear"),
    "narrow norms of heads": (lambda: norms_of_heads(8), "final_linear"),
    "positions": (positions_as_wide_as_the_model, "relation"),
    "bytes": (bytes_as_wide_as_the_model, "to_bytes"),
    "blocks": (gated_experts, ""),
    "trunk": (lambda: language_model_of(gated_experts()), "lm_head"),
    "after blocks": (lambda: gated_experts(to_tokens=Linear(32, 50)), "to_tokens"),
    "tied": (Tied, ""),
    "not tied": (lambda: language_model_of(Tied()), "lm_head"),
    "critics": (critics, "critics.0.fc2 critics.1.fc2"),
    "seedvr": (seedvr, "vid_out.proj"),
    "z_image": (z_image, "all_final_layer.2-1.linear"),
    "towers": (two_towers, "queries.proj answers.proj"),
    "medusa": (lambda: medusa(**attention_and_mlp().children()), "head " + MEDUSA),
    "medusa alone": (medusa, MEDUSA),
    "tied medusa": (lambda: medusa(model=Tied()), MEDUSA),
    "nested heads": (
        lambda: model_of(trunk=Linear(8, 32), heads=medusa().medusa, up=Linear(9, 8)),
        "heads.0.1 heads.1.1",
    ),
    "head list": (lambda: model_of(head=[Linear(8, 32), Linear(32, 8)], up=Linear(9, 8)), "head.1"),
    "convolution": (lambda: convolutions({"fc": Conv2d(32, 10, 1)}), "fc"),
    "time first": (lambda: convolutions({"fc": Conv2d(32, 10, 1)}, time=mlp_of(16)), "fc"),
    "Linear last": (lambda: convolutions({"conv3": Conv2d(32, 20, 1), "fc": Linear(20, 10)}), "fc"),
    "normed": (lambda: convolutions({"fc": Conv2d(32, 10, 1), "norm": nn.BatchNorm(10)}), ""),
    "several heads": (
        lambda: gated_experts(lm_heads=[Linear(32, 50), Linear(32, 50)]),
        "lm_heads.0 lm_heads.1",
    ),
    "chain": (lambda: model_of(layers=[Linear(6, 8), Linear(8, 8), Linear(8, 2)]), "layers.2"),
}


@pytest.mark.parametrize("name", HEADS)
def test_output_layers(name):
    build, expected = HEADS[name]
    heads = [p.path.removesuffix(".weight") for p in find_roles(build()) if p.role == "head"]
    assert heads == expected.split()


class TiedByHand(nn.Module):
    def __call__(self, tokens):
        first, second = self["layers"]
        return second(first(self["table"](tokens))) @ self.table.weight.T


def test_a_head_that_is_tied_by_hand_leaves_the_hidden_matrices():
    layers = [Linear(16, 16, bias=False) for _ in range(2)]  # of the shape of the table
    model = model_of(TiedByHand, table=Embedding(16, 16), layers=layers)
    roles = [(p.role, p.note) for p in find_roles(model)]
    assert roles == [("embedding", ""), ("hidden", ""), ("hidden", "")]


class Gate(nn.Module):
    """A bare matrix that is multiplied transposed, as in the gates of experts."""

    def __call__(self, x):
        return x @ self.weight.T


def test_a_gate_that_is_transposed_ties_no_table():
    layers = [Linear(16, n, bias=False) for n in (16, 16, 40)]
    gate = model_of(Gate, weight=mx.zeros((4, 16)))
    model = nn.Sequential(Embedding(30, 16), gate, *layers)
    last = find_roles(model)[-1]
    assert (last.role, last.note) == ("head", "guessed")
