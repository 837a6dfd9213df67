"""Run an example as a user would."""

import os
import runpy
import subprocess
import sys

import pytest


def run(script, *arguments, cwd):
    """Run it to its end in its own process, with warnings as errors; capture its two outputs."""
    # One thread: OpenBLAS's threads in several processes would wait for each other here.
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "PYTHONWARNINGS": "error"}
    return subprocess.run(
        [sys.executable, str(script), *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


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
