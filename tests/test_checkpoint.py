"""Checkpoints: exact resumption, every mismatch named, damage noticed, kills survived."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as mlx_optimizers
import numpy as np
import pytest
from killed_run import EIGHT_BITS, build
from mlx.utils import tree_flatten, tree_map
from models import CASES, Shared, Table, llama

from mlx_maxfactor import (
    OPTIMIZERS,
    AdamW,
    CheckpointError,
    GuardedOptimizer,
    MaxFactor,
    Muon,
    create_optimizer,
    load_checkpoint,
    save_checkpoint,
    warmup_cosine,
)


def snapshot(model, optimizer):
    tree = {"model": model.parameters(), "optimizer": optimizer.state}
    arrays = {path: a.astype(mx.float32) for path, a in tree_flatten(tree)}
    arrays["random"] = mx.array(mx.random.state[0])
    return {path: np.array(a) for path, a in arrays.items()}


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[path], b[path]) for path in a)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.safetensors"


def trained(model, optimizer, steps=2):
    for seed in range(steps):
        mx.random.seed(seed)
        gradients = tree_map(lambda p: mx.random.normal(p.shape), model.trainable_parameters())
        optimizer.update(model, gradients)
    mx.eval(model.state, optimizer.state)
    return model, optimizer


# Resuming


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_is_bit_identical(name, path):
    model, optimizer, step = build(name)
    for _ in range(12):
        step()
    exact = snapshot(model, optimizer)
    at = random.Random(name).randrange(1, 12)
    model, optimizer, step = build(name)
    for _ in range(at):
        step()
    save_checkpoint(path, model, optimizer)
    model, optimizer, step = build(name)
    mx.random.seed(99)
    load_checkpoint(path, model, optimizer)
    for _ in range(12 - at):
        step()
    assert same(snapshot(model, optimizer), exact)


BARE = {
    **{name: (lambda kind=kind: kind()) for name, kind in OPTIMIZERS.items() if name != "muon"},
    "guarded": lambda: GuardedOptimizer(MaxFactor(momentum=0.9, state_dtype=mx.bfloat16)),
    "mlx Adam": lambda: mlx_optimizers.Adam(1e-3),
    "mlx SGD": lambda: mlx_optimizers.SGD(mlx_optimizers.cosine_decay(1e-3, 10), momentum=0.9),
    "mlx Multi": lambda: mlx_optimizers.MultiOptimizer(
        [mlx_optimizers.Muon(1e-2), mlx_optimizers.AdamW(1e-3)], [lambda _, p: p.ndim > 1]
    ),
}


@pytest.mark.parametrize("name", BARE)
def test_bare_and_mlx_optimizers_come_back_into_live_objects(name, path):
    model, optimizer = trained(Table(), BARE[name]())
    save_checkpoint(path, model, optimizer, epoch=3, note="é", nested={"a": [1, None, 2.5]})
    exact = snapshot(model, optimizer)
    other, restored = Table(), BARE[name]()
    live = (
        restored.state if "Multi" not in type(restored).__name__ else restored.optimizers[0].state
    )
    mx.random.seed(5)
    extra = load_checkpoint(path, other, restored)
    assert extra == {"epoch": 3, "note": "é", "nested": {"a": [1, None, 2.5]}}
    assert extra.differences == ()
    assert same(snapshot(other, restored), exact)
    if not isinstance(restored, mlx_optimizers.MultiOptimizer):
        assert restored.state is live


@pytest.mark.parametrize("name", ["llama", "whisper_alignment_heads", "resnet", "lora_moe"])
def test_whole_models_come_back(name, path):
    case = next(case for case in CASES if case.name == name)
    model = case.build()
    _, optimizer = trained(model, create_optimizer(model))
    save_checkpoint(path, model, optimizer)
    other = case.build()
    restored = create_optimizer(other)
    load_checkpoint(path, other, restored)
    assert same(snapshot(other, restored), snapshot(model, optimizer))


def test_a_step_compiled_before_the_load_sees_it(path):
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


def test_a_shared_module_is_kept_once(path):
    model = Shared()
    save_checkpoint(path, model, create_optimizer(model))
    names = mx.load(str(path))
    assert "head.weight" in names
    assert "embedding.weight" not in names


# What does not fit


def widened():
    model = Table()
    model.linear1 = nn.Linear(64, 100)
    return model


MISFITS = {
    "another optimizer": (
        Table,
        lambda m: create_optimizer(m, "muon"),
        "MaxFactor in the file, Muon",
    ),
    "one member more": (
        Table,
        lambda m: create_optimizer(m, rules={"head": AdamW(1e-3)}),
        "none in the file, AdamW here",
    ),
    "an option": (Table, lambda m: create_optimizer(m, weight_decay=0.5), "weight_decay is 0.01"),
    "momentum": (
        Table,
        lambda m: create_optimizer(m, momentum=0.8),
        r"linear1.weight.m: missing in the file",
    ),
    "a schedule": (
        Table,
        lambda m: create_optimizer(m, learning_rate=warmup_cosine(0.1, 10, 1)),
        "learning_rate schedule",
    ),
    "a plan": (
        Table,
        lambda m: create_optimizer(m, rules={"head": "maxfactor"}),
        "plan, output.weight: .*'adamw'.*'maxfactor'",
    ),
    "a shape": (
        widened,
        create_optimizer,
        r"linear1.bias: float32 \(128,\) in the file, .*\(100,\)",
    ),
    "another model": (llama, create_optimizer, "lm_head.weight: missing in the file"),
    "a bare optimizer": (Table, lambda m: MaxFactor(), "AdamW in the file, none here"),
    "mlx's own": (Table, lambda m: mlx_optimizers.Adam(1e-3), "MaxFactor in the file, Adam here"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_fit_is_named_and_nothing_changes(name, path):
    model = Table()
    save_checkpoint(path, *trained(model, create_optimizer(model)))
    make, optimize, message = MISFITS[name]
    model = make()
    optimizer = optimize(model)
    before, initialized = snapshot(model, optimizer), optimizer._initialized
    with pytest.raises(CheckpointError, match=message) as error:
        load_checkpoint(path, model, optimizer)
    assert "strict=False" in str(error.value)
    assert same(snapshot(model, optimizer), before)
    assert optimizer._initialized == initialized


def test_another_dtype_is_named(path):
    model = Table()
    save_checkpoint(path, *trained(model, create_optimizer(model)))
    model.set_dtype(mx.bfloat16)
    with pytest.raises(CheckpointError, match=r"output.bias: float32 .*, bfloat16"):
        load_checkpoint(path, model, create_optimizer(model))


def test_without_strict_what_fits_is_loaded_and_the_rest_returned(path):
    model = Table()
    model, optimizer = trained(model, create_optimizer(model))
    save_checkpoint(path, model, optimizer, epoch=2)
    other = widened()
    restored = create_optimizer(other)
    extra = load_checkpoint(path, other, restored, strict=False)
    assert extra == {"epoch": 2}
    assert any("linear1.weight" in difference for difference in extra.differences)
    assert mx.array_equal(other.output.weight, model.output.weight).item()
    assert other.linear1.weight.shape == (100, 64)
    assert restored.step.item() == 2


def test_what_cannot_be_written_is_said_and_the_old_file_stays(path):
    model = Table()
    model, optimizer = trained(model, create_optimizer(model))
    save_checkpoint(path, model, optimizer, epoch=1)
    with pytest.raises(CheckpointError, match="extra must be JSON values"):
        save_checkpoint(path, model, optimizer, epoch=object())
    assert load_checkpoint(path, model, optimizer) == {"epoch": 1}
    with pytest.raises(CheckpointError, match="was not written"):
        save_checkpoint(path.parent / "missing" / "run.safetensors", model, optimizer)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_any_name_will_do(tmp_path):
    model = Table()
    optimizer = create_optimizer(model, Muon(), AdamW())
    save_checkpoint(str(tmp_path / "last"), model, optimizer, a=1)
    assert load_checkpoint(str(tmp_path / "last"), model, optimizer) == {"a": 1}


# Damage


def test_500_truncations_and_flips_are_refused(path):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model, optimizer = trained(model, create_optimizer(model))
    save_checkpoint(path, model, optimizer, epoch=1)
    whole, before = path.read_bytes(), snapshot(model, optimizer)
    dice = random.Random(0)
    for i in range(500):
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
    "content", [b"", b"\0" * 8, b"{}" * 50, b"\xff" * 100, b"\x02" + b"\0" * 7 + b"[]"]
)
def test_other_files_are_refused(content, path):
    path.write_bytes(content)
    model = Table()
    with pytest.raises(CheckpointError):
        load_checkpoint(path, model, create_optimizer(model))


def test_weights_alone_and_missing_files_are_refused(path):
    model = Table()
    with pytest.raises(CheckpointError, match="does not exist"):
        load_checkpoint(path, model, create_optimizer(model))
    model.save_weights(str(path))
    with pytest.raises(CheckpointError, match="use model.load_weights"):
        load_checkpoint(path, model, create_optimizer(model))


# Kills


def test_a_run_killed_at_200_random_moments_ends_as_if_it_had_not_been(tmp_path):
    path, dice, steps, kills = tmp_path / "run.safetensors", random.Random(0), 2000, 0
    script = [sys.executable, str(Path(__file__).parent / "killed_run.py"), str(path)]
    model, optimizer, step = build(**EIGHT_BITS)
    seen = [0]
    while kills < 200:
        child = subprocess.Popen([*script, str(steps)], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n", f"after {kills} kills"
        time.sleep(dice.uniform(0.0, 0.05))
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        kills += 1
        if path.exists():
            seen.append(load_checkpoint(path, model, optimizer)["done"])
            assert seen[-1] >= seen[-2], "an older state came back"
    assert seen[-1] > 100, "the kills came before any step"
    resumed = snapshot(model, optimizer)
    model, optimizer, step = build(**EIGHT_BITS)
    for _ in range(seen[-1]):
        step()
    assert same(snapshot(model, optimizer), resumed)
