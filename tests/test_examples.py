"""Each example from the command line, small; what README shows, run."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

ROOT = Path(__file__).parent.parent
LANGUAGE_MODEL = ROOT / "examples" / "train_language_model.py"
SMALL = ("--steps", "12", "--width", "16", "--context", "16", "--batch-size", "2")


def run(script, *arguments, cwd):
    # One thread: two of OpenBLAS's per process would wait for one another here.
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "PYTHONWARNINGS": "error"}
    return subprocess.run(
        [sys.executable, str(script), *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_language_model_trains_compares_and_draws(tmp_path):
    names = ["maxfactor", "adafactor", "signsgd", "muon", "adamw"]
    done = run(LANGUAGE_MODEL, "--compare", ",".join(names), *SMALL, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.index("state bytes") < done.stdout.index("validation loss")
    folder = tmp_path / "runs" / "language_model"
    curves = json.loads((folder / "curves.json").read_text())
    assert [run["optimizer"] for run in curves["runs"]] == names
    starts = {run["training_loss"][0] for run in curves["runs"]}
    assert len(starts) == len(names), "each optimizer must have taken its own steps"
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    for name in names:
        assert re.search(rf"^{name} writes:\ndef ", done.stdout, re.MULTILINE)
    assert "tokens/s" in done.stderr


def test_a_resumed_run_ends_as_the_uninterrupted_one(tmp_path):
    arguments = (*SMALL, "--dtype", "bfloat16", "--rounding", "stochastic", "--save-every", "5")
    assert run(LANGUAGE_MODEL, *arguments, "--output", "a", cwd=tmp_path).returncode == 0
    files = sorted((tmp_path / "a").glob("*.safetensors"))
    assert [file.name for file in files] == [f"maxfactor-{n:06}.safetensors" for n in (10, 12)]
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / files[0].name).write_bytes(files[0].read_bytes())
    done = run(LANGUAGE_MODEL, *arguments, "--output", "b", "--resume", cwd=tmp_path)
    assert "after 10 steps" in done.stdout, done.stderr
    one, other = (mx.load(str(tmp_path / folder / files[1].name)) for folder in "ab")
    assert one.keys() == other.keys()
    assert all(mx.array_equal(one[name], other[name]).item() for name in one)
    done = run(
        LANGUAGE_MODEL,
        *arguments,
        "--optimizer",
        "maxfactor",
        "--option",
        "momentum=0.9",
        "--output",
        "b",
        "--resume",
        cwd=tmp_path,
    )
    assert done.returncode != 0
    assert "momentum is 0.0 in the file, 0.9 here" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_new_run_in_an_old_folder_keeps_and_resumes_its_own(tmp_path):
    assert run(LANGUAGE_MODEL, *SMALL, "--save-every", "5", cwd=tmp_path).returncode == 0
    shorter = (*SMALL, "--steps", "8", "--keep", "1")
    assert run(LANGUAGE_MODEL, *shorter, cwd=tmp_path).returncode == 0
    folder = tmp_path / "runs" / "language_model"
    assert [file.name for file in folder.glob("*.safetensors")] == ["maxfactor-000008.safetensors"]
    done = run(LANGUAGE_MODEL, *shorter, "--resume", cwd=tmp_path)
    assert "after 8 steps" in done.stdout, done.stderr


def test_options_reach_the_optimizer(tmp_path):
    options = ("--option", "momentum=0.9", "--option", "cautious=true")
    done = run(LANGUAGE_MODEL, *options, *SMALL, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    row = next(line for line in done.stdout.splitlines() if "query" in line)
    assert int(row.split()[-1].replace(",", "")) == 4 * (16 * 16 + 16 + 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimizer", "sgd"], "'maxfactor'"),
        (["--compare", "muon,sgd"], "muon,sgd"),
        (["--compare", "muon", "--optimizer", "muon"], "not allowed with"),
        (["--steps", "0"], "--steps"),
        (["--batch-size", "x"], "--batch-size"),
        (["--learning-rate", "-1"], "--learning-rate"),
        (["--learning-rate", "nan"], "--learning-rate"),
        (["--width", "30", "--heads", "4"], "--width"),
        (["--context", "99999999"], "--context"),
        (["--output", "/dev/null"], "--output"),
        (["--stepz", "3"], "--stepz"),
        (["--option", "momentum=2.0"], "momentum must be in [0, 1), got 2.0"),
        (["--option", "speed=9"], "speed"),
        (["--option", "momentum=fast"], "momentum=fast"),
    ],
    ids=str,
)
def test_bad_arguments_get_one_line_and_status_2(arguments, message, tmp_path):
    done = run(LANGUAGE_MODEL, *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert message in done.stderr
    assert not done.stdout


def test_the_benchmark_prints_ratios(tmp_path):
    script = ROOT / "examples" / "benchmark_step.py"
    done = run(script, "--width", "16", "--layers", "1", "--rounds", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"Muon +mlx Muon +\d+\.\d\d \(\d", done.stdout)


def test_what_readme_shows_runs_and_prints_what_it_shows(tmp_path):
    readme = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", readme, re.S)
    table = re.search(r"plan before it makes a step:\n\n```\n(.*?)```", readme, re.S)
    assert table
    done = run("-c", "\n".join(blocks), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(blocks) == 3
    assert table.group(1) in done.stdout
