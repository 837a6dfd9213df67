"""Run an example, or the command ``mlx-maxfactor``, as a user would."""

import os
import re
import runpy
import shutil
import subprocess
import sys

import mlx.core as mx
import pytest

from mlx_maxfactor.commands import main


def run(script, *arguments, cwd, fails=False):
    """Run it in its own process, with warnings as errors; capture what it prints.

    Assert that it succeeds, or that it fails.
    """
    # One thread: OpenBLAS's threads in several processes would wait for each other here.
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "PYTHONWARNINGS": "error"}
    command = [sys.executable, str(script), *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert bool(done.returncode) == fails, done.stderr
    return done


def assert_resumes_exactly(script, *arguments, cwd):
    """Assert that a run that continues from its first file ends as the run that wrote both.

    Returns the output of the whole run and the arrays of its last file.
    """
    whole = run(script, *arguments, "--output", "a", cwd=cwd)
    first, last = sorted((cwd / "a").glob("*.safetensors"))
    (cwd / "b").mkdir()
    shutil.copy(first, cwd / "b")
    resumed = run(script, *arguments, "--output", "b", "--resume", cwd=cwd)
    assert f"after {int(first.stem[-6:])} steps" in resumed.stdout, resumed.stderr
    one, other = mx.load(str(last)), mx.load(str(cwd / "b" / last.name))
    assert one.keys() == other.keys()
    assert all(mx.array_equal(one[name], other[name]).item() for name in one)
    return whole.stdout, one


def error_of(arguments, capsys, code=2, alone=True):
    """The error of ``mlx-maxfactor``: its last line, and its only one unless ``alone`` is False."""
    with pytest.raises(SystemExit) as end:
        main([*map(str, arguments)])
    *before, last = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == code, last
    assert re.match("mlx-maxfactor.*: error: ", last)
    assert not (alone and before)
    return last


def assert_refused(script, arguments, message, capsys, monkeypatch):
    """Assert that it ends with status 2 and one line; in this process, because it starts sooner."""
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(script), run_name="__main__")
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert len(printed.err.splitlines()) == 1
    assert message in printed.err
    return printed.out
