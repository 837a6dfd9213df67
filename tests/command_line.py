"""Run an example as a user would, in a process of its own."""

import os
import subprocess
import sys


def run(script, *arguments, cwd):
    """Run the script to its end, with warnings as errors; capture its two outputs."""
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
