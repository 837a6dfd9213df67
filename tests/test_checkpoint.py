"""Checkpoints resume runs exactly, name every mismatch, and refuse damaged files."""

import errno
import fcntl
import functools
import gc
import os
import random
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as mlx_optimizers
import numpy as np
import pytest
from arrays import random_gradients, same, snapshot
from killed_run import EIGHT_BITS, build
from mlx.utils import tree_flatten, tree_map
from models import CASES_BY_NAME, ResNet, Shared, Table, adapted, llama

from mlx_maxfactor import (
    OPTIMIZERS,
    AdamW,
    CheckpointError,
    FrequencyAdaptiveMomentum,
    GuardedOptimizer,
    MaxFactor,
    Muon,
    SignSGD,
    WeightAverage,
    create_optimizer,
    create_optimizer_for_hrm,
    load_checkpoint,
    save_checkpoint,
    warmup_cosine,
)
from mlx_maxfactor.checkpoint import file as sealed_files
from mlx_maxfactor.checkpoint.save_and_load import _Loading, _walk

KILLS = int(os.environ.get("KILLS", "4"))  # KILLS=20 kills 200 times


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.safetensors"


def table_run(*arguments, model=Table, **options):
    """A small model and its routed optimizer."""
    model = model()
    return model, create_optimizer(model, *arguments, **options)


def lora_run(**options):
    return table_run(model=lambda: adapted(llama()), **options)


def trained(model, optimizer, steps=2):
    for seed in range(steps):
        optimizer.update(model, random_gradients(model, seed))
    mx.eval(model.state, optimizer.state)
    return model, optimizer


def saved(path, model, optimizer, steps=2, **extra):
    """Train the model and save both."""
    trained(model, optimizer, steps)
    save_checkpoint(path, model, optimizer, **extra)
    return model, optimizer


def refused(path, model, optimizer, **options):
    """The error of a load, which must change nothing."""
    before, initialized = snapshot(model, optimizer), optimizer._initialized
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(path, model, optimizer, **options)
    assert same(snapshot(model, optimizer), before)
    assert optimizer._initialized == initialized
    return error.value


# Resuming


FEW_BITS = [("muon", {"state_dtype": "int8"}), ("adamw", {"state_dtype": "int4"})]


@pytest.mark.parametrize(("name", "options"), [*((name, {}) for name in OPTIMIZERS), *FEW_BITS])
def test_resumed_run_is_bit_identical(name, options, path):
    model, optimizer, step = build(name, **options)
    for _ in range(12):
        step()
    exact = snapshot(model, optimizer)
    at = random.Random(name).randrange(1, 12)
    model, optimizer, step = build(name, **options)
    for _ in range(at):
        step()
    save_checkpoint(path, model, optimizer)
    model, optimizer, step = build(name, **options)
    mx.random.seed(99)
    load_checkpoint(path, model, optimizer)
    for _ in range(12 - at):
        step()
    assert same(snapshot(model, optimizer), exact)


MATRICES_ONLY = ("muon", "orthomaxfactor")
BARE = {
    **{
        name: (lambda kind=entry.kind: kind())
        for name, entry in OPTIMIZERS.items()
        if name not in MATRICES_ONLY
    },
    "guarded": lambda: GuardedOptimizer(MaxFactor(momentum=0.9, state_dtype=mx.bfloat16)),
    "mlx Adam": lambda: mlx_optimizers.Adam(1e-3),
    "mlx SGD": lambda: mlx_optimizers.SGD(mlx_optimizers.cosine_decay(1e-3, 10), momentum=0.9),
    "mlx Multi": lambda: mlx_optimizers.MultiOptimizer(
        [mlx_optimizers.Muon(1e-2), mlx_optimizers.AdamW(1e-3)], [lambda _, p: p.ndim > 1]
    ),
}


@pytest.mark.parametrize("name", BARE)
def test_load_restores_bare_and_mlx_optimizers_in_place(name, path):
    given = {"epoch": 3, "note": "é", "nested": {"a": [1, None, 2.5]}}
    model, optimizer = saved(path, Table(), BARE[name](), **given)
    exact = snapshot(model, optimizer)
    other, restored = Table(), BARE[name]()
    live = restored.state
    mx.random.seed(5)
    extra = load_checkpoint(path, other, restored)
    assert extra == given
    assert extra.differences == ()
    assert same(snapshot(other, restored), exact)
    if not isinstance(restored, mlx_optimizers.MultiOptimizer):
        assert restored.state is live


@pytest.mark.parametrize("name", ["llama", "whisper_alignment_heads", "resnet", "lora_moe"])
def test_load_restores_whole_models(name, path):
    case = CASES_BY_NAME[name]
    run, other = trained(*table_run(model=case.build)), table_run(model=case.build)
    save_checkpoint(path, *run)
    load_checkpoint(path, *other)
    assert same(snapshot(*other), snapshot(*run))


@pytest.mark.compiled
def test_compiled_step_uses_state_loaded_later(path):
    model, optimizer, _ = build()
    state = [model.state, optimizer.state, mx.random.state]
    x = mx.ones((4, 8), mx.bfloat16)

    def update():
        _, gradients = nn.value_and_grad(model, lambda: model(x).square().mean())()
        optimizer.update(model, gradients)

    run = mx.compile(update, inputs=state, outputs=state)
    points = []
    for _ in range(6):
        run()
        mx.eval(state)
        if not points:
            save_checkpoint(path, model, optimizer)
        points.append(snapshot(model, optimizer))
    load_checkpoint(path, model, optimizer)
    for point in points[1:]:
        run()
        mx.eval(state)
        assert same(snapshot(model, optimizer), point)


@pytest.mark.parametrize("weights", ["all", "trainable"])
def test_shared_module_is_saved_once(weights, path):
    save_checkpoint(path, *table_run(model=Shared), weights=weights)
    names = mx.load(str(path))
    assert "head.weight" in names
    assert "embedding.weight" not in names


@pytest.mark.parametrize("name", CASES_BY_NAME)
def test_weights_are_saved_under_their_mlx_paths(name):
    model = CASES_BY_NAME[name].build()
    assert dict(_walk(model)).keys() == dict(tree_flatten(model.parameters())).keys()


@pytest.mark.parametrize(("make", "weights"), [(table_run, "all"), (lora_run, "trainable")])
def test_load_weights_of_mlx_reads_a_checkpoint(make, weights, path):
    model, _ = saved(path, *make(), weights=weights)
    other, _ = make()
    other.load_weights(str(path), strict=False)  # as mlx_lm's --resume-adapter-file does
    found = dict(tree_flatten(other.trainable_parameters()))
    for name, array in tree_flatten(model.trainable_parameters()):
        assert mx.array_equal(found[name], array), name
    assert all(name.startswith("_run.") for name in set(mx.load(str(path))) - set(found))


# weights="trainable"


def quantized(seed=0, **options):
    mx.random.seed(seed)
    model = adapted(llama(), bits=4, **options)
    # The arrays are so wide that names and the description add little to the file's size.
    for _, module in model.named_modules():
        if "lora_a" in module:
            module.lora_a = mx.random.normal((module.lora_a.shape[0], 256))
            module.lora_b = mx.random.normal((256, module.lora_b.shape[1])) / 100
    mx.eval(model.parameters())
    return model


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dora", [False, True])
def test_qlora_checkpoint_holds_only_trained_arrays_and_state(name, dora, path):
    model = quantized(dora=dora)
    _, optimizer = saved(path, model, create_optimizer(model, name), weights="trainable", done=2)
    arrays = [a for _, a in tree_flatten([model.trainable_parameters(), optimizer.state])]
    assert path.stat().st_size <= 1.05 * sum(array.nbytes for array in arrays)
    other = quantized(dora=dora)
    restored = create_optimizer(other, name)
    assert load_checkpoint(path, other, restored) == {"done": 2}
    assert same(snapshot(other, restored), snapshot(model, optimizer))


def test_different_frozen_base_is_an_error(path):
    model = quantized()
    saved(path, model, create_optimizer(model), weights="trainable")
    other = quantized(seed=1)
    other.load_weights(str(path), strict=False)
    optimizer = create_optimizer(other)
    message = "the frozen weights are not those it was trained on"
    assert message in str(refused(path, other, optimizer))
    assert message in load_checkpoint(path, other, optimizer, strict=False).differences[0]
    full, _ = lora_run()
    full.load_weights(str(path), strict=False)
    assert message in str(refused(path, full, create_optimizer(full)))


def test_one_more_frozen_bias_is_an_error(path):
    model = Table()
    model.embedding.freeze()
    saved(path, model, create_optimizer(model), weights="trainable")
    model.output.freeze()
    with pytest.raises(CheckpointError, match=r"2 of 3 arrays differ \(output.weight, output.bias"):
        load_checkpoint(path, model, create_optimizer(model))


def test_fingerprint_samples_part_of_every_frozen_array():
    from mlx_maxfactor.checkpoint.description import SAMPLE, _fingerprints, _sample

    for shape in [(), (0, 3), (1,), (7, 3), (3, 1), (4096, 512), (512, 4096), (6, 64, 64)]:
        for dtype in (mx.float32, mx.bfloat16, mx.uint32, mx.uint8, mx.bool_):
            x = (mx.random.uniform(shape=shape) * 99).astype(dtype)
            elements = _sample(x).size // dtype.size
            assert min(x.size, SAMPLE // 2) <= elements <= 2 * SAMPLE
            if x.size:
                assert _fingerprints({"x": x}) != _fingerprints({"x": mx.zeros_like(x) + (x == 0)})
    beyond_the_first_column = mx.broadcast_to(mx.arange(4096) > 0, (4096, 4096))
    arrays = {"x": mx.zeros((4096, 4096), mx.bool_)}
    assert _fingerprints(arrays) != _fingerprints({"x": beyond_the_first_column})


def test_running_statistics_are_saved_although_they_are_frozen(path):
    def build():
        mx.random.seed(0)
        return table_run(model=lambda: ResNet(frozen_ends=True))

    model, optimizer = build()
    model(mx.random.normal((4, 8, 8, 3)))
    assert not mx.array_equal(model.bn1.running_mean, mx.zeros(8))
    save_checkpoint(path, model, optimizer, weights="trainable")
    other, restored = build()
    load_checkpoint(path, other, restored)
    assert same(snapshot(other, restored), snapshot(model, optimizer))
    assert "fc.weight" not in mx.load(str(path))


# Rates and schedules


def rate_of(optimizer):
    return pytest.approx(float(optimizer.learning_rate))


RATES = [  # an optimizer, its rate here, the argument, the rate after the load
    (AdamW, 0.01, "built", 0.003),
    (AdamW, 0.02, "built", 0.02),
    (AdamW, 0.02, "file", 0.003),
    (AdamW, 0.01, "here", 0.01),
    (mlx_optimizers.AdamW, 0.02, "built", 0.003),
    (mlx_optimizers.AdamW, 0.02, "here", 0.02),
    (mlx_optimizers.AdamW, 0.02, "file", 0.003),
]


@pytest.mark.parametrize(("kind", "rate", "rates", "used"), RATES)
def test_rate_set_by_hand_is_restored_unless_another_is_asked_for(kind, rate, rates, used, path):
    model, optimizer = trained(Table(), kind(0.01))
    optimizer.learning_rate = 0.003
    for again in (False, True):  # a file that is saved after a load keeps the rate too
        save_checkpoint(path, model, optimizer)
        optimizer = kind(rate)
        notes = load_checkpoint(path, model, optimizer, rates=rates).differences
        assert (rate_of(optimizer), optimizer.step) == (used, 2)
        replaced = "optimizer 0, AdamW: learning_rate is 0.01 in the file, 0.02 here, which is used"
        assert notes == ((replaced,) if (rates, used, again) == ("built", 0.02, False) else ())


def test_rate_set_before_the_first_update_counts_as_the_built_one(path):
    saved(path, Table(), AdamW(0.01))
    optimizer = AdamW(0.01)
    optimizer.learning_rate = 0.05
    load_checkpoint(path, Table(), optimizer)
    assert rate_of(optimizer) == 0.05


def test_each_member_restores_its_own_rate(path):
    model = Table()
    rates = {"learning_rate": 0.02, "rest_learning_rate": 0.004}
    _, optimizer = trained(model, create_optimizer(model, **rates))
    optimizer.learning_rate = 0.01  # the ratio is kept
    save_checkpoint(path, model, optimizer)
    for changed, expected in [
        ({}, [0.01, 0.002, 0.002]),
        ({"rest_learning_rate": 0.003}, [0.01, 0.003, 0.003]),
        ({"learning_rate": 0.05}, [0.05, 0.002, 0.002]),
    ]:
        restored = create_optimizer(model, **rates | changed)
        extra = load_checkpoint(path, model, restored)
        found = [float(member.learning_rate) for member in restored.optimizers]
        assert found == pytest.approx(expected[: len(found)])
        assert bool(extra.differences) == bool(changed)


def two_members(rate):
    members = [AdamW(rate), AdamW(2 * rate)]
    return Table(), mlx_optimizers.MultiOptimizer(members, [lambda *_: True])


RATE_DIFFERENCES = [
    (lambda rate: table_run(learning_rate=rate), ["OrthoMaxFactor", "AdamW", "AdamW"]),
    (lambda rate: lora_run(learning_rate=rate), ["OrthoMaxFactor"]),
    (lambda rate: lora_run(learning_rate=warmup_cosine(rate, 9)), ["OrthoMaxFactor"]),
    (two_members, ["AdamW", "AdamW"]),
]


@pytest.mark.parametrize(("make", "kinds"), RATE_DIFFERENCES)
def test_rate_differences_name_each_used_member(make, kinds, path):
    save_checkpoint(path, *make(0.02))
    lines = load_checkpoint(path, *make(0.04), strict=False).differences
    found = [line.partition(":")[0] for line in lines]
    assert found == [f"optimizer {i}, {kind}" for i, kind in enumerate(kinds)]


@pytest.mark.parametrize("rates", ["built", "file"])
def test_error_for_a_new_schedule_suggests_rates_here(rates, path):
    first, second = (warmup_cosine(rate, 10, 1) for rate in (0.1, 0.2))
    saved(path, *table_run(learning_rate=first))
    run = table_run(learning_rate=second)
    assert 'rates="here"' in str(refused(path, *run, rates=rates))
    load_checkpoint(path, *run, rates="here")


class Halving:
    """A schedule that is an object and cannot take an array of steps."""

    def __init__(self, rate):
        self.rate = rate

    def __call__(self, step):
        return self.rate if step < 1000 else self.rate / 2


def exponential(rate, step):
    return rate * 0.99**step


SCHEDULES = {
    "partial": lambda rate=0.1: functools.partial(exponential, rate),
    "object": lambda rate=0.1: Halving(rate),
    "number": lambda rate=0.1: lambda _: rate,
    "cosine": lambda rate=0.1: mlx_optimizers.cosine_decay(rate, 100),
    "ours": lambda rate=0.1: warmup_cosine(rate, 100, 10),
}


@pytest.mark.parametrize("kind", [AdamW, mlx_optimizers.AdamW])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_compared_by_how_they_were_made(name, kind, path):
    make = SCHEDULES[name]
    # MLX's optimizers cannot make a step with a schedule that returns a Python number.
    model, _ = saved(path, Table(), kind(make()), steps=int(kind is AdamW))
    load_checkpoint(path, model, kind(make()))
    other = warmup_cosine(0.1, 101, 10)
    for schedule in [other] + [make(0.101)] * (name in ("cosine", "ours")):
        with pytest.raises(CheckpointError, match=r"AdamW: learning_rate schedule is .* in the fi"):
            load_checkpoint(path, model, kind(schedule))
    optimizer = kind(other)
    load_checkpoint(path, model, optimizer, rates="here")
    assert rate_of(optimizer) == float(other(mx.array(0)))


@pytest.mark.parametrize("name", ["mlx Adam", "mlx SGD", "mlx Multi", "guarded"])
def test_checkpoint_saved_before_the_first_step_loads(name, path):
    model, optimizer = Table(), BARE[name]()
    save_checkpoint(path, model, optimizer)
    restored = BARE[name]()
    load_checkpoint(path, Table(), restored)
    trained(model, optimizer)
    load_checkpoint(path, Table(), restored)


# Mismatches


def narrow_table():
    model = Table()
    model.linear1 = nn.Linear(64, 100)
    return model


def guarded_adamw(**options):
    return Table(), GuardedOptimizer(AdamW(), **options)


def adamw(**options):
    return Table(), AdamW(**options)


def bands(**options):
    return table_run("maxfactor", momentum=FrequencyAdaptiveMomentum(**options))


def adamw_twice(**options):
    return table_run(AdamW(), AdamW(), **options)


# What is saved, what it is loaded into, and the first difference
MISFITS = [
    (table_run, lambda: table_run("muon"), "OrthoMaxFactor in the file, Muon"),
    (table_run, lambda: table_run(rules={"head": AdamW(1e-3)}), "none in the file, AdamW here"),
    (table_run, lambda: table_run(momentum=0), "momentum is 0.8 in the file, 0.0 here"),
    (bands, lambda: bands(bands=4), "momentum is .*bands=10.* in the file, .*bands=4"),
    (adamw, lambda: adamw(betas=(0.8, 0.9), eps=1e-3), "AdamW: betas .*\n.*AdamW: eps is 1e-08 "),
    (table_run, lambda: table_run(learning_rate=warmup_cosine(0.1, 10, 1)), "rate schedule is"),
    (
        table_run,
        lambda: table_run(rules={"head": "maxfactor"}),
        r"plan, output.weight: adamw \(10, 64\), head, b.* in the file, maxfactor \(10, 64\), head",
    ),
    (
        adamw_twice,
        lambda: adamw_twice(rules={"output.weight": "hidden"}),
        r"output.weight: AdamW 2 \(10, 64\), head, batched in .* AdamW \(10, 64\), hidden, batched",
    ),
    (table_run, lambda: table_run(model=narrow_table), r"linear1.bias: .* \(128,\) in .*\(100,\)"),
    (table_run, lambda: table_run(model=llama), "lm_head.weight: missing"),
    (table_run, lambda: (Table(), MaxFactor()), "AdamW in the file, none here"),
    (lambda: (Table(), mlx_optimizers.AdamW(1e-3)), adamw, "mlx.optimizers.AdamW .* mlx_maxfactor"),
    (table_run, lambda: table_run(max_grad_norm=1.0), "max_grad_norm is None"),
    (guarded_adamw, lambda: guarded_adamw(max_grad_norm=1.0), "None in the file, 1.0 here"),
]


@pytest.mark.parametrize(("there", "here", "message"), MISFITS)
def test_mismatch_is_named_and_nothing_changes(there, here, message, path):
    saved(path, *there())
    error = refused(path, *here())
    assert re.search(message, "\n".join(error.differences), re.MULTILINE)
    assert 'rates="here", or load what fits with strict=False' in str(error)


def test_message_shows_ten_differences_and_the_error_holds_all(path):
    saved(path, *lora_run(), weights="trainable")
    other, _ = lora_run()
    for _, module in other.named_modules():
        if "lora_a" in module:
            module.lora_a = mx.concatenate([module.lora_a] * 2, axis=1)
            module.lora_b = mx.concatenate([module.lora_b] * 2, axis=0)
        elif isinstance(module, nn.Linear):
            module.weight = module.weight + 1
    error = refused(path, other, create_optimizer(other, weight_decay=0.5))
    first, *lines = str(error).splitlines()
    assert first.endswith("does not fit this model and optimizer:")
    assert lines[:10] == [f"  {line}" for line in error.differences[:10]]
    assert lines[10] == f"  and {len(error.differences) - 10} more"
    assert len(lines) == 12
    kinds = ["optimizer 0", "the frozen weights", "plan, model.", "model."]
    at = [next(i for i, d in enumerate(error.differences) if d.startswith(kind)) for kind in kinds]
    assert at == sorted(at)


def test_another_dtype_is_a_difference(path):
    saved(path, Table(), AdamW(0.01))
    narrow, restored = Table(), AdamW(0.01)
    narrow.set_dtype(mx.bfloat16)
    message = str(refused(path, narrow, restored))
    assert "output.bias: float32 (10,) in the file, bfloat16 (10,) here" in message
    message = str(refused(path, narrow, restored, strict=False))
    assert "holds no weight that fits this model" in message


def test_state_of_another_optimizer_class_is_not_loaded(path):
    model, _ = saved(path, Table(), mlx_optimizers.SGD(0.5, momentum=0.9))
    other = mlx_optimizers.Muon(0.01)  # its state has the same names and shapes
    extra = load_checkpoint(path, model, other, strict=False)
    assert extra.differences[0] == "optimizer 0: SGD in the file, Muon here"
    assert rate_of(other) == 0.01
    assert not mx.any(other.state["output"]["weight"]["v"])


def test_strict_false_loads_matching_arrays_and_returns_the_differences(path):
    model, _ = saved(path, *table_run(), epoch=2)
    other, restored = table_run(model=narrow_table)
    extra = load_checkpoint(path, other, restored, strict=False)
    assert extra == {"epoch": 2}
    assert any("linear1.weight" in difference for difference in extra.differences)
    assert mx.array_equal(other.output.weight, model.output.weight).item()
    assert other.linear1.weight.shape == (100, 64)
    assert restored.step.item() == 2


MISTAKES = {
    "swapped": (lambda p, m, o: (p, o, m), "a model and an MLX optimizer: model is a Routed"),
    "a state": (lambda p, m, o: (p, m, o.state), "an MLX optimizer: optimizer is a _State"),
    "parameters": (lambda p, m, o: (p, m.parameters(), o), "model is a dict"),
    "a class": (lambda p, m, o: (p, m, AdamW), "optimizer is a type"),
    "path last": (lambda p, m, o: (m, o, p), "the arguments are a path, a model and .* is a Table"),
    "a number": (lambda p, m, o: (3, m, o), "path is a int"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_wrong_arguments_give_clear_errors(name, path):
    mistake, message = MISTAKES[name]
    arguments = mistake(path, *table_run())
    for call in (save_checkpoint, load_checkpoint):
        with pytest.raises(CheckpointError, match=message):
            call(*arguments)


def test_unknown_choices_are_refused(path):
    with pytest.raises(ValueError, match="weights must be one of 'all', 'trainable', got 'some'"):
        save_checkpoint(path, *table_run(), weights="some")
    with pytest.raises(ValueError, match="rates must be one of 'built', 'file', 'here', got 'new'"):
        load_checkpoint(path, *table_run(), rates="new")


def test_numpy_and_mlx_scalars_are_saved_as_numbers(path):
    scalars = [np.float32(0.5), np.int64(7), np.bool_(True), np.array(3), mx.array(0.25)]
    scalars += [mx.array(9, mx.uint64), mx.array(1.5, mx.bfloat16)]
    save_checkpoint(path, *tiny(), loss=np.float32(2.5), all=scalars)
    assert load_checkpoint(path, *tiny()) == {"loss": 2.5, "all": [0.5, 7, True, 3, 0.25, 9, 1.5]}


def test_extra_that_json_cannot_hold_is_refused_and_the_old_file_is_kept(path):
    kept = {"model": "small", "path": "here", "optimizer": "ours", "a": {"1": "x", "2": "y"}}
    save_checkpoint(path, *tiny(), **kept)
    nested: list = []
    for _ in range(100_000):
        nested = [nested]
    for value in (object(), np.zeros(2), mx.zeros(2), {1, 2}, nested, 10**5000, np.longdouble(1)):
        with pytest.raises(CheckpointError, match="extra must be JSON values, and 'a' is not: "):
            save_checkpoint(path, *tiny(), a=value)
    assert load_checkpoint(path, *tiny()) == kept
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.fixture
def no_collector():
    """Without Python's cycle collector, a reference cycle would keep a second model in memory."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
def test_loading_needs_extra_memory_for_one_array(path):
    def build():
        model = nn.Sequential(*[nn.Linear(256, 256) for _ in range(16)])
        optimizer = create_optimizer(model, "adamw")
        mx.eval(model.parameters(), optimizer.state)
        return model, optimizer

    model, optimizer = saved(path, *build())
    largest, total = model.layers[0].weight.nbytes, path.stat().st_size
    for live in ((model, optimizer), build()):
        mx.synchronize()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        load_checkpoint(path, *live)
        # One new array while the old one still exists, and some scalars in MLX's pages.
        assert mx.get_peak_memory() - before < 2 * largest + 100_000 < total / 10
        assert mx.get_active_memory() - before < 100_000


def test_file_truncated_during_load_is_an_error(path, monkeypatch):
    model, optimizer = saved(path, Table(), AdamW(0.01))
    check = _Loading.check

    def check_and_truncate(*arguments):
        result = check(*arguments)
        os.truncate(path, path.stat().st_size // 2)
        return result

    monkeypatch.setattr(_Loading, "check", check_and_truncate)
    with pytest.raises(CheckpointError, match="half loaded, so load it again"):
        load_checkpoint(path, model, optimizer)


def test_two_arrays_with_the_same_name_are_refused(path):
    model = nn.Module()
    model.layers = {"a.b": mx.ones(3), "a": {"b": mx.zeros(3)}}
    with pytest.raises(CheckpointError, match=r"two arrays are called 'layers.a.b'"):
        save_checkpoint(path, model, AdamW())


def test_rates_here_continues_the_schedule_after_a_saved_rate_set_by_hand(path):
    make = lambda: AdamW(warmup_cosine(0.05, 10, 2))  # noqa: E731
    model, optimizer = trained(Table(), make(), steps=1)
    optimizer.learning_rate = 0.01
    save_checkpoint(path, model, optimizer)
    other = make()
    load_checkpoint(path, model, other, rates="here")
    other.update(model, model.trainable_parameters())
    assert rate_of(other) == pytest.approx(0.025)


def test_file_is_synced_before_it_is_renamed(path, monkeypatch):
    calls = []
    monkeypatch.delattr(fcntl, "F_FULLFSYNC", raising=False)  # macOS uses this instead of fsync
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, n=name, r=real: (calls.append(n), r(*a))[1])
    save_checkpoint(path, Table(), AdamW())
    assert calls.index("fsync") < calls.index("replace")


def test_shared_module_trained_under_its_first_name_is_saved(path):
    model = nn.Module()
    model.first, model.between = nn.Linear(4, 4, bias=False), nn.Linear(4, 4)
    model.last = model.first
    model._no_grad |= {"between", "last"}
    assert [name for name, _ in tree_flatten(model.trainable_parameters())] == ["first.weight"]
    save_checkpoint(path, model, create_optimizer(model), weights="trainable")
    assert "last.weight" in mx.load(str(path))


# Damage


def test_truncated_and_bit_flipped_files_are_refused(path):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model, optimizer = saved(path, model, create_optimizer(model), epoch=1)
    whole, before = path.read_bytes(), snapshot(model, optimizer)
    dice = random.Random(0)
    for i in range(1000):
        damaged = bytearray(whole)
        if i % 4 == 0:
            del damaged[dice.randrange(len(damaged)) :]
        else:
            damaged[dice.randrange(len(damaged))] ^= 1 << dice.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError):
            load_checkpoint(path, model, optimizer, strict=i % 2 == 0)
    assert same(snapshot(model, optimizer), before)


@pytest.mark.parametrize(
    "header",
    [b"", b"{}" * 50, b"[]", b"[" * 200_000, b"\xff" * 100, b'{"__metadata__": "\\ud800"}'],
)
def test_files_that_are_not_checkpoints_are_refused(header, path):
    for content in (header, len(header).to_bytes(8, "little") + header):
        path.write_bytes(content)
        refused(path, *table_run())


def test_missing_files_plain_weights_and_other_formats_have_their_own_errors(path):
    model, optimizer = table_run()
    assert "cannot be read: No such file" in str(refused(path, model, optimizer))
    assert "cannot be read: Is a directory" in str(refused(path.parent, model, optimizer))
    weights = dict(tree_flatten(model.parameters()))
    for metadata in (None, {"format": "mlx"}, {"format": "pt"}):
        mx.save_safetensors(str(path), weights, metadata)
        with pytest.raises(CheckpointError, match=r"holds weights alone.* use model.load_weights"):
            load_checkpoint(path, model, optimizer)
    mx.save_safetensors(str(path), weights, {"format": "9", "run": "{}", "checksum": "?"})
    message = "of format '9', and this version reads 4: load it with the version of"
    assert message in str(refused(path, model, optimizer))


def tiny():
    mx.random.seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model.layers[0].freeze(keys="bias")
    schedule = warmup_cosine(0.1, 10, 1)
    return model, create_optimizer(model, learning_rate=schedule, state_dtype="float32")


@pytest.mark.parametrize(
    "key", [mx.zeros((2, 1), mx.uint32), mx.array([1, 2]), mx.zeros(1, mx.uint64)]
)
def test_random_key_of_another_dtype_or_shape_is_refused(key, path):
    saved(path, *tiny())
    arrays, metadata = mx.load(str(path), return_metadata=True)
    del metadata["checksum"]
    sealed_files.write(path, arrays | {"_run.random": key}, metadata)
    assert "its random key is missing" in str(refused(path, *tiny(), strict=False))


# Kills


@pytest.mark.processes
def test_run_killed_at_random_moments_equals_an_uninterrupted_run(tmp_path):
    path, dice, steps, kills = tmp_path / "run.safetensors", random.Random(0), 2000, 0
    script = [sys.executable, str(Path(__file__).parent / "killed_run.py"), str(path)]
    model, optimizer, step = build(**EIGHT_BITS)
    seen = [0]
    while kills < 10 * KILLS:
        child = subprocess.Popen([*script, str(steps)], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n", f"after {kills} kills"
        # Wait longer on a busy machine, so that some kills come after the first save.
        time.sleep(dice.uniform(0.0, 0.05) * max(1.0, kills / (seen[-1] + 1)))
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        kills += 1
        if path.exists():
            seen.append(load_checkpoint(path, model, optimizer)["done"])
            assert seen[-1] >= seen[-2], "an older state came back"
    assert seen[-1] > KILLS, "the kills came before any step"
    resumed = snapshot(model, optimizer)
    model, optimizer, step = build(**EIGHT_BITS)
    for _ in range(seen[-1]):
        step()
    assert same(snapshot(model, optimizer), resumed)


# File system errors


def raising(error):
    """A function that raises the error."""

    def fail(*_, **__):
        raise error

    return fail


@pytest.mark.parametrize("code", ["ENOTSUP", "EINVAL", "ENOTTY", "EOPNOTSUPP"])
@pytest.mark.parametrize("also_fsync", [False, True])
def test_save_falls_back_to_fsync_without_full_sync(code, also_fsync, path, monkeypatch):
    refuse, synced = raising(OSError(getattr(errno, code), "refused")), []

    def fsync(descriptor):
        synced.append(descriptor)
        if also_fsync and code != "ENOTTY":
            refuse()

    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", refuse)
    monkeypatch.setattr(os, "fsync", fsync)
    saved(path, *tiny(), epoch=1)
    assert synced
    assert load_checkpoint(path, *tiny()) == {"epoch": 1}


@pytest.mark.parametrize("code", ["EIO", "ENOSPC"])
@pytest.mark.parametrize("macos", [False, True])
def test_disk_failure_is_an_error_and_keeps_the_old_file(code, macos, path, monkeypatch):
    model, optimizer = saved(path, *tiny(), epoch=1)
    fail = raising(OSError(getattr(errno, code), "the disk fails"))
    monkeypatch.delattr(fcntl, "F_FULLFSYNC", raising=False)
    if macos:
        monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
        monkeypatch.setattr(fcntl, "fcntl", fail)
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(CheckpointError, match=r"was not written: .*the disk fails"):
        save_checkpoint(path, model, optimizer, epoch=2)
    monkeypatch.undo()
    assert load_checkpoint(path, *tiny()) == {"epoch": 1}
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_unusable_path_gives_one_clear_error(tmp_path, monkeypatch):
    model, optimizer = trained(*tiny())
    (tmp_path / "file").write_text("x")
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.chdir(tmp_path)
    for place, message in {
        ".": r"^\. is a folder: name a file in it$",
        tmp_path: "is a folder: name a file in it$",
        tmp_path / "pipe": "is a device or a pipe: name a file$",
        tmp_path / "file" / "run.safetensors": "was not written: ",
        tmp_path / "none" / "run.safetensors": "was not written: folder .*none does not exist$",
        tmp_path / ("x" * 300): "was not written: .*File name too long",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            save_checkpoint(place, model, optimizer)
    with pytest.raises(CheckpointError, match="cannot be read: Not a directory"):
        load_checkpoint(tmp_path / "file" / "run.safetensors", model, optimizer)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "pipe"]
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("name", ["last", "x" * 240 + ".safetensors"])
def test_file_name_can_be_long_and_needs_no_extension(name, tmp_path):
    save_checkpoint(str(tmp_path / name), *trained(*tiny()), epoch=1)
    assert load_checkpoint(str(tmp_path / name), *tiny()) == {"epoch": 1}


def test_cleanup_error_does_not_hide_the_first_error(path, monkeypatch):
    monkeypatch.setattr(os, "replace", raising(OSError(errno.EIO, "the first error")))
    monkeypatch.setattr(Path, "unlink", raising(PermissionError("the second error")))
    with pytest.raises(CheckpointError, match="the first error"):
        saved(path, *tiny())


def test_save_follows_a_symlink_and_keeps_the_file_mode(tmp_path):
    target, link = tmp_path / "data" / "run.safetensors", tmp_path / "latest.safetensors"
    target.parent.mkdir()
    model, optimizer = saved(target, *tiny(), epoch=1)
    target.chmod(0o600)
    link.symlink_to(target)
    save_checkpoint(link, model, optimizer, epoch=2)
    assert link.is_symlink()
    assert target.stat().st_mode & 0o777 == 0o600
    assert load_checkpoint(target, *tiny()) == {"epoch": 2}


def test_header_too_large_for_mlx_is_refused_and_keeps_the_old_file(path, monkeypatch):
    model, optimizer = saved(path, *tiny(), epoch=1)
    monkeypatch.setattr(sealed_files, "LARGEST_HEADER", 10_000)
    with pytest.raises(CheckpointError, match="take 0 MB, and MLX reads at most 0: keep what is"):
        save_checkpoint(path, model, optimizer, history=list(range(5000)))
    assert load_checkpoint(path, *tiny()) == {"epoch": 1}


def test_several_threads_can_save_to_one_path(path):
    arrays = {"w": mx.arange(100_000)}
    mx.eval(arrays)
    metadata = {"format": "4", "run": "{}"}

    def save(i):
        sealed_files.write(path, dict(arrays), metadata | {"extra": f"{i}" * 1000})
        sealed_files.read(path, ("4",))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(save, range(8)))  # raises the errors of the threads


def test_new_optimizer_works_in_another_thread(path):
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 3))
    mx.eval(model.state)
    optimizer = create_optimizer(model, rounding="stochastic", skip_nonfinite=True)
    hrm = create_optimizer_for_hrm(model, use_separate_puzzle_optimizer=False)["main"]

    def step(optimizer):
        gradients = tree_map(mx.ones_like, model.trainable_parameters())
        optimizer.update(model, gradients)
        mx.eval(model.state, optimizer.state)
        save_checkpoint(path, model, optimizer)
        return int(optimizer.step)

    with ThreadPoolExecutor(1) as pool:
        assert list(pool.map(step, (optimizer, hrm))) == [1, 1]


# What users do


def gradual(make):
    """A model whose head is trained first and frozen when the body is trained."""
    mx.random.seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    model.freeze()
    model.layers[2].unfreeze()
    return model, make(model)


def freeze_head(model):
    model.layers[2].freeze()
    model.layers[0].unfreeze()


GRADUAL = {
    "routed": create_optimizer,
    "bare": lambda _: AdamW(1e-2),
    "without state": lambda _: SignSGD(1e-2),
    "mlx": lambda _: mlx_optimizers.AdamW(1e-2),
}


@pytest.mark.parametrize("name", ["routed", "bare", "without state"])
def test_trained_weights_that_were_frozen_again_are_saved(name, path):
    make = GRADUAL[name]  # MLX's optimizers fail when layers are unfrozen
    model, optimizer = trained(*gradual(make))
    freeze_head(model)
    saved(path, model, optimizer, weights="trainable")
    other, again = gradual(make)
    again.init(other.trainable_parameters())
    freeze_head(other)
    load_checkpoint(path, other, again)
    assert mx.array_equal(model.layers[2].weight, other.layers[2].weight).item()


@pytest.mark.parametrize("make", GRADUAL.values(), ids=GRADUAL)
def test_save_right_after_unfreezing_loads(make, path):
    model, optimizer = trained(*gradual(make))
    model.unfreeze()
    save_checkpoint(path, model, optimizer)
    other, again = gradual(make)
    other.unfreeze()
    load_checkpoint(path, other, again)


class OddState(SignSGD):
    """Its state holds arrays in a tuple, and a number of Python's."""

    def init_single(self, parameter, state, layout=None):
        super().init_single(parameter, state)
        state["moments"] = (mx.zeros(parameter.shape), mx.zeros(parameter.shape))
        state["scale"] = 1.0

    def apply_single(self, gradient, parameter, state, layout=None):
        m, v = state["moments"]
        state["moments"] = (0.5 * m + gradient, v + 1)
        return parameter - state["scale"] * m


def test_tuples_and_numbers_in_a_state_are_restored(path):
    def make():
        mx.random.seed(0)
        return nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 2)), OddState(0.1)

    model, _ = trained(*saved(path, *make()))
    other, again = make()
    load_checkpoint(path, other, again)
    assert isinstance(again.state["layers"][0]["weight"]["scale"], float)
    trained(other, again)
    assert mx.array_equal(model.layers[0].weight, other.layers[0].weight).item()


def test_file_replaced_while_it_is_read_is_read_again(tmp_path, monkeypatch):
    model, optimizer = nn.Linear(3, 2), SignSGD()
    path = tmp_path / "run.safetensors"
    for i in range(2):
        model.weight = mx.full((2, 3), i)
        save_checkpoint(tmp_path / f"{i}.safetensors", model, optimizer, epoch=i)
    (tmp_path / "0.safetensors").rename(path)
    checksum = sealed_files._checksum

    def replaced_meanwhile(*arguments):
        if (tmp_path / "1.safetensors").exists():
            (tmp_path / "1.safetensors").rename(path)
        return checksum(*arguments)

    monkeypatch.setattr(sealed_files, "_checksum", replaced_meanwhile)
    assert load_checkpoint(path, model, optimizer) == {"epoch": 1}
    assert model.weight[0, 0].item() == 1


def test_other_averages_and_functions_are_differences(path):
    def one(x):
        return x

    def two(x):
        return x

    model = nn.Linear(6, 6, bias=False)
    average = WeightAverage(model, 0.99, start=100)
    save_checkpoint(path, model, Muon(method=one), average=average)
    load_checkpoint(path, model, Muon(method=one), average=WeightAverage(model, 0.99, start=100))
    with pytest.raises(CheckpointError, match=r"average, WeightAverage: decay is 0\.99 in"):
        load_checkpoint(path, model, Muon(method=one), average=WeightAverage(model, start=100))
    with pytest.raises(CheckpointError, match=r"method is .*one' in the file, .*two' here"):
        load_checkpoint(path, model, Muon(method=two), average=average)
