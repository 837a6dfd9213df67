"""Two and four ranks on loopback, over MLX's ring backend.

KILLS=20 runs everything: 20 kills, and every case on four ranks too.
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
import ring
from distributed_run import CASES, SHARDED, STEPS, Rank, bits_of
from killed_run import EIGHT_BITS, build
from mlx.utils import tree_flatten

from mlx_maxfactor import (
    CheckpointError,
    GuardedOptimizer,
    Muon,
    create_optimizer,
    load_checkpoint,
    save_checkpoint,
)
from mlx_maxfactor.checkpoint.save_and_load import _own_key
from mlx_maxfactor.distributed.assignment import Assignment
from mlx_maxfactor.distributed.collectives import STALLED

NEEDS_RING = pytest.mark.skipif(not ring.is_available(), reason="MLX has no ring backend here")
pytestmark = [pytest.mark.processes, NEEDS_RING]

KILLS = int(os.environ.get("KILLS", "4"))
MAIN_CASES = ["data_parallel", "bf16, stochastic", "compiled", "unwritable", "random states"]
MAIN_CASES += ["no momentum, one layer not updated"]
CASES_BY_RANKS = {2: [*CASES], 4: [*CASES] if KILLS >= 20 else MAIN_CASES}
ROUNDING_DIFFERENCE = {"average_gradients": 2e-6}
"""Sums in another order round differently: gradients travel in other messages."""


@pytest.fixture(scope="module", params=CASES_BY_RANKS, ids="{} ranks".format)
def reports(request, tmp_path_factory):
    """The report of each rank on each case; the processes are started once for all cases."""
    folder = tmp_path_factory.mktemp("ring")
    cases = CASES_BY_RANKS[request.param]
    outputs = ring.run(request.param, "distributed_run.py", *cases, folder=folder)
    lines = [[json.loads(line) for line in output.splitlines()] for output in outputs]
    return {cases[0]["case"]: cases for cases in zip(*lines, strict=True)}


def sharded_cases(reports):
    return SHARDED.keys() & reports.keys()


def test_data_parallel_steps_end_bit_identical_on_all_ranks(reports):
    ranks = reports["data_parallel"]
    assert ranks[0]["moved"]
    assert ranks[0]["own"] != ranks[1]["own"]  # each rank has its own gradients
    assert len({rank["parameters"] for rank in ranks}) == 1
    assert len({rank["state"] for rank in ranks}) == 1


def test_sharded_updates_equal_single_machine_updates(reports):
    for name in sharded_cases(reports):
        for rank in reports[name]:
            exact = name not in ROUNDING_DIFFERENCE
            assert rank["same as alone"] or not exact, name
            assert rank["same state"] or not exact, name
            assert rank["difference"] <= ROUNDING_DIFFERENCE.get(name, 0), name
        assert len({rank["parameters"] for rank in reports[name]}) == 1, name


def test_each_rank_keeps_only_the_state_of_its_share(reports):
    for name in sharded_cases(reports):
        ranks = reports[name]
        shares = [rank["state"] for rank in ranks]
        # Every rank has the steps and rates of all members.
        assert sum(shares) == pytest.approx(1, abs=0.02), name
        assert max(shares) < 0.9, name
        assert all(rank["planned"][0] == rank["planned"][1] for rank in ranks), name


def test_nan_on_one_rank_skips_the_step_on_all_ranks(reports):
    for name in {"guards", "compiled"} & reports.keys():
        for rank in reports[name]:
            assert rank["skipped"] == [1, 1]
            assert rank["steps"] == [STEPS - 1] * 2


def test_bytes_sent_agree_with_the_formula(reports):
    for name in sharded_cases(reports):
        for rank in reports[name]:
            if rank["sent"] is None:
                pytest.skip("this system does not count the bytes of a connection")
            assert rank["sent"] == pytest.approx(rank["formula"], rel=0.05), name


def test_failed_save_on_the_first_rank_is_an_error_on_all_ranks(reports):
    for rank in reports["unwritable"]:
        assert "was not written" in rank["error"]


def test_each_rank_resumes_with_its_own_random_state(reports):
    ranks = reports["random states"]
    assert all(rank["again"] == rank["drawn"] for rank in ranks)
    assert len({tuple(rank["drawn"]) for rank in ranks}) == len(ranks)


@pytest.mark.parametrize("saved", [[(1, 2)], [(1, 2), (3, 4)], [(5, 6), (5, 6)]])
def test_new_ranks_get_their_own_random_keys(saved):
    keys = mx.array(saved if len(saved) > 1 else saved[0], mx.uint32)
    found = [tuple(_own_key(keys, rank, 4)) for rank in range(4)]
    assert found[: len(saved)] == saved
    assert len(set(found)) == (1 if saved == [(5, 6), (5, 6)] else 4)


# Assignment


def costs(sizes):
    return {f"{size}.{i}": (size, size, size) for i, size in enumerate(sizes)}


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
def test_parameters_balance_the_load(ranks):
    assignment = Assignment(ranks)
    assignment.add(costs([100, 90, 40, 30, 7, 1, *[50] * 40]))
    state = [load[1] for load in assignment.loads]
    assert sum(state) == pytest.approx(2268)
    assert max(state) - min(state) <= 100


def test_later_parameters_do_not_move_earlier_ones():
    assignment = Assignment(2)
    assignment.add(costs([50, 40, 30]))
    before = dict(assignment.owners)
    assignment.add(costs([50, 40, 30, 200]))
    assert {path: assignment.owners[path] for path in before} == before
    assert sorted(load[0] for load in assignment.loads) == [70, 250]


class WholeTree(Muon):
    """It updates all of its parameters together."""

    def apply_gradients(self, gradients, parameters):
        return super().apply_gradients(gradients, parameters)


def test_optimizer_that_updates_the_whole_tree_is_refused():
    layers = nn.Sequential(*[nn.Linear(3, 3) for _ in range(3)])
    with pytest.raises(ValueError, match="WholeTree updates all of its parameters at once"):
        create_optimizer(layers, WholeTree(), group=Rank(0, 2))


def test_guard_around_an_optimizer_of_several_ranks_is_refused():
    optimizer = create_optimizer(nn.Linear(3, 2), group=Rank(0, 2))
    with pytest.raises(ValueError, match=r"give max_grad_norm, skip_nonfinite and max_skipped to"):
        GuardedOptimizer(optimizer)
    GuardedOptimizer(create_optimizer(nn.Linear(3, 2)))


def test_rank_without_a_share_keeps_no_state():
    group = Rank(2, 2)  # beyond ranks 0 and 1
    optimizer = create_optimizer(nn.Linear(30, 20), "muon", group=group)
    kept = {path.rpartition(".")[2] for path, _ in tree_flatten(optimizer.state)}
    assert kept == {"step", "learning_rate"}


@pytest.mark.parametrize("state_dtype", ["float32", "int4"])
def test_single_machine_checkpoint_loads_on_three_ranks_after_a_failed_load(state_dtype, tmp_path):
    def made(group=None):
        model = nn.Sequential(nn.Linear(4, 256), nn.Linear(256, 96), nn.Linear(96, 2))
        model.freeze(keys=["weight"])
        optimizer = create_optimizer(model, "adamw", state_dtype=state_dtype, group=group)
        model.unfreeze()  # the failed load creates the state of these layers
        return model, optimizer

    def moments_of(optimizer):
        arrays = dict(tree_flatten(optimizer.state))
        return {path: x for path, x in arrays.items() if path.endswith(("weight.m", "weight.v"))}

    good, bad = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    model, optimizer = made()
    optimizer.update(model, model.parameters())
    save_checkpoint(good, model, optimizer, done=1)
    other = nn.Linear(8, 8)
    save_checkpoint(bad, other, create_optimizer(other, "muon"))
    whole, parts = optimizer, []
    for rank in range(3):
        model, optimizer = made(Rank(rank, 3))
        with pytest.raises(CheckpointError, match="does not fit"):
            load_checkpoint(bad, model, optimizer)
        optimizer.init(model.trainable_parameters())
        assert load_checkpoint(good, model, optimizer) == {"done": 1}
        assert optimizer.step.item() == 1
        parts.append(optimizer)
    found = [path for part in parts for path in moments_of(part)]
    assert sorted(found) == sorted(moments_of(whole)), "each rank has the state of its parameters"
    for part in parts:
        for path, x in moments_of(part).items():
            assert mx.array_equal(x, moments_of(whole)[path]).item()


# Ranks that die or stall

WAIT = 10
"""Seconds that the other ranks wait if MLX does not notice a closed connection."""


@pytest.fixture
def start(tmp_path):
    """A function that starts the ranks of ``killed_run.py`` and waits until all are ready."""
    started = []

    def start(ranks, steps, *limits):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        arguments = (tmp_path / "run.safetensors", steps, *limits)
        for _ in range(3):  # as in ring.run: if a rank comes late, all start again
            run = ring.start(ranks, "killed_run.py", *arguments, folder=tmp_path, **pipes)
            started.extend(run)
            if [rank.stdout.readline() for rank in run] == ["ready\n"] * ranks:
                return run
            ring.end(run)
        raise AssertionError("the ranks did not connect in three tries")

    yield start
    ring.end(started)


def digest_of_run(model, optimizer):
    return bits_of({"model": model.parameters(), "optimizer": optimizer.state})


def test_run_with_killed_ranks_equals_an_uninterrupted_run(start, tmp_path):
    path, dice, done, ends = tmp_path / "run.safetensors", random.Random(0), [0], Counter()
    model, optimizer, step = build(**EIGHT_BITS)
    for kill in range(KILLS):
        run = start(4 if kill % 10 == 9 else 2, 100_000, WAIT)
        victim, saved = dice.choice(run), dice.randint(1, 4)
        assert [victim.stdout.readline() for _ in range(saved)] == ["saved\n"] * saved
        time.sleep(dice.uniform(0.0, 0.05))
        victim.send_signal(signal.SIGKILL)
        for rank in run:
            _, errors = rank.communicate(timeout=ring.HANGS)
            if rank is not victim:
                assert len(re.findall("another rank has|no answer from", errors)) == 1, errors
                ends[rank.returncode] += 1
        done.append(load_checkpoint(path, model, optimizer)["done"])
        assert done[-1] >= done[-2] + saved, "an older state came back"
    assert ends.keys() <= {1, STALLED}, ends
    assert [rank.wait(ring.HANGS) for rank in start(2, done[-1] + 3)] == [0, 0]
    load_checkpoint(path, model, optimizer)
    resumed = digest_of_run(model, optimizer)
    model, optimizer, step = build(**EIGHT_BITS)
    for _ in range(done[-1] + 3):
        step()
    assert digest_of_run(model, optimizer) == resumed


def test_stalled_rank_ends_the_others_with_one_message(start, tmp_path):
    path = tmp_path / "run.safetensors"
    run = start(2, 100_000, 300, 3)
    _, errors = run[0].communicate(timeout=ring.HANGS)
    assert run[0].returncode == STALLED
    assert errors.count("rank 0 of 2: no answer from the other ranks in 1 s") == 1
    model, optimizer, _ = build(**EIGHT_BITS)
    assert load_checkpoint(path, model, optimizer)["done"] == 2


@pytest.mark.parametrize("ranks", [2, 4])
def test_mlx_launch_starts_the_ranks(ranks):
    port, *_ = ring.free_ports(ranks)
    main = "from mlx._distributed_utils.launch import main; main()"
    launch = [sys.executable, "-c", main, "-n", str(ranks), "-p", str(port), "--backend", "ring"]
    script = Path(__file__).parent / "distributed_run.py"
    command = [*launch, "--", sys.executable, str(script), "data_parallel"]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    environment = {**os.environ, "PYTHONPATH": ring.PATH}
    done = subprocess.run(command, env=environment, text=True, timeout=ring.HANGS, **pipes)
    assert done.stdout.count("data_parallel") == ranks, done
