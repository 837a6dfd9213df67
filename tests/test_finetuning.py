"""Defaults for weights that are trained already, and for LoRA's matrices, which start at zero."""

import zlib

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from arrays import random_gradients, rates
from mlx.utils import tree_flatten
from models import Table, adapted, llama, mlp, qwen2_moe

from mlx_maxfactor import OPTIMIZERS, create_optimizer, estimate_state_bytes, warmup_cosine
from mlx_maxfactor.routing.rates import RateInputs
from mlx_maxfactor.routing.rates import default_rate as rate_of


def rms(x):
    return np.sqrt(np.mean(np.square(x)))


# AdamW without bias correction: 0.1 / √0.001 at first, the mean of three steps.
RMS_OF_AN_UPDATE = dict.fromkeys(OPTIMIZERS, 1.0) | {"muon": 0.2, "adamw": 4.1}


def default_rate(name, preset, **inputs):
    """The default in the models of these tests, whose LoRA has a scale of 2."""
    return rate_of(name, preset, RateInputs(lora_scale=2.0, **inputs))


def options_of(optimizer):
    """Of every member, without its rate and state."""
    return [
        {k: v for k, v in vars(member).items() if not k.startswith("_") and k != "built_rate"}
        for member in optimizer.optimizers
    ]


def lora_llama(**options):
    mx.random.seed(0)
    return adapted(llama(), **options)


def trained(model):
    return {path: np.array(p) for path, p in tree_flatten(model.trainable_parameters())}


# LoRA


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("bits", [0, 4], ids=["lora", "qlora"])
def test_zero_matrices_move_at_the_rate(name, bits):
    # A rate relative to the size of B moved it by 1e-4 of the rate: it learned nothing.
    model = lora_llama(bits=bits)
    optimizer, before = create_optimizer(model, name), trained(model)
    gradients = random_gradients(model)
    for _ in range(3):
        optimizer.update(model, gradients)
    expected = 3 * default_rate(name, "lora") * RMS_OF_AN_UPDATE[name]
    moved = {path: rms(p - before[path]) for path, p in trained(model).items()}
    assert any(path.endswith("lora_b") for path in moved)
    for path, distance in moved.items():
        # Newton-Schulz lands within 0.7 to 1.2 of 1, and moment estimates differ at first.
        assert 0.5 * expected < distance < 1.5 * expected, path


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_default_learns_a_change_of_rank_four(name):
    from mlx_lm.tuner.lora import LoRALinear

    mx.random.seed(1)
    # A layer of weights that are right but for a change of rank 4.
    model, target = (mlp(32, 64, 16) for _ in range(2))
    target.update(model.parameters())
    change = mx.random.normal((64, 4)) @ mx.random.normal((4, 32))
    target.layers[0].weight = model.layers[0].weight + 0.05 * change
    model.freeze()
    model.layers[0] = LoRALinear.from_base(model.layers[0], r=8)
    optimizer, inputs = create_optimizer(model, name), mx.random.normal((256, 32))
    outputs, losses = target(inputs), []
    loss_of = lambda m: (m(inputs) - outputs).square().mean()  # noqa: E731
    for _ in range(40):
        loss, gradients = nn.value_and_grad(model, loss_of)(model)
        optimizer.update(model, gradients)
        mx.eval(model.state, optimizer.state)
        losses.append(loss.item())
    # At the defaults of other matrices MaxFactor has 0.98 of it left.
    assert losses[-1] < 0.8 * losses[0]


def test_a_rate_that_is_given_is_the_rate_of_a_and_b_and_moves_the_magnitude():
    model = lora_llama(dora=True)
    ratio = default_rate("adamw", "pretrained") / default_rate("muon", "lora")
    roles = {e.path: e.role for e in create_optimizer(model, "muon").plan}
    for rate in (6e-3, warmup_cosine(6e-3, 10, 0)):
        optimizer = create_optimizer(model, "muon", learning_rate=rate)
        assert optimizer.learning_rate.item() == pytest.approx(6e-3)
        found = optimizer.effective_learning_rates(model)
        magnitudes = [rate for path, rate in found.items() if roles[path] == "vector"]
        assert magnitudes == pytest.approx([6e-3 * ratio] * len(magnitudes))
        assert len(magnitudes) > 0


def test_options_that_are_given_win():
    model = lora_llama()
    given = create_optimizer(model, learning_rate=0.05, min_rms=0.01, block=None).optimizers[0]
    assert (given.min_rms, given.block) == (0.01, None)
    assert given.learning_rate.item() == pytest.approx(0.05)
    assert create_optimizer(model, "muon", scale="spectral").optimizers[0].scale == "spectral"


def test_a_rule_gets_the_defaults_for_what_it_names():
    optimizer = create_optimizer(lora_llama(), "muon", rules={"lora_b": "maxfactor"})
    member = next(m for m in optimizer.optimizers if hasattr(m, "min_rms"))
    assert member.min_rms == 1.0
    assert member.learning_rate.item() == pytest.approx(default_rate("maxfactor", "lora"))


@pytest.mark.parametrize(("options", "lead"), [({}, 1e-2), ({"learning_rate": 0.02}, 0.02)])
def test_layers_that_are_trained_whole_beside_lora(options, lead):
    model = lora_llama()
    model.layers[0].unfreeze()
    optimizer = create_optimizer(model, "muon", **options)
    found = {e.role: rates(optimizer)[optimizer._routes[e.path]] for e in optimizer.plan}
    unit = lead / default_rate("muon", "lora")
    hidden, norm = (unit * default_rate(name, "pretrained") for name in ("muon", "adamw"))
    expected = {"lora_a": lead, "lora_b": lead, "hidden": hidden, "norm": norm}
    assert found == pytest.approx(expected)


def lora_of(width, scale):
    from mlx_lm.tuner.lora import LoRALinear

    model = nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(3)])
    model.freeze()
    model.layers = [LoRALinear.from_base(layer, r=8, scale=scale) for layer in model.layers]
    return model


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rates_of_lora_follow_the_width_and_the_scale(name):
    def rate(*model, **options):
        return create_optimizer(lora_of(*model), name, **options).members[0].peak_rate

    assert rate(256, 20.0) == pytest.approx(rate(64, 20.0) / 2, rel=0.05)  # of two digits
    assert rate(256, 2.0) == pytest.approx(10 * rate(256, 20.0), rel=0.05)
    assert rate(64, 20.0, total_steps=100) == pytest.approx(2 * rate(64, 20.0), rel=0.05)
    assert rate(64, 20.0, total_steps=100, learning_rate=0.01) == 0.01


def test_rates_of_trained_weights_follow_the_width():
    def rates_at(width, **options):
        model = nn.Sequential(*[nn.Linear(width, width) for _ in range(3)])
        optimizer = create_optimizer(model, pretrained=True, **options)
        return [member.peak_rate for member in optimizer.members[:2]]

    small, large = rates_at(64), rates_at(256)
    assert large == pytest.approx([rate / 2 for rate in small], rel=0.05)  # of two digits
    assert rates_at(64, total_steps=100) == pytest.approx([2 * rate for rate in small])
    # Not above the peak from scratch.
    assert rates_at(64, total_steps=100_000) == pytest.approx([2.5e-3, 4e-4])


@pytest.mark.parametrize("build", [lora_llama, lambda: lora_llama(dora=True)])
def test_a_model_with_lora_is_pretrained(build):
    first, second = (create_optimizer(build(), pretrained=flag) for flag in (False, True))
    assert rates(first) == rates(second)
    assert options_of(first) == options_of(second)


# Full fine-tuning


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("rest", ["adamw", "adafactor"])
def test_pretrained_weights_get_other_rates_and_nothing_else(name, rest):
    scratch, pretrained = (
        create_optimizer(Table(), name, rest, pretrained=flag) for flag in (False, True)
    )
    assert options_of(scratch) == options_of(pretrained)
    assert [e.optimizer for e in scratch.plan] == [e.optimizer for e in pretrained.plan]
    if name != "adafactor":
        assert pretrained.learning_rate.item() == pytest.approx(default_rate(name, "pretrained"))


def test_a_rate_that_is_given_is_taken_for_pretrained_weights_too():
    ratio = default_rate("adamw", "pretrained") / default_rate("orthomaxfactor", "pretrained")
    found = rates(create_optimizer(Table(), learning_rate=0.01, pretrained=True))
    assert found == pytest.approx([0.01, 0.01 * ratio, 0.01 * ratio])
    both = create_optimizer(Table(), learning_rate=0.01, rest_learning_rate=1e-4, pretrained=True)
    assert rates(both) == pytest.approx([0.01, 1e-4, 1e-4])


def test_it_is_a_flag_and_changes_no_size():
    with pytest.raises(ValueError, match="pretrained must be True or False, got 'yes'"):
        create_optimizer(Table(), pretrained="yes")
    for model in (Table(), adapted(qwen2_moe())):
        sizes = {estimate_state_bytes(model, pretrained=flag) for flag in (False, True)}
        assert len(sizes) == 1


# The examples


@pytest.mark.examples
def test_a_small_llama_is_built_once(tmp_path):
    from small_llama import build_model

    folder = build_model(tmp_path / "model", steps=2)
    written = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    build_model(folder, steps=2)
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == written


class Words:
    """A tokenizer: a token for each word."""

    def encode(self, text, add_special_tokens):
        return [2 + zlib.crc32(word.encode()) % 500 for word in text.split()]


@pytest.mark.examples
@pytest.mark.parametrize("whole_vocabulary", [False, True])
def test_texts_of_the_pretrained_comparison(whole_vocabulary):
    import compare_pretrained

    first, again, other = (
        compare_pretrained.read_texts(Words(), seed, whole_vocabulary) for seed in (1, 1, 2)
    )
    assert mx.array_equal(first.training, again.training).item()
    assert not mx.array_equal(first.held_out, other.held_out).item()
    assert (first.vocabulary is None) == whole_vocabulary
    for rows in (first.training, first.held_out, first.old):
        assert rows.shape[1] == compare_pretrained.WINDOW
        if first.vocabulary is not None:
            assert rows.max().item() < first.vocabulary.size
    assert 0.1 < first.is_name.astype(mx.float32).mean().item() < 0.9
    assert not first.is_name[:, 0].any().item()  # <bos>


@pytest.mark.examples
@pytest.mark.parametrize("mode", ["lora", "dora", "qlora", "full"])
def test_pretrained_models_are_prepared_and_measured(mode):
    import compare_pretrained

    model = llama()
    compare_pretrained.prepare(model, mode)
    assert any("lora_a" in path for path in trained(model)) == (mode != "full")
    run = compare_pretrained.Run(mode, "orthomaxfactor", None, 1)
    optimizer = compare_pretrained.make_optimizer(model, run)
    assert compare_pretrained.peak_rate(optimizer, run) == optimizer.members[0].peak_rate
    tokens = mx.random.randint(0, 30, (8, 16))
    marks = mx.random.uniform(shape=tokens.shape) < 0.5
    both = [compare_pretrained.mean_loss(model, tokens, x) for x in (marks, ~marks)]
    share = marks[:, 1:].astype(mx.float32).mean().item()
    whole = compare_pretrained.mean_loss(model, tokens)
    assert whole == pytest.approx(share * both[0] + (1 - share) * both[1], rel=1e-3)


@pytest.mark.examples
def test_weights_of_qlora_are_rounded():
    import compare_pretrained

    layers = {"matrix": mx.random.normal((3, 64)), "vector": mx.random.normal((64,))}
    rounded = {name: compare_pretrained.rounded_to_4_bits(x) for name, x in layers.items()}
    assert mx.array_equal(rounded["vector"], layers["vector"]).item()
    assert 0 < mx.abs(rounded["matrix"] - layers["matrix"]).max().item() < 0.3


@pytest.mark.examples
def test_the_kept_records_of_pretrained_models_make_the_tables():
    from compare_pretrained import old_at, read, report

    records = read()
    assert "mlx AdamW" in report(records)
    for record in (r for r in records if r.new[1] < r.new[0]):
        # Halfway between two measurements the loss on the old text is between theirs.
        target = (record.new[0] + record.new[1]) / 2
        assert old_at(record, target) == pytest.approx((record.old[0] + record.old[1]) / 2)
        assert old_at(record, min(record.new) - 1) is None


def test_lora_that_is_frozen_leaves_the_rate_as_it_was_given():
    model = lora_llama()
    model.freeze()
    model.layers[0].mlp.unfreeze(keys=["weight"], strict=False)
    optimizer = create_optimizer(model, learning_rate=0.02)
    rates = optimizer.effective_learning_rates(model)
    hidden = {e.path for e in optimizer.plan if e.optimizer == "orthomaxfactor"}
    assert hidden
    assert optimizer.learning_rate.item() == pytest.approx(0.02)
    assert all(rates[path] < 0.02 for path in hidden)  # times the RMS of its weights


def test_default_rates_of_wide_models_give_no_warning():
    for width in (1024, 4096):
        model = nn.Sequential(*[nn.Linear(width, width) for _ in range(3)])
        optimizer = create_optimizer(model, pretrained=True)  # a warning would be an error
        optimizer.learning_rate = optimizer.learning_rate.item() / 2
        with pytest.warns(UserWarning, match="is small for OrthoMaxFactor.*a usual one is 0.000"):
            optimizer.learning_rate = 1e-7


@pytest.mark.parametrize(
    ("scale", "read"),
    [(mx.array(2.0), 2.0), ({"x": 5}, 5.0), (float("inf"), 20.0), (1e-12, 20.0), ("large", 20.0)],
    ids=str,
)
def test_the_scale_of_lora_is_read_if_it_is_a_number(scale, read):
    model = lora_of(64, 20.0)
    for layer in model.layers:
        layer.scale = scale
    expected = rate_of("orthomaxfactor", "lora", RateInputs(lora_scale=read))
    assert create_optimizer(model).members[0].peak_rate == pytest.approx(expected)
