"""The reasoning example: its optimizers, its command line, its comparison."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import command_line
import compare_reasoning
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from arrays import flat
from compare_reasoning import CONFIGURATIONS, commands, run_one
from puzzles import Rules
from train_reasoning import KINDS, Reasoner, cross_entropy, make

from mlx_maxfactor import (
    RoutedOptimizer,
    SignSGD,
    create_optimizer,
    create_optimizer_for_hrm,
    warmup_cosine,
)

pytestmark = pytest.mark.examples

SCRIPT = Path(__file__).parent.parent / "examples" / "train_reasoning.py"


def arguments(**changes):
    values = {"width": 8, "heads": 2, "layers": 1, "cycles": 2, "low_steps": 2, "batch_size": 6}
    return SimpleNamespace(**values | changes)


@pytest.fixture(scope="module")
def rules():
    return Rules(5)


def reasoner(rules, seed=0):
    mx.random.seed(seed)
    return Reasoner(KINDS["rules"], rules, arguments())


def batch_of(rules, count=6, seed=0):
    drawn = rules.training(count, np.random.default_rng(seed))
    return [mx.array(array.astype(np.int32)) for array in drawn]


# Its optimizers


def trained(model, optimizers, rules, steps=12):
    """The parameters after a few steps; the optimizers update the model one after the other."""
    for seed in range(steps):
        batch = batch_of(rules, 3, seed)

        def loss(model, batch=batch):
            x = model.read(*batch[:2])
            zero = mx.zeros_like(x)
            return cross_entropy(model.answer(model.segment(zero, zero, x)[1]), batch[2])

        _, gradients = nn.value_and_grad(model, loss)(model)
        for optimizer in optimizers:
            optimizer.update(model, gradients)
        mx.eval(model.parameters(), *(o.state for o in optimizers))
    return flat(model.trainable_parameters())


def differing_paths(one, other):
    return [path for path in one if not np.array_equal(one[path], other[path])]


def test_routed_hrm_optimizers_equal_the_separate_ones(rules):
    schedules = [warmup_cosine(rate, 12, 3, start_ratio=0.25) for rate in (0.01, 1)]
    one, other = reasoner(rules), reasoner(rules)
    apart = trained(one, create_optimizer_for_hrm(one, *schedules).values(), rules)
    pair = create_optimizer_for_hrm(other, *schedules)
    routed = create_optimizer(other, pair["main"], pair["main"], rules={"*puzzle*": pair["puzzle"]})
    assert not differing_paths(apart, trained(other, [routed], rules))
    # Optimizers built by name do not decay norms and biases; all else is the same.
    one, third = reasoner(rules), reasoner(rules)
    apart = trained(one, create_optimizer_for_hrm(one, *schedules).values(), rules, 1)
    puzzles = SignSGD(schedules[1], sparse_rows=True)
    rates = {"learning_rate": schedules[0], "rest_learning_rate": schedules[0]}
    named = create_optimizer(third, "adamw", rules={"*puzzle*": puzzles}, **rates)
    undecayed = [path for path in apart if "norm" in path or "bias" in path]
    assert differing_paths(apart, trained(third, [named], rules, 1)) == undecayed
    assert routed.plan[0].optimizer == "SignSGD"


def test_hrm_option_of_the_example_builds_the_documented_pair(rules):
    rates = dict.fromkeys(("learning_rate", "puzzle_learning_rate"))
    given = arguments(steps=100, option=[("weight_decay", 0.0)], **rates)
    optimizer = make("hrm", reasoner(rules), {}, {"hrm": 1e-3}, given)
    assert isinstance(optimizer, RoutedOptimizer)
    main, puzzle = optimizer.optimizers
    assert [type(m).__name__ for m in (main, puzzle)] == ["AdamW", "SignSGD"]
    assert puzzle.learning_rate.item() == pytest.approx(100 * main.learning_rate.item(), rel=1e-5)
    assert main.weight_decay == puzzle.weight_decay == 0
    given.option = [("use_separate_puzzle_optimizer", False)]
    alone = make("hrm", reasoner(rules), {}, {"hrm": 1e-3}, given)
    assert {entry.optimizer for entry in alone.plan} == {"AdamW"}


# From the command line

SMALL = ("--steps", "6", "--width", "8", "--batch-size", "8", "--segments", "2", "--count", "3")


def run(*arguments, cwd):
    return command_line.run(SCRIPT, *arguments, cwd=cwd)


def test_rules_example_trains_compares_and_draws(tmp_path):
    done = run("rules", "--compare", "orthomaxfactor,hrm", *SMALL, cwd=tmp_path)
    rows = [line for line in done.stdout.splitlines() if line.startswith("puzzles.weight")]
    assert [row.split()[4] for row in rows] == ["SignSGD", "SignSGD"]
    assert re.search(r"^unchanged +0\.\d{3} +0\.\d{3}$", done.stdout, re.MULTILINE)
    folder = tmp_path / "runs" / "reasoning" / "rules"
    curves = json.loads((folder / "curves.json").read_text())
    assert [run["optimizer"] for run in curves["runs"]] == ["orthomaxfactor", "hrm"]
    assert len({run["training_loss"][-1] for run in curves["runs"]}) == 2
    assert set(curves["runs"][0]["validation"]) == {"loss", "exact match", "cells"}
    for picture in ("curves.png", "solving.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")


def test_resumed_sudoku_run_equals_the_uninterrupted_run(tmp_path):
    rounded = ("--dtype", "bfloat16", "--rounding", "stochastic")
    arguments = ("sudoku", *SMALL, *rounded, "--save-every", "3")
    printed, arrays = command_line.assert_resumes_exactly(SCRIPT, *arguments, cwd=tmp_path)
    for baseline in ("naked singles", "and hidden ones"):
        assert re.search(rf"^{baseline} +0\.000 +0\.\d{{3}}$", printed, re.MULTILINE)
    assert mx.any(arrays["carry.low"] != 0).item()


# The comparison


def test_comparison_reads_results_from_a_command_line_run(tmp_path):
    record = run_one(["python", "examples/train_reasoning.py", "rules", *SMALL], tmp_path)
    assert set(record.validation) == {"loss", "exact match", "cells"}
    assert 0 < record.validation["cells"] < 1
    assert record.cpu_seconds > 0
    assert not list(tmp_path.iterdir()), "only the unchanged example saves a picture"


def test_every_recorded_run_of_the_example_reaches_its_target():
    kept = compare_reasoning.read(compare_reasoning.RECORDS)
    for kind, target in (("rules", 0.9), ("sudoku", 0.8)):
        (first, *_) = CONFIGURATIONS[kind]
        found = [kept.get(" ".join(command)) for command in commands(kind, first, (), 3)]
        assert found[0], f"{kind} was never run"
        assert all(record.validation["exact match"] >= target for record in found if record)
