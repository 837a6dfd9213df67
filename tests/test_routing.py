"""The routed optimizer and its factories: members, rates, rules, freezing, mlx's optimizers."""

import threading
import warnings

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as mlx_optimizers
import numpy as np
import pytest
from arrays import random_gradients, rates
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from models import (
    CASES_BY_NAME,
    ResNet,
    Shared,
    Table,
    adapted,
    llama,
    mlx_lm_model,
    model_of,
    qwen2_moe,
    raw_mixture,
    whisper,
)
from trajectories import distance

from mlx_maxfactor import (
    OPTIMIZERS,
    AdamW,
    Muon,
    OrthoMaxFactor,
    RoutedOptimizer,
    SignSGD,
    create_optimizer,
    create_optimizer_for_hrm,
    estimate_state_bytes,
    reference,
    warmup_cosine,
)
from mlx_maxfactor.routing.rates import RateInputs


def owners(optimizer):
    return {entry.path: entry.optimizer for entry in optimizer.plan}


# Members


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_create_optimizer_returns_a_multi_optimizer_with_the_named_members(name):
    optimizer = create_optimizer(Table(), name)
    assert isinstance(optimizer, RoutedOptimizer)
    assert isinstance(optimizer, mlx_optimizers.MultiOptimizer)
    hidden, rest, undecayed = optimizer.optimizers
    assert type(hidden) is OPTIMIZERS[name].kind
    assert (rest.betas, rest.weight_decay, undecayed.weight_decay) == ((0.9, 0.95), 0.1, 0.0)
    assert rates(optimizer) == pytest.approx([OPTIMIZERS[name].learning_rate, 1e-3, 1e-3])


def test_two_routed_optimizers_share_no_member():
    # The fallback AdamW of mlx-optimizers is a default argument, so all optimizers share it.
    first, second = create_optimizer(Table()), create_optimizer(Table())
    assert not {id(m) for m in first.optimizers} & {id(m) for m in second.optimizers}


def test_weight_decay_skips_biases():
    model = Table()
    before = dict(tree_flatten(model.parameters()))
    options = {"rest_options": {"weight_decay": 0.5}, "weight_decay": 0.25}
    optimizer = create_optimizer(model, learning_rate=0.1, rest_learning_rate=0.2, **options)
    optimizer.update(model, tree_map(mx.zeros_like, model.parameters()))
    for path, p in tree_flatten(model.parameters()):
        factor = {"linear1.weight": 1 - 0.1 * 0.25}.get(path, 1 - 0.2 * 0.5)
        factor = 1.0 if path.endswith("bias") else factor
        assert np.allclose(np.array(p), np.array(before[path]) * factor, rtol=1e-6)


def large_tables():
    """A model with tables of rows that are mostly rare."""
    model = Table()
    model.embedding, model.output = nn.Embedding(2000, 64), nn.Linear(64, 2000)
    return model


@pytest.mark.parametrize("rest", [n for n in OPTIMIZERS if n not in ("orthomaxfactor", "muon")])
def test_row_of_an_embedding_without_gradient_is_moved_by_decay_alone(rest):
    model = large_tables()
    optimizer = create_optimizer(model, rest=rest, rest_options={"weight_decay": 0.5})
    optimizer.update(model, random_gradients(model))  # a gradient for all rows, once
    used = mx.arange(2000)[:, None] < 7
    for seed in range(1, 4):
        before = np.array(model.embedding.weight)
        gradients = random_gradients(model, seed)
        gradients["embedding"]["weight"] *= used
        optimizer.update(model, gradients)
        moved = np.array(model.embedding.weight)
        (owner,) = {e.rate for e in optimizer.plan if e.role == "embedding"}
        ratio = moved[7:] / before[7:]
        # Adafactor's rest has a rate relative to the weights, so its decay is not the plan's.
        expected = ratio[0, 0] if rest == "adafactor" else 1 - 0.5 * owner
        assert np.allclose(ratio, expected, rtol=1e-6)
        assert np.all(np.abs(moved[:7] - before[:7] * expected).max(axis=1) > 1e-6)


def test_large_tables_have_no_first_moment_and_a_factored_second():
    model = large_tables()
    plan = {entry.path: entry for entry in create_optimizer(model).plan}
    for path in ("embedding.weight", "output.weight"):
        assert plan[path].optimizer == "adamw, no momentum"
        # Row and column statistics, and a count of updates: 4 bytes each.
        assert plan[path].state_bytes == 4 * (2000 + 64 + 1)
    whole = create_optimizer(model, rest_options={"betas": (0.9, 0.95)}).plan
    assert {e.path: e.optimizer for e in whole}["embedding.weight"] == "adamw"
    rules = {"embedding": AdamW(1e-3)}
    assert create_optimizer(model, rules=rules).plan[0].state_bytes == 4 * (2 * 2000 * 64 + 1)


def test_optimizer_passed_as_rest_keeps_its_own_decay():
    model, rest = Table(), AdamW(1e-3, weight_decay=0.3)
    optimizer = create_optimizer(model, "muon", rest)
    assert optimizer.optimizers[1] is rest
    assert len(optimizer.optimizers) == 2
    assert set(owners(optimizer).values()) == {"muon", "AdamW"}


@pytest.mark.parametrize(("rest", "most"), [("adamw", 0.66), ("adafactor", 0.1)])
def test_state_of_a_real_bf16_model_is_smaller_than_mlx_adamws(rest, most):
    before = mx.get_active_memory()
    sizes = {"hidden_size": 896, "intermediate_size": 4864, "vocab_size": 151936}
    heads = {"num_attention_heads": 14, "num_key_value_heads": 2, "num_hidden_layers": 24}
    model = mlx_lm_model("qwen2", tie_word_embeddings=True, **sizes, **heads)
    model.set_dtype(mx.bfloat16)
    weights = sum(p.nbytes for _, p in tree_flatten(model.parameters()))
    assert weights == pytest.approx(988e6, rel=1e-3)
    assert estimate_state_bytes(model, rest=rest) < most * 2 * weights
    assert mx.get_active_memory() < before + 1e6, "estimating the state created arrays"


@pytest.mark.parametrize(
    ("hidden", "rate", "options", "twin"),
    [
        ("adafactor", 0.01, {}, reference.Adafactor),
        ("muon", 0.02, {"scale": None, "momentum": 0.95}, reference.Muon),
    ],
)
@pytest.mark.parametrize("build", [whisper, lambda: adapted(qwen2_moe())], ids=["conv", "experts"])
def test_every_layout_follows_the_twin(build, hidden, rate, options, twin):
    model = build()
    model.apply(lambda p: p + 0.01)  # LoRA's B starts at zero, where MaxFactor hardly moves
    optimizer = create_optimizer(model, hidden, learning_rate=rate, **options)
    parameters = {k: np.float64(v) for k, v in tree_flatten(model.trainable_parameters())}
    plan = [entry for entry in optimizer.plan if entry.optimizer == hidden]
    twins = {entry.path: twin(rate) for entry in plan}
    for seed in range(3):
        gradients = random_gradients(model, seed)
        optimizer.update(model, gradients)
        gradients = {k: np.float64(v) for k, v in tree_flatten(gradients)}
        for entry in plan:
            p, g = parameters[entry.path], gradients[entry.path]
            parameters[entry.path] = twins[entry.path].update(p, g, entry.layout)
    moved = dict(tree_flatten(model.trainable_parameters()))
    assert len({entry.layout for entry in plan}) == 2
    for entry in plan:
        # p is rounded three times, and Muon's quintics run on matrices of rank 4.
        assert distance(np.array(moved[entry.path]), parameters[entry.path]) < 2e-5, entry.path


# Rates


def test_learning_rate_also_scales_the_rate_of_the_rest():
    assert rates(create_optimizer(Table(), learning_rate=0.1)) == pytest.approx([0.1, 5e-3, 5e-3])
    optimizer = create_optimizer(Table(), learning_rate=0.05, rest_learning_rate=2e-3)
    assert rates(optimizer) == pytest.approx([0.05, 2e-3, 2e-3])
    optimizer.learning_rate = 0.1
    assert rates(optimizer) == pytest.approx([0.1, 4e-3, 4e-3])


def test_schedule_applies_to_every_member():
    # The schedule of the fallback in mlx-optimizers never advances.
    model, schedule = Table(), warmup_cosine(0.04, 20, 4)
    optimizer = create_optimizer(model, "muon", learning_rate=schedule, rest_learning_rate=3e-3)
    for t in range(20):
        optimizer.update(model, random_gradients(model))
        rate = schedule(t).item()
        assert rates(optimizer) == pytest.approx([rate, rate * 3 / 40, rate * 3 / 40], rel=1e-5)
    assert optimizer.step.item() == 20
    by_ratio = create_optimizer(model, "muon", learning_rate=lambda step: 0.04 * (step + 1))
    assert rates(by_ratio) == pytest.approx([0.04, 2e-3, 2e-3])


def test_schedule_applies_to_given_members_except_those_with_their_own_schedule():
    schedule = warmup_cosine(0.04, 20, 4)
    own = AdamW(warmup_cosine(1e-2, 20, 10))
    for rest, expected in ((AdamW(1e-3), 1e-3), (mlx_optimizers.AdamW(1e-3), 1e-3), (own, 4e-3)):
        model = Table()
        optimizer = create_optimizer(model, rest=rest, learning_rate=schedule)
        for _ in range(5):
            optimizer.update(model, random_gradients(model))
        assert rates(optimizer) == pytest.approx([0.04, expected])


def test_setting_the_rate_keeps_the_ratios_and_ends_the_schedules():
    # MLX's MultiOptimizer would give every member the same rate.
    model, schedule = Table(), warmup_cosine(0.04, 20, 4)
    optimizer = create_optimizer(model, "muon", learning_rate=schedule)
    optimizer.learning_rate = 0.01  # at the start of the warm-up, where every rate is 0
    assert rates(optimizer) == pytest.approx([0.01, 5e-4, 5e-4])
    optimizer.update(model, random_gradients(model))
    assert rates(optimizer) == pytest.approx([0.01, 5e-4, 5e-4])
    optimizer.optimizers[1].learning_rate = 1e-3
    optimizer.learning_rate = 0.02
    assert rates(optimizer) == pytest.approx([0.02, 2e-3, 1e-3])
    optimizer.learning_rate = schedule
    optimizer.update(model, random_gradients(model))
    assert rates(optimizer) == pytest.approx([0.01, 1e-3, 5e-4])


def test_effective_learning_rates_list_every_parameter():
    model = Table()
    model.linear1.weight = 2 * model.linear1.weight  # above the floor
    optimizer = create_optimizer(model, learning_rate=0.1)
    found = optimizer.effective_learning_rates(model)
    assert list(found) == [entry.path for entry in optimizer.plan]
    rms = np.sqrt(np.mean(np.square(np.array(model.linear1.weight))))
    assert found["linear1.weight"] == pytest.approx(0.1 * rms, rel=1e-5)
    assert found["embedding.weight"] == pytest.approx(5e-3)


def test_setting_the_rate_reaches_mlx_members_with_a_schedule():
    model = Table()
    rest = mlx_optimizers.AdamW(mlx_optimizers.cosine_decay(1e-3, 100))
    optimizer = create_optimizer(model, Muon(0.02), rest)
    optimizer.learning_rate = 0.002
    optimizer.update(model, random_gradients(model))
    assert rates(optimizer) == pytest.approx([0.002, 1e-4])
    optimizer.learning_rate = warmup_cosine(0.02, 100, 0)
    optimizer.update(model, random_gradients(model))
    assert rates(optimizer) == pytest.approx([0.02, 1e-3], rel=1e-2)


def test_adafactor_as_rest_keeps_its_relative_step():
    alphas = []
    for options in ({}, {"learning_rate": 0.01}, {"learning_rate": warmup_cosine(0.01, 10, 0)}):
        mx.random.seed(0)
        model = Table()
        optimizer = create_optimizer(model, "maxfactor", "adafactor", **options)
        alphas.append(optimizer.effective_learning_rates(model)["embedding.weight"])
    assert alphas == pytest.approx([alphas[0]] * 3)
    assert alphas[0] < 0.005


def peak(name, steps, width, **options):
    return OPTIMIZERS[name].peak_of(RateInputs(steps, width, **options))


def test_total_steps_picks_each_peak_and_builds_each_schedule():
    optimizer = create_optimizer(Table(), total_steps=400)
    hidden, rest = peak("orthomaxfactor", 400, 64), OPTIMIZERS["adamw"].rest_peak
    found = {e.optimizer: e.rate for e in optimizer.plan}
    expected = {"orthomaxfactor": hidden, "adamw": rest, "adamw, no decay": rest}
    assert found == pytest.approx(expected)
    assert "  0.04  " in str(optimizer.plan)
    schedule = warmup_cosine(1.0, 400, 40, start_ratio=1 / 41)
    for t in (0, 39, 200, 400, 1000):
        for member in optimizer.optimizers:
            member.state["step"] = mx.array(t, mx.uint64)
            member.advance()
        each = [schedule(t).item() * rate for rate in (hidden, rest, rest)]
        assert rates(optimizer) == pytest.approx(each, rel=1e-5)


# Those of pretrained weights are twice the constant rates.
PEAKS = [({"learning_rate": 0.08}, [0.08, 0.02]), ({"rest_learning_rate": 3e-3}, [0.04, 3e-3])]
PEAKS += [({"learning_rate": 0.02, "rest_learning_rate": 3e-3}, [0.02, 3e-3])]
PEAKS += [({"momentum": 0}, [0.07, 0.01]), ({"hidden": "muon"}, [0.04, 0.01])]
PEAKS += [({"hidden": "adamw"}, [3e-3, 0.01]), ({"hidden": Muon(0.3)}, [0.3, 0.01])]
PEAKS += [({"rest": AdamW(5e-3)}, [0.04, 5e-3]), ({"pretrained": True}, [4e-3, 4e-4])]


@pytest.mark.parametrize(("options", "expected"), PEAKS, ids=str)
def test_rate_given_with_total_steps_is_the_peak(options, expected):
    optimizer = create_optimizer(Table(), total_steps=400, **options)
    for member in optimizer.optimizers:  # the peak is at the end of the warm-up
        member.state["step"] = mx.array(40, mx.uint64)
        member.advance()
    assert rates(optimizer)[:2] == pytest.approx(expected, rel=1e-5)


def test_peak_of_tables_falls_with_the_width():
    # The peak of other parameters does not.
    for width, expected in ((64, 0.02), (256, 0.01)):
        ends = nn.Embedding(2000, width), nn.Linear(width, 2000)
        model = nn.Sequential(ends[0], nn.Linear(width, width), ends[1])
        peaks = {e.role: e.rate for e in create_optimizer(model, total_steps=100).plan}
        assert peaks["embedding"] == peaks["head"] == pytest.approx(expected)
        assert peaks["bias"] == pytest.approx(0.01)


def test_peak_depends_on_steps_and_width():
    assert peak("orthomaxfactor", 400, 64) == 2 * peak("orthomaxfactor", 1600, 128)
    assert peak("orthomaxfactor", 400, 64) == 2 * peak("orthomaxfactor", 400, 512)
    whole = [peak("orthomaxfactor", 400, 512, block=block) for block in (None, 1024)]
    assert whole[0] == whole[1]
    assert peak("muon", 400, 64) == 2 * peak("muon", 400, 256)
    assert peak("adamw", 400, 64) == 4 * peak("adamw", 9999, 256)
    assert peak("orthomaxfactor", 10**4, 64) == 8e-3
    assert peak("orthomaxfactor", 10**7, 64) == 1.5e-3  # constant beyond the measured steps


def model_with_trainable_head():
    model = Table()
    model.freeze()
    model.output.unfreeze()
    return model


def test_learning_rate_is_the_rate_of_the_rest_if_only_the_rest_is_trained():
    model = model_with_trainable_head()
    optimizer = create_optimizer(model, learning_rate=1e-2)
    assert optimizer.learning_rate.item() == pytest.approx(1e-2)
    found = optimizer.effective_learning_rates(model)
    assert list(found.values()) == pytest.approx([1e-2] * 2)
    optimizer.learning_rate = 3e-3
    assert optimizer.learning_rate.item() == pytest.approx(3e-3)
    assert list(optimizer.effective_learning_rates(model).values()) == pytest.approx([3e-3] * 2)
    with pytest.warns(UserWarning, match="^learning_rate has no effect: no trainable parameter"):
        optimizer = create_optimizer(model, learning_rate=0.1, rest_learning_rate=1e-3)
    assert list(optimizer.effective_learning_rates(model).values()) == pytest.approx([1e-3] * 2)
    model = model_with_trainable_head()
    optimizer = create_optimizer(model, total_steps=100)
    optimizer.update(model, random_gradients(model))
    assert optimizer.learning_rate.item() == pytest.approx(1e-2 / 11)


SMALL = "learning_rate 0.001 is small for OrthoMaxFactor, .*: a usual one is 0.02, or what total_st"


def test_rate_that_suits_adamw_warns_once():
    with pytest.warns(UserWarning, match=SMALL):
        optimizer = create_optimizer(Table(), learning_rate=1e-3)
    with pytest.warns(UserWarning, match=SMALL):
        OrthoMaxFactor(1e-3)
    with pytest.warns(UserWarning, match="0.0003 is small for MaxFactor.*usual one is 0.01"):
        create_optimizer(Table(), "maxfactor", learning_rate=warmup_cosine(3e-4, 100))
    optimizer = create_optimizer(Table())
    with pytest.warns(UserWarning, match="learning_rate 0.0003 is small for OrthoMaxFactor"):
        optimizer.learning_rate = 3e-4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for rate in (3e-4, 1e-4, 0.0):  # this optimizer has warned already
            optimizer.learning_rate = rate
        create_optimizer(Table(), learning_rate=2e-3)
        create_optimizer(Table(), learning_rate=0.0)
        create_optimizer(adapted(qwen2_moe()), learning_rate=1e-3)  # LoRA's rate is absolute
        create_optimizer(Table(), "muon", learning_rate=1e-4)


def test_warnings_point_to_the_callers_line():
    model, head = Table(), model_with_trainable_head()
    for warns in (
        lambda: create_optimizer(model, learning_rate=1e-3),
        lambda: create_optimizer(head, learning_rate=1e-3, rest_learning_rate=1e-3),
        lambda: OrthoMaxFactor(1e-3),
        lambda: setattr(OrthoMaxFactor(), "learning_rate", 1e-3),
        lambda: setattr(create_optimizer(model), "learning_rate", 1e-3),
    ):
        with pytest.warns(UserWarning, match="learning_rate") as caught:
            warns()
        assert caught[0].filename == __file__


# Rules


def test_rule_for_hidden_also_applies_to_the_first_layer():
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3))
    optimizer = create_optimizer(model, "muon", rules={"hidden": "adafactor", "*.bias": "rest"})
    assert owners(optimizer)["layers.0.weight"] == "adafactor"
    assert owners(optimizer)["layers.0.bias"] == "adamw, no decay"


def test_rule_can_use_any_name_of_a_shared_module():
    optimizer = create_optimizer(Shared(), rules={"embedding.weight": "adafactor"})
    assert owners(optimizer)["head.weight"] == "adafactor"


def test_path_rule_overrides_role_rule_and_role_rule_overrides_default():
    puzzles = SignSGD(0.1)
    rules = {"embedding": puzzles, "linear1.*": "adamw", "head": "muon", "*.weight": "adafactor"}
    optimizer = create_optimizer(Table(), rules=rules)
    assert owners(optimizer) == {
        "embedding.weight": "adafactor",
        "linear1.weight": "adamw",
        "linear1.bias": "adamw, no decay",
        "output.weight": "adafactor",
        "output.bias": "adamw, no decay",
    }
    optimizer = create_optimizer(Table(), rules={"embedding": puzzles, "head": "muon"})
    assert owners(optimizer)["embedding.weight"] == "SignSGD"
    assert owners(optimizer)["output.weight"] == "muon"
    assert puzzles in optimizer.optimizers


def test_rule_can_set_the_role_of_an_array():
    model = raw_mixture()
    plan = create_optimizer(model, "muon", rules={"moe.w_*": "experts"}).plan
    entry = next(e for e in plan if e.path == "moe.w_in")
    assert (entry.role, entry.layout) == ("experts", "experts")
    assert (entry.optimizer, entry.note) == ("muon", "")


def test_convolution_kernel_with_rule_hidden_keeps_its_layout():
    plan = create_optimizer(whisper(), rules={"*conv1.weight": "hidden"}).plan
    (entry,) = [entry for entry in plan if entry.path.endswith("conv1.weight")]
    assert (entry.optimizer, entry.layout) == ("orthomaxfactor", "conv")


def test_one_error_names_all_wrong_rules():
    rules = {"*.wq.weigth": "muon", "embeding": "adamw", "head": "sgd", "bias": "norm"}
    with pytest.raises(ValueError, match="rule") as error:
        create_optimizer(Table(), rules=rules)
    matches = "'*.wq.weigth' is no role and matches"
    for part in (matches, "did you mean 'embedding'", "got 'sgd'", "got 'norm'"):
        assert part in str(error.value)


def test_error_names_the_parameters_that_a_member_cannot_take():
    with pytest.raises(ValueError, match=r"linear1.bias: Muon(.|\n)*output.bias: Muon"):
        create_optimizer(Table(), rest="muon")


def test_first_layer_can_be_excluded():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 3))
    assert owners(create_optimizer(model))["layers.0.weight"] == "orthomaxfactor"
    excluded = owners(create_optimizer(model, exclude_first=True))
    assert excluded["layers.0.weight"] == "adamw"
    assert excluded["layers.2.weight"] == "orthomaxfactor"


# Freezing, sharing, late parameters


@pytest.mark.parametrize("make", [lambda: "muon", lambda: mlx_optimizers.Adam(1e-3)])
def test_layers_can_be_frozen_and_unfrozen_between_steps(make):
    # A bare MLX optimizer raises a KeyError here.
    model = ResNet()
    model.stages[0].freeze()
    optimizer = create_optimizer(model, make())
    assert not any(path.startswith("stages.0") for path in owners(optimizer))

    def moved():
        before = dict(tree_flatten(model.parameters()))
        optimizer.update(model, random_gradients(model))
        after = tree_flatten(model.parameters())
        return {path for path, p in after if not mx.array_equal(p, before[path]).item()}

    first = moved()
    assert "stages.1.conv1.weight" in first
    assert not any(path.startswith("stages.0") for path in first)
    model.stages[0].unfreeze()
    model.stages[1].freeze()
    second = moved()
    assert "stages.0.conv1.weight" in second
    assert not any(path.startswith("stages.1") for path in second)
    assert owners(optimizer)["stages.0.conv1.weight"] in ("muon", "Adam")
    model.stages[1].unfreeze()
    assert "stages.1.conv1.weight" in moved()


def test_shared_module_has_one_state_and_one_gradient():
    model = Shared()
    optimizer = create_optimizer(model, rest_options={"weight_decay": 0.0})
    state = dict(tree_flatten(optimizer.state))
    assert sum(a.shape == model.head.weight.shape for a in state.values()) == 2  # m and v, once
    tokens = mx.array([[1, 2, 3]])
    _, gradients = nn.value_and_grad(model, lambda m: m(tokens).square().mean())(model)
    before = model.head.weight
    optimizer.update(model, gradients)
    assert model.head.weight is model.embedding.weight
    assert not mx.array_equal(model.head.weight, before).item()


def test_shared_module_is_trained_under_its_trainable_name():
    # MLX gives the gradient to the last of two names, unless the module is frozen there.
    model = Shared()
    model.freeze(keys=["head"], recurse=False)
    optimizer = create_optimizer(model)
    assert "embedding.weight" in owners(optimizer)
    assert "head.weight" not in owners(optimizer)
    before = model.embedding.weight
    optimizer.update(model, random_gradients(model))
    assert not mx.array_equal(model.embedding.weight, before).item()


def test_flattened_state_can_be_assigned_back():
    # Flattening loses empty containers, and MLX's optimizers need them.
    model = llama()
    optimizer = create_optimizer(model, "muon", mlx_optimizers.AdamW(1e-3))
    optimizer.update(model, random_gradients(model))
    other = create_optimizer(model, "muon", mlx_optimizers.AdamW(1e-3))
    other.state = tree_unflatten(tree_flatten(optimizer.state))
    assert len(other.plan) == len(optimizer.plan)
    other.update(model, random_gradients(model))
    assert (optimizer.step.item(), other.step.item()) == (1, 2)


def test_paths_with_dots_and_tuples_of_modules_work():
    model = nn.Module()
    model.parts = {"v1.5": nn.Linear(4, 4), "b": nn.Linear(4, 4)}
    model.pair = (nn.Linear(4, 4), nn.Linear(4, 4))  # MLX finds no modules in a tuple
    optimizer = create_optimizer(model)
    optimizer.update(model, random_gradients(model))
    assert [entry.path for entry in optimizer.plan if "v1.5" in entry.path]
    assert not any("pair" in entry.path for entry in optimizer.plan)
    assert all(entry.state_bytes for entry in optimizer.plan)
    assert repr(optimizer.plan) == str(optimizer.plan)


def test_error_names_parameters_added_after_the_optimizer():
    model = Table()
    optimizer = create_optimizer(model)
    model.late = nn.Linear(3, 3)
    before = model.linear1.weight
    with pytest.raises(ValueError, match=r"has no late.weight, late.bias: update that"):
        optimizer.update(model, random_gradients(model))
    assert model.linear1.weight is before
    assert optimizer.step.item() == 0


def test_state_for_other_members_is_refused():
    optimizer = create_optimizer(Table())
    with pytest.raises(ValueError, match="must hold 3 states, one for each member, got 1"):
        optimizer.state = {"states": [{}]}


# Hierarchical reasoning models


def puzzles():
    return model_of(puzzle_embedding=nn.Embedding(10, 4), inner=nn.Linear(4, 3))


def test_hrm_gets_a_main_and_a_puzzle_optimizer():
    model = puzzles()
    optimizers = create_optimizer_for_hrm(model)
    assert list(optimizers) == ["main", "puzzle"]
    main, puzzle = optimizers["main"], optimizers["puzzle"]
    assert (type(main), type(puzzle)) == (AdamW, SignSGD)
    assert main.learning_rate.item() == pytest.approx(1e-4)
    assert puzzle.learning_rate.item() == pytest.approx(1e-2)
    assert main.weight_decay == puzzle.weight_decay == 0.1

    table, weight = model.puzzle_embedding.weight, model.inner.weight
    tokens = mx.array([2, 5])
    loss = lambda m: m.inner(m.puzzle_embedding(tokens)).square().sum()  # noqa: E731
    _, gradients = nn.value_and_grad(model, loss)(model)
    main.update(model, gradients)
    assert mx.array_equal(model.puzzle_embedding.weight, table).item()
    assert not mx.array_equal(model.inner.weight, weight).item()
    weight = model.inner.weight
    puzzle.update(model, gradients)
    assert mx.array_equal(model.inner.weight, weight).item()
    changed = mx.any(model.puzzle_embedding.weight != table, axis=1)
    assert [i for i in range(10) if changed[i].item()] == [2, 5]


def test_hrm_without_a_puzzle_optimizer():
    model = puzzles()
    optimizers = create_optimizer_for_hrm(model, 1e-3, use_separate_puzzle_optimizer=False)
    assert list(optimizers) == ["main"]
    before = model.puzzle_embedding.weight
    optimizers["main"].update(model, random_gradients(model))
    assert not mx.array_equal(model.puzzle_embedding.weight, before).item()
    with pytest.raises(ValueError, match='no parameter has "puzzle" in its path'):
        create_optimizer_for_hrm(Table())
    with pytest.raises(ValueError, match="learning_rate must be in"):
        create_optimizer_for_hrm(puzzles(), lr=-1.0)


def test_error_names_complex_parameters():
    model = model_of(layer=nn.Linear(4, 4), poles=mx.zeros((4, 4), mx.complex64))
    tree = model.trainable_parameters()
    message = r"^poles: complex parameters are not supported: store .* two arrays, or freeze them$"
    for refuse in (lambda: create_optimizer(model), lambda: AdamW(1e-3).update(model, tree)):
        with pytest.raises(ValueError, match=message):
            refuse()
    model.freeze(recurse=False, keys=["poles"])
    assert "poles" not in owners(create_optimizer(model))


# Rates that users set


def small_model(n=8):
    return nn.Sequential(nn.Embedding(20, n), nn.Linear(n, n), nn.RMSNorm(n), nn.Linear(n, 5))


def test_convolutions_count_by_the_matrix_that_they_are():
    def peak(layer):
        layers = [layer() for _ in range(3)]
        model = nn.Sequential(nn.Conv2d(3, 256, 3), *layers, nn.Linear(256, 10))
        return create_optimizer(model, "adamw", total_steps=1000).members[0].peak_rate

    convolutions = peak(lambda: nn.Conv2d(256, 256, 3))
    assert convolutions == peak(lambda: nn.Linear(256, 256))


RISING = mlx_optimizers.linear_schedule(0, 1e-2, 100)
RATIOS = [
    (lambda: {"learning_rate": 0.02, "rest_learning_rate": 0}, 0.0),
    (lambda: {"total_steps": 100, "rest_learning_rate": 0}, 0.0),
    (lambda: {"learning_rate": 0.0}, 0.05),
    (lambda: {"rest": AdamW(0.0)}, 0.0),
    (lambda: {"learning_rate": RISING}, 0.05),
    (lambda: {"hidden": Muon(0.02), "rest": AdamW(warmup_cosine(1e-3, 9))}, 0.05),
    (lambda: {"hidden": OrthoMaxFactor(RISING), "rest": AdamW(1e-3)}, 0.1),
    (lambda: {"hidden": OrthoMaxFactor(0.02), "rest": AdamW(RISING)}, 0.5),
    (lambda: {"rest": "adafactor", "learning_rate": 0.002}, 0.5),
    (lambda: {"hidden": "adafactor"}, 0.1),
]


@pytest.mark.parametrize("step", [0, 10**6])
@pytest.mark.parametrize(("make", "ratio"), RATIOS)
def test_ratio_of_rates_is_kept_if_one_is_zero_or_scheduled(make, ratio, step):
    model = small_model()
    optimizer = create_optimizer(model, **make())
    optimizer.state["states"][0]["step"] = mx.array(step, mx.uint64)
    optimizer.update(model, random_gradients(model))
    optimizer.learning_rate = 0.01
    first, *others = rates(optimizer)
    assert first == pytest.approx(0.01)
    assert others == pytest.approx([0.01 * ratio] * len(others))


@pytest.mark.compiled
def test_rate_set_by_hand_reaches_members_of_mlx_in_a_compiled_step():
    model = small_model()
    optimizer = create_optimizer(model, rest=mlx_optimizers.AdamW(1e-3), total_steps=1000)
    state = [model.state, optimizer.state]
    tokens = mx.arange(8).reshape(2, 4)

    def step():
        grad = nn.value_and_grad(model, lambda: model(tokens).square().mean())
        optimizer.update(model, grad()[1])

    step = mx.compile(step, inputs=state, outputs=state)
    for _ in range(3):
        step()
        mx.eval(state)
    assert rates(optimizer)[1] > 0
    optimizer.learning_rate = 0.0
    step()
    mx.eval(state)
    assert rates(optimizer)[:2] == [0.0, 0.0]


def test_rate_of_the_rest_does_not_become_that_of_matrices_unfrozen_later(recwarn):
    model = small_model()
    model.freeze()
    model.layers[-1].unfreeze()
    optimizer = create_optimizer(model, learning_rate=1e-3)
    assert not recwarn.list
    assert optimizer.learning_rate.item() == pytest.approx(1e-3)
    model.unfreeze()
    optimizer.init(model.trainable_parameters())
    hidden = [e.rate for e in optimizer.plan if e.role == "hidden"]
    assert hidden == pytest.approx([0.02])


@pytest.mark.parametrize("options", [{}, {"total_steps": 10}], ids=["constant", "scheduled"])
def test_rate_can_be_set_in_another_thread(options):
    model = small_model()
    optimizer = create_optimizer(model, **options)
    setting = threading.Thread(target=lambda: setattr(optimizer, "learning_rate", 1e-2))
    setting.start()
    setting.join()
    optimizer.update(model, tree_map(mx.ones_like, model.parameters()))
    mx.eval(model.state, optimizer.state)
    assert rates(optimizer)[0] == pytest.approx(1e-2)


def test_object_gets_the_schedule_of_the_newest_call():
    rest = AdamW(1e-3)
    for steps in (100, 1000):
        create_optimizer(small_model(), rest=rest, total_steps=steps)
        assert str(steps) in repr(rest)
    create_optimizer(small_model(), rest=rest)
    rest.update({}, {})
    assert rest.learning_rate.item() == pytest.approx(1e-3)
    # MLX's Adafactor has no rate to schedule.
    assert create_optimizer(small_model(), rest=mlx_optimizers.Adafactor(), total_steps=100).plan


def test_rate_set_in_the_state_is_used():
    optimizer = create_optimizer(small_model())
    optimizer.state["learning_rate"] = 0.01
    assert rates(optimizer)[0] == pytest.approx(0.01)


# Odd names


def test_names_with_dots_and_brackets():
    model = nn.Module()
    model.parts = {"[x]": nn.Linear(3, 3)}
    rules = {"parts.[x].weight": "adamw"}
    assert create_optimizer(model, rules=rules).plan[0].optimizer == "adamw"
    model.parts = {"a.b": nn.Linear(3, 3), "a": {"b": nn.Linear(3, 3)}}
    gradients = tree_map(mx.ones_like, model.parameters())
    with pytest.raises(ValueError, match=r"two parameters have the path parts\.a\.b\.weight"):
        AdamW().update(model, gradients)


# Names of members, and layers that nobody knows


def test_weights_of_unknown_layers_are_a_warning_if_they_are_many():
    arrays = {"weight": mx.zeros((16, 3, 16)), "bias": mx.zeros((16,))}
    layers = [model_of(**arrays) for _ in range(2)]
    model = nn.Sequential(nn.Conv1d(4, 16, 3), *layers, nn.Linear(16, 3))
    message = r"^84% of the weights .* such as layers\.1\.weight \(16, 3, 16\), and go to rest"
    with pytest.warns(UserWarning, match=message) as warned:
        create_optimizer(model)
    assert len(warned) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = create_optimizer(model, rules={"layers.[12].weight": "conv"}).plan
        assert [e.layout for e in plan if e.shape == (16, 3, 16)] == ["conv", "conv"]
        create_optimizer(ResNet())
        create_optimizer(CASES_BY_NAME["mamba"].build())
        model.layers[1].freeze()
        model.layers[2].freeze()
        create_optimizer(model)
        create_optimizer(model_of(w=mx.zeros((4, 4))))


def test_no_two_members_have_one_name():
    model = CASES_BY_NAME["mamba"].build()
    optimizer = create_optimizer(model, "adamw", "adamw", total_steps=30)
    labels = {e.role: e.optimizer for e in optimizer.plan}
    assert (labels["hidden"], labels["depthwise"]) == ("adamw", "adamw 2")
    objects = create_optimizer(model, AdamW(1e-3), AdamW(2e-3), rules={"*.A_log": AdamW(3e-3)})
    assert [m.label for m in objects.members] == ["AdamW", "AdamW 2", "AdamW 3"]


def test_members_without_parameters_are_not_shown():
    model = large_tables()
    model.freeze()
    model.linear1.unfreeze()
    optimizer = create_optimizer(model)
    assert "0 parameters" not in repr(optimizer)
    assert "no momentum" not in repr(optimizer)
    model.embedding.unfreeze()
    optimizer.update(model, random_gradients(model))
    assert "adamw, no momentum: 1 parameter," in repr(optimizer)


@pytest.mark.parametrize("steps", [30 / 10, np.float32(3), np.int64(3)], ids=str)
def test_steps_may_come_from_a_division(steps):
    exact, given = (create_optimizer(Table(), total_steps=n) for n in (3, steps))
    assert repr(given) == repr(exact)
    assert repr(warmup_cosine(0.1, steps, steps / 3)) == repr(warmup_cosine(0.1, 3, 1))
