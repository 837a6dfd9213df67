"""User mistakes: each raises an error of one clear line that names the value and the remedy."""

import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as mlx_optimizers
import numpy as np
import pytest
from arrays import random_gradients, rates, same, snapshot
from mlx.optimizers import MultiOptimizer
from mlx.utils import tree_flatten
from models import Table

import mlx_maxfactor
from mlx_maxfactor import (
    Adafactor,
    AdamW,
    FrequencyAdaptiveMomentum,
    GuardedOptimizer,
    MaxFactor,
    Muon,
    OrthoMaxFactor,
    Schedule,
    SignSGD,
    WeightAverage,
    _validate,
    adaptive_schedule,
    create_optimizer,
    create_optimizer_for_hrm,
    estimate_state_bytes,
    warmup_cosine,
)

ROOT = Path(__file__).parent.parent


def create(*arguments, **options):
    return create_optimizer(Table(), *arguments, **options)


def frozen_model():
    model = Table()
    model.freeze()
    return model


def set_rate(rate, build=create):
    build().learning_rate = rate


def ascending(step):
    """A schedule that reads a table; its first rate is below 0."""
    return mx.array([-0.1, 0.1])[step]


def ascending_later(step):
    return 0.1 - step


NAMES = "'orthomaxfactor', 'maxfactor', 'adafactor', 'signsgd', 'muon', 'adamw'"
CHOICES = f"hidden must be one of {NAMES} or an optimizer"
NUMBER = "must be a function that returns one number a step, got"
NEGATIVE = r"must be in \[0, inf\), got -"
MODEL = r"^model must be an mlx\.nn\.Module, got a %s: pass the model itself first, then"
FROZEN = "^model has no trainable parameters: unfreeze the layers to train, or add LoRA layers"
UNKNOWN_PEAK = "rest_learning_rate is a number beside .* learning_rate=Schedule.function, .* peak="

RISE, FALL = mlx_optimizers.linear_schedule(0.0, 0.02, 30), mlx_optimizers.cosine_decay(0.02, 100)
WARM = mlx_optimizers.join_schedules([RISE, FALL], [30])
ZERO = mlx_optimizers.cosine_decay(0, 100)
GROWING = mlx_optimizers.exponential_decay(1e-5, 1.01)
MISTAKES = [
    # Names
    (lambda: create("AdamW"), f"^{CHOICES}, got 'AdamW' .did you mean 'adamw'"),
    (lambda: create("maxfacter"), f"^{CHOICES}, got 'maxfacter' .did you mean 'maxfactor'"),
    (lambda: create(["muon"]), rf"^{CHOICES}, got \['muon'\] .did you mean 'muon'"),
    (lambda: create(MaxFactor), r"got the class MaxFactor: .* Max.*, or the name 'maxfactor'$"),
    (lambda: create("muon", method="newton_schultz"), "tz' .did you mean 'newton_schulz'"),
    (lambda: create(Muon(), AdamW(), rounding="up"), "^rounding must .* 'stochastic', got 'up'$"),
    (lambda: SignSGD(rounding="up"), "rounding must be one of 'nearest', 'stochastic', got"),
    (lambda: MaxFactor(layout="rows"), "layout must be one of 'batched', 'ex.* got 'rows'"),
    (lambda: OrthoMaxFactor(method="svd"), "method must be one of 'newton_sch.* got 'svd'"),
    (lambda: Muon(scale="frobenius"), "scale must be one of None, 'spec.* 'frobenius'"),
    (lambda: WeightAverage(nn.Linear(2, 2), dtype=mx.int8), "dtype must be mx.float32 or mx"),
    # Options
    (lambda: create(lr=0.1), "has no option 'lr': it has .*; its rate is learning_rate,"),
    (lambda: create(rest_options={"lr": 0.1}), "'lr': it has .*; its rate is rest_learning_rate,"),
    (
        lambda: create("muon", betas=(0.9, 0.99)),
        "^muon has no option 'betas': it has .* options of the other optimizer go to rest_options,",
    ),
    (lambda: create(momentm=0.9), "no option 'momentm' .did you mean 'momentum'"),
    (lambda: create(momentum=mx.zeros(10_000)), r"^momentum must .* got array.{,99}$"),
    (lambda: create(exclude_frist=True), "did you mean 'exclude_first'"),
    (lambda: create(rest_options={1: 2}), "has no option 1: it has"),
    (lambda: create(rest_options=3), "rest_options must map names to values, got 3"),
    (lambda: create(rules=["head"]), "rules must map .* to optimizers, got"),
    (lambda: create(rest=3), "rest must be one of .*, got 3"),
    (lambda: create(rest=AdamW(), rest_options={"eps": 1e-6}), "an optimizer already: give eps"),
    (lambda: create(hidden=GuardedOptimizer(Muon())), "single optimizer, got GuardedOptim"),
    (lambda: create(rules={"head": MultiOptimizer([Muon()])}), "single optimizer, got MultiOptim"),
    (lambda: MaxFactor(beta2_bounds=(0.9, 0.1)), "beta2_bounds must rise"),
    (lambda: MaxFactor(beta2_bounds=0.9), "beta2_bounds must be a pair of numbers, got 0.9"),
    (lambda: MaxFactor(eps=(0.0, 1e-4)), r"eps\[0\] must be in \[1e-15, inf\), got 0.0"),
    (lambda: MaxFactor(eps=(1e-10, -1.0)), r"eps\[1\] must be in"),
    (lambda: MaxFactor(nesterov=True), "nesterov=True needs momentum"),
    (lambda: MaxFactor(cautious=True), "cautious=True needs momentum"),
    (lambda: AdamW(betas=(0.9, 1.0)), r"betas\[1\] must be in \[0, 1\), got 1.0"),
    (lambda: Adafactor(eps=(0.0, 1e-3)), r"eps\[0\] must be in \(0, inf\), got 0.0"),
    # Rates
    (lambda: create(learning_rate=mx.array(-1.0)), rf"^learning_rate {NEGATIVE}1.0$"),
    (lambda: create(learning_rate=float("nan")), r"^learning_rate must .* got nan$"),
    (lambda: MaxFactor(learning_rate="fast"), "learning_rate must be a number or a f.* got 'fast'"),
    (lambda: create(rest_learning_rate="1e-3"), "rest_learning_rate must be a number or a f"),
    (lambda: create(learning_rate=lambda s: -0.1 - s), f"^learning_rate, at step 0, {NEGATIVE}0"),
    (lambda: set_rate(ascending), f"at step 0, {NEGATIVE}0.1"),
    (lambda: create(learning_rate=lambda s: None), f"^learning_rate {NUMBER} None$"),
    (lambda: create(rest_learning_rate=lambda s: mx.ones(2)), f"^rest_learning_rate {NUMBER} arr"),
    (lambda: AdamW(mx.array([0.1, 0.2])), "^learning_rate must be a number"),
    (lambda: create(learning_rate=lambda step: 0.1, rest_learning_rate=0.01), UNKNOWN_PEAK),
    (lambda: create(learning_rate=GROWING, rest_learning_rate=0.01), UNKNOWN_PEAK),
    (lambda: create(learning_rate=ZERO, rest_learning_rate=1e-3), "peak is not known, or 0"),
    (lambda: create(total_steps=9, learning_rate=WARM), "total_steps makes one: give .*, its peak"),
    (lambda: create(total_steps=9, rest_learning_rate=WARM), "rest_learning_rate is a schedule"),
    (lambda: create(hidden=Muon(), learning_rate=0.1), "hidden is an optimizer already: give"),
    (lambda: create(learning_rate=ascending_later, rest=AdamW(0.1)), "the rate of AdamW is a num"),
    (lambda: warmup_cosine(1e-3, 1000, 2000), r"warmup_steps must .*1000\), got 2000"),
    (lambda: Schedule(3, "x"), "function must be a function of the step"),
    (lambda: Schedule(abs, "x", peak=-1.0), r"peak must be in \[0, inf\)"),
    (lambda: AdamW(warmup_cosine), "function of the step alone"),
    (lambda: Muon(nn.Linear(2, 2)), "learning_rate is a model: create_optimizer"),
    # The model
    (lambda: create_optimizer(Table().parameters()), MODEL % "dict"),
    (lambda: create_optimizer("muon", Table()), MODEL % "str"),
    (lambda: create_optimizer_for_hrm(Table().parameters()), MODEL % "dict"),
    (lambda: create(Table()), f"^{CHOICES}, got Table.*$"),
    (lambda: create_optimizer(frozen_model()), FROZEN),
    (lambda: estimate_state_bytes(frozen_model()), FROZEN),
]


@pytest.mark.parametrize(("call", "message"), MISTAKES)
def test_mistake_gives_a_one_line_error(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


# What an option must be, wrong values, and the options
RULES = [
    ("in [0, 1)", [1.0, -0.5, "fam"], "MaxFactor.momentum MaxFactor.gamma OrthoMaxFactor.momentum"),
    ("in [0, 1)", [1.0, -0.5], "FrequencyAdaptiveMomentum.alpha FrequencyAdaptiveMomentum.beta"),
    ("in [0, 1]", [1.5, -1], "FrequencyAdaptiveMomentum.blend adaptive_schedule.decay_factor"),
    ("in [0, 1]", [1.5, -1], "warmup_cosine.min_ratio warmup_cosine.start_ratio"),
    ("in (0, 1]", [1.5, 0.0], "WeightAverage.decay"),
    ("in [-1, 0)", [0.8, 0.0], "MaxFactor.beta2_decay Adafactor.decay_rate"),
    ("in (0, inf)", [0.0], "MaxFactor.d MaxFactor.scalar_boost MaxFactor.clip_threshold AdamW.eps"),
    ("in (0, inf)", [0.0], "Adafactor.clip_threshold warmup_cosine.learning_rate"),
    ("in (0, inf)", [0.0, -1.0], "adaptive_schedule.initial_lr"),
    ("in (0, inf)", [0.0], "GuardedOptimizer.max_grad_norm create.max_grad_norm"),
    ("in [0, inf)", [-1.0, float("nan"), 1e300], "MaxFactor.learning_rate"),
    ("in [0, inf)", [1e300], "MaxFactor.weight_decay"),  # not a float32
    ("in (0, inf)", [1e-46], "MaxFactor.d"),
    ("in [0, inf)", [-1.0, "zero"], "MaxFactor.weight_decay MaxFactor.min_lr MaxFactor.min_rms"),
    ("in [0, inf)", [-1.0, "zero"], "MaxFactor.eps_rms OrthoMaxFactor.min_rms"),
    ("in [1e-15, inf)", [0], "OrthoMaxFactor.eps"),
    ("True or False", [1, "yes"], "MaxFactor.maximize AdamW.bias_correction SignSGD.sparse_rows"),
    ("True or False", [1, "yes"], "GuardedOptimizer.skip_nonfinite create.skip_nonfinite"),
    ("True or False", [1, "yes"], "create.strict"),
    ("a whole number of at least 1", [0, 2.5], "OrthoMaxFactor.block Muon.steps"),
    ("a whole number of at least 1", [np.float32(5)], "Muon.steps"),
    ("a whole number of at least 1", [0, 2.5], "FrequencyAdaptiveMomentum.bands"),
    ("a whole number of at least 1", [0, 2.5], "FrequencyAdaptiveMomentum.blend_steps"),
    ("a whole number of at least 1", [0, 2.5], "create.total_steps warmup_cosine.total_steps"),
    ("a whole number of at least 0", [-1, 2.5], "adaptive_schedule.warmup_steps"),
    ("a whole number of at least 0", [-1, 2.5], "WeightAverage.start warmup_cosine.warmup_steps"),
    ("a whole number from 0 to 4294967295", [-1, 2**40], "MaxFactor.seed AdamW.seed create.seed"),
]
MAKERS = {name: getattr(mlx_maxfactor, name) for name in mlx_maxfactor.__all__}
MAKERS |= {"create": create, "WeightAverage": partial(WeightAverage, nn.Linear(2, 2))}
MAKERS |= {"GuardedOptimizer": partial(GuardedOptimizer, SignSGD())}
MAKERS |= {"adaptive_schedule": partial(adaptive_schedule, initial_lr=1.0)}
MAKERS |= {"warmup_cosine": partial(warmup_cosine, learning_rate=1.0, total_steps=100)}


@pytest.mark.parametrize(("rule", "wrong", "options"), RULES)
def test_option_outside_its_range_is_refused(rule, wrong, options):
    for kind, name in (option.split(".") for option in options.split()):
        for value in wrong:
            message = re.escape(f"{name} must be {rule}, got {_validate.shown(value)}")
            with pytest.raises(ValueError, match=f"^{message}$"):
                MAKERS[kind](**{name: value})


# Accepted values


@pytest.mark.compiled
def test_numpy_numbers_are_accepted():
    # A NumPy float32 times an MLX array is a NumPy array, which a compiled step cannot trace.
    whole, half = np.int64(4), np.float32(0.5)
    makes = [
        lambda n, x: create(
            block=n, steps=n, seed=n, learning_rate=x, max_grad_norm=x, momentum=x, min_rms=x
        ),
        lambda n, x: create("maxfactor", momentum=FrequencyAdaptiveMomentum(x, x, n, x, n)),
        lambda n, x: create("muon", steps=n, block=n, seed=n, rounding="stochastic"),
        lambda n, x: create(MaxFactor(x, scalar_boost=x, clip_threshold=x, eps=(x, x), gamma=x)),
        lambda n, x: create(learning_rate=warmup_cosine(x, 10 * n, n, x, start_ratio=x)),
        lambda n, x: create(learning_rate=adaptive_schedule(x, n, x), rest_learning_rate=x),
    ]
    for make in makes:
        mx.random.seed(0)
        ours, theirs = make(4, 0.5), make(whole, half)
        assert repr(ours) == repr(theirs)
        assert "np." not in repr(theirs)
        tree = {"linear1": {"weight": mx.ones((128, 64))}}
        moved = [o.apply_gradients(tree, tree)["linear1"]["weight"] for o in (ours, theirs)]
        assert mx.array_equal(*moved).item()
        step = mx.compile(theirs.apply_gradients, inputs=theirs.state, outputs=theirs.state)
        step(tree, tree)  # only traced, not evaluated
    schedule = warmup_cosine(np.float64(0.1), np.int32(100), np.uint8(10))
    assert schedule(np.int64(5)).item() == schedule(5).item() == pytest.approx(0.05)


def test_member_seeds_wrap_around_after_the_largest_seed():
    optimizer = create(seed=2**32 - 1, rounding="stochastic")
    seeds = [member.seed for member in optimizer.optimizers]
    assert seeds[0] == 2**32 - 1
    assert len(set(seeds)) == len(seeds)
    assert max(seeds[1:]) < 3


def test_default_warm_up_is_at_most_a_fifth_of_the_run():
    assert warmup_cosine(1e-3, 1000)(200).item() == pytest.approx(1e-3)
    for total, warmup in ((1, 0), (4, 0), (1000, 200), (10_000, 2000), (10**6, 2000)):
        assert repr(warmup_cosine(1e-3, total)) == repr(warmup_cosine(1e-3, total, warmup))


PEAKS = [
    (mlx_optimizers.cosine_decay(0.02, 100), 0.02),
    (mlx_optimizers.cosine_decay(0.0, 100, end=0.02), 0.02),
    (mlx_optimizers.linear_schedule(0.0, 0.02, 100), 0.02),
    (mlx_optimizers.linear_schedule(0.0, 0.02, 50_000_000), 0.02),
    (mlx_optimizers.exponential_decay(0.02, 0.9), 0.02),
    (mlx_optimizers.step_decay(0.02, 0.5, 10), 0.02),
    (WARM, 0.02),
    (Schedule(WARM, "half", ratio=0.5), 0.01),
    (Schedule(lambda step: 0.02 / (step + 1), "inverse", peak=0.02), 0.02),
]


@pytest.mark.parametrize(("schedule", "peak"), PEAKS)
def test_rest_learning_rate_given_with_a_schedule_is_the_peak(schedule, peak):
    optimizer = create(learning_rate=schedule, rest_learning_rate=4e-3)
    schedules = [member._schedulers["learning_rate"] for member in optimizer.optimizers]
    for step in (0, 29, 30, 60):
        first, *rest = (each(mx.array(step)).item() for each in schedules)
        assert first == pytest.approx(float(schedule(mx.array(step))))
        assert rest == pytest.approx([first * 4e-3 / peak] * 2)
    # A rate set by hand keeps the ratio of the peaks, even while the warm-up has both rates at 0.
    optimizer.learning_rate = 0.1
    assert rates(optimizer) == pytest.approx([0.1, 0.1 * 4e-3 / peak, 0.1 * 4e-3 / peak])


def test_schedule_function_is_called_only_at_the_current_step():
    # MLX does not check indices: step 1,000,000 of a table with two entries can crash the process.
    seen = []

    def rate(step):
        seen.append(step.item())
        return mx.array([0.1, 0.2])[step]

    create(learning_rate=rate)
    Muon(rate)
    assert set(seen) == {0}
    seen.clear()
    optimizer = Muon(0.1)
    optimizer.state["step"] = mx.array(1, mx.uint64)
    optimizer.learning_rate = rate
    assert set(seen) == {1}
    assert optimizer.learning_rate.item() == pytest.approx(0.2)


@pytest.mark.compiled
def test_schedule_that_falls_below_zero_is_clamped_to_zero():
    # A compiled step cannot raise, and a rate below 0 would ascend.
    optimizer, tree = SignSGD(lambda step: 0.5 - step, weight_decay=0.0), {"b": mx.zeros(1)}
    optimizer.init(tree)
    step = mx.compile(optimizer.apply_gradients, inputs=optimizer.state, outputs=optimizer.state)
    assert [step({"b": mx.ones(1)}, tree)["b"].item() for _ in range(3)] == [-0.5, 0.0, 0.0]


@pytest.mark.compiled
def test_traced_rate_can_be_assigned():
    optimizer = create(MaxFactor(), AdamW())

    def step(rate):
        optimizer.learning_rate = rate
        return optimizer.learning_rate

    run = mx.compile(step, inputs=optimizer.state, outputs=optimizer.state)
    assert run(mx.array(0.25)).item() == 0.25
    assert rates(optimizer) == pytest.approx([0.25, 0.0025])


def test_setting_a_number_as_rate_evaluates_no_array(monkeypatch):
    # In a loop that sets the rate at every step, it would wait for the step before.
    optimizer = create(learning_rate=warmup_cosine(0.1, 10))
    monkeypatch.setattr(_validate, "value_if_evaluated", None)
    optimizer.learning_rate = 0.1


def test_schedule_can_return_a_number_of_any_type():
    for rate in (0.5, np.float32(0.5), mx.array(0.5), mx.array([0.5]), mx.array(0.5, mx.bfloat16)):
        optimizer = AdamW(lambda step, rate=rate: rate)
        moved = optimizer.apply_gradients({"b": mx.array(1.0)}, {"b": mx.array(0.0)})["b"]
        assert moved.shape == ()
        assert moved.item() == pytest.approx(-0.5)


# repr


REPRS = [
    (
        lambda: OrthoMaxFactor(0.1, state_dtype=mx.int8, rounding="stochastic", seed=3),
        "OrthoMaxFactor(learning_rate=0.1, state_dtype='int8', rounding='stochastic', seed=3)",
    ),
    (
        lambda: MaxFactor(momentum=FrequencyAdaptiveMomentum(bands=4), eps=(1e-9, 0)),
        "MaxFactor(learning_rate=0.01, eps=(1e-09, 0.0), "
        "momentum=FrequencyAdaptiveMomentum("
        "alpha=0.9, beta=0.999, bands=4, blend=1.0, blend_steps=1))",
    ),
    (
        lambda: Muon(warmup_cosine(0.1, 100, 10), scale="rms", state_dtype=mx.int8),
        "Muon(learning_rate=warmup_cosine(0.1, 100, 10, 0.1), scale='rms', state_dtype='int8')",
    ),
    (Adafactor, "Adafactor(learning_rate=None)"),
    (lambda: Adafactor(0.1, layout="conv"), "Adafactor(learning_rate=0.1, layout='conv')"),
    (
        lambda: AdamW(WARM, betas=[0.9, 0.99]),
        "AdamW(learning_rate=join_schedules(linear_schedule(end=0.02, init=0.0, steps=30), "
        "cosine_decay(decay_steps=100, end=0.0, init=0.02), boundaries=[30]), betas=(0.9, 0.99))",
    ),
    (lambda: SignSGD(ascending_later), "SignSGD(learning_rate=ascending_later)"),
    (
        lambda: GuardedOptimizer(SignSGD(), max_grad_norm=1),
        "GuardedOptimizer(SignSGD(learning_rate=0.01), max_grad_norm=1, skip_nonfinite=True)",
    ),
    (
        lambda: GuardedOptimizer(mlx_optimizers.Lion(0.1), skip_nonfinite=False),
        "GuardedOptimizer(mlx's Lion)",
    ),
]


@pytest.mark.parametrize(("make", "text"), REPRS)
def test_repr_shows_class_and_changed_options(make, text):
    assert repr(make()) == text


def test_repr_of_a_subclass_shows_own_and_inherited_options():
    class Own(Muon):
        def __init__(self, learning_rate=0.5, *, gain=1.0, **options):
            super().__init__(learning_rate, **options)
            self.gain = gain

    assert repr(Own(gain=2.0, steps=8)) == "Own(learning_rate=0.5, gain=2.0, steps=8)"


def test_repr_of_a_routed_optimizer_shows_its_members():
    optimizer = create(rest=mlx_optimizers.AdamW(1e-3), max_grad_norm=1.0, skip_nonfinite=True)
    assert repr(optimizer) == (
        "RoutedOptimizer(\n"
        "  orthomaxfactor: 1 parameter, OrthoMaxFactor(learning_rate=0.02)\n"
        "  AdamW: 4 parameters, mlx's AdamW\n"
        "  max_grad_norm=1\n"
        "  skip_nonfinite=True\n"
        ")"
    )
    optimizer = create(learning_rate=mlx_optimizers.step_decay(0.1, 0.5, 10))
    made = "step_decay(decay_rate=0.5, init=0.1, step_size=10)"
    assert f"adamw, no decay: 2 parameters, AdamW(learning_rate=0.05 * {made}, w" in repr(optimizer)
    optimizer.learning_rate = 0.25
    assert "OrthoMaxFactor(learning_rate=0.25)" in repr(optimizer)


@pytest.mark.compiled
@pytest.mark.parametrize("rate", [0.05, warmup_cosine(0.1, 10, 2)], ids=["constant", "schedule"])
def test_printing_inside_a_compiled_step_changes_nothing(rate):
    model, texts = Table(), []
    optimizer = create_optimizer(model, learning_rate=rate, skip_nonfinite=True)
    state = [model.state, optimizer.state]

    def step():
        optimizer.update(model, random_gradients(model))
        texts.append(repr(optimizer))

    run = mx.compile(step, inputs=state, outputs=state)
    for _ in range(2):
        run()
    assert len(texts) == 1
    shown = "..." if rate == 0.05 else r"warmup_cosine(0.1, 10, 2, 0.1)"
    assert f"OrthoMaxFactor(learning_rate={shown})" in texts[0]


# Type checking


SCRIPT = """
import json
from typing import Any
import mlx.nn as nn
from mlx_maxfactor import MaxFactor, Muon, OptimizerName, OrthoMaxFactor, create_optimizer
model = nn.Linear(3, 3)
create_optimizer(model, "mouon")  # wrong
create_optimizer(model, rest="AdamW")  # wrong
create_optimizer(model, ["muon"])  # wrong
create_optimizer(model, rounding="up")  # wrong
create_optimizer(model.parameters())  # wrong
Muon(scale="RMS")  # wrong
OrthoMaxFactor(state_dtype="int3")  # wrong
MaxFactor.preset("hubb")  # wrong
create_optimizer(model, "muon", "adafactor", rounding="stochastic")
create_optimizer(model, OrthoMaxFactor(block=8), Muon(scale="rms", method="polar_express"))
rules = {"embedding": "adafactor", "*.weight": "hidden"}
create_optimizer(model, rules=rules)
name = "muon"
create_optimizer(model, name)
config: dict[str, Any] = json.loads("{}")
create_optimizer(model, config["optimizer"], momentum=0.9)
for name in ("maxfactor", "adamw"):
    create_optimizer(model, name)
def build(name: OptimizerName): return create_optimizer(model, hidden=name)
"""


@pytest.mark.skipif(shutil.which("pyright") is None, reason="pyright is not installed")
def test_pyright_flags_wrong_names_in_a_script(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    settings = {"extraPaths": [str(ROOT)], "pythonVersion": "3.10"}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    # Node, which runs pyright, fails with a preloaded BLAS.
    environment = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
    command = ["pyright", "--outputjson", "--pythonpath", sys.executable, "-p", str(tmp_path)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    if not run.stdout.startswith("{"):
        pytest.skip(f"pyright does not run here: {run.stdout}{run.stderr}")
    found = json.loads(run.stdout)["generalDiagnostics"]
    flagged = {d["range"]["start"]["line"] for d in found if d["severity"] == "error"}
    wrong = {i for i, line in enumerate(SCRIPT.split("\n")) if line.endswith("# wrong")}
    assert len(wrong) == 8
    assert flagged == wrong, found


def test_update_with_wrong_arguments_gives_a_clear_error():
    model = Table()
    gradients = model.trainable_parameters()
    for optimizer in (create_optimizer(model), AdamW(), GuardedOptimizer(AdamW())):
        with pytest.raises(ValueError, match="model, then its gradients; the model is a dict"):
            optimizer.update(gradients, model)
        with pytest.raises(ValueError, match="beside the loss, got a tuple"):
            optimizer.update(model, (mx.array(1.0), gradients))
    with pytest.raises(ValueError, match="optimizer must be an optimizer, got 'adamw'"):
        GuardedOptimizer("adamw")


# Wrong gradients

WRONG_GRADIENTS = {
    "broadcastable shape": (
        {"linear1": {"weight": mx.ones((1, 64))}},
        r"^linear1.weight: the gradient has shape \(1, 64\), and the parameter \(128, 64\)$",
    ),
    "None": ({"linear1": {"weight": None}}, "linear1.weight: .* must be an array, got NoneType$"),
    "no such parameter": ({"extra": mx.ones(2)}, "^extra: the gradient has no parameter"),
}


@pytest.mark.parametrize("wrong", WRONG_GRADIENTS)
@pytest.mark.parametrize("make", [create, lambda: AdamW(), lambda: GuardedOptimizer(AdamW())])
def test_error_names_a_wrong_gradient_and_nothing_changes(make, wrong):
    model, optimizer = Table(), make()
    optimizer.update(model, random_gradients(model))
    gradients, message = WRONG_GRADIENTS[wrong]
    fine = {"embedding": {"weight": mx.ones((100, 64))}, "output": {"bias": mx.ones(10)}}
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.update(model, fine | gradients)
    assert same(snapshot(model, optimizer), before)


def test_rate_can_be_an_array_of_one_element():
    assert AdamW(mx.array([1e-3])).learning_rate.shape == ()
    optimizer = create()
    optimizer.learning_rate = mx.array([0.05])
    assert optimizer.learning_rate.item() == pytest.approx(0.05)


@pytest.mark.compiled
def test_state_of_a_routed_optimizer_shows_rate_and_step():
    model, optimizer = Table(), create(learning_rate=warmup_cosine(0.1, 10, 2))
    state = [model.state, optimizer.state]
    assert optimizer.state["step"].item() == 0

    def step():
        optimizer.update(model, random_gradients(model))
        return optimizer.state["learning_rate"]

    run = mx.compile(step, inputs=state, outputs=state)
    for t in range(3):
        assert run().item() == pytest.approx(warmup_cosine(0.1, 10, 2)(t).item())
        assert optimizer.state["step"].item() == state[1]["step"].item() == t + 1
    with pytest.raises(KeyError, match="rate"):
        optimizer.state["rate"]


@pytest.mark.parametrize("state", [[], None, {}, 3])
@pytest.mark.parametrize("make", [create, AdamW, lambda: GuardedOptimizer(AdamW())])
def test_assigning_an_invalid_state_gives_a_clear_error(make, state):
    optimizer = make()
    before = tree_flatten(optimizer.state)
    with pytest.raises(ValueError, match=r"^state must (hold|be)"):
        optimizer.state = state
    assert tree_flatten(optimizer.state) == before
