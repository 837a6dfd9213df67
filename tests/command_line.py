"""An example as a user starts it."""

import os
import subprocess
import sys


def run(script, *arguments, cwd):
    """Run it to its end, where a warning is an error; what it printed is kept apart."""
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
