"""Start a script once for each rank, on loopback, as ``mlx.launch --backend ring`` does."""

import json
import os
import random
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import mlx.core as mx

HANGS = 900
"""Seconds after which a test gives up; on a busy machine, ranks wait long for each other."""

ROOT = Path(__file__).parent.parent
PATH = ":".join(str(ROOT / folder) for folder in (".", "examples", "tests"))


def is_available():
    return mx.distributed.is_available() and sys.platform != "win32"


def free_ports(count):
    """Consecutive free ports, below the range that outgoing connections use."""
    while True:
        first = random.SystemRandom().randrange(20_000, 32_000)
        with ExitStack() as held:
            try:
                for port in range(first, first + count):
                    held.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            return [*range(first, first + count)]


def start(ranks, script, *arguments, folder, **options):
    """Start one process for each rank; the list of their addresses is written to ``folder``."""
    hosts = [[f"127.0.0.1:{port}"] for port in free_ports(ranks)]
    addresses = Path(folder) / "hosts.json"
    addresses.write_text(json.dumps(hosts))
    command = [sys.executable, str(Path(__file__).parent / script), *map(str, arguments)]
    environment = os.environ | {"MLX_HOSTFILE": str(addresses), "PYTHONPATH": PATH}
    environments = [environment | {"MLX_RANK": str(rank)} for rank in range(ranks)]
    return [subprocess.Popen(command, env=x, text=True, **options) for x in environments]


def end(started):
    """End the processes that still run."""
    for process in started:
        process.kill()
    for process in started:
        process.communicate()


def run(ranks, script, *arguments, folder):
    """Run a script on all ranks; return what each of them printed.

    MLX's ring gives up when a rank comes late, as on a busy machine; then all ranks start again.
    """
    pipe = subprocess.PIPE
    for last in (False, False, True):
        started = start(ranks, script, *arguments, folder=folder, stdout=pipe, stderr=pipe)
        try:
            outputs = [process.communicate(timeout=HANGS) for process in started]
        finally:
            end(started)
        if last or not any("[ring]" in err for _, err in outputs):
            break
    for rank, (process, (out, err)) in enumerate(zip(started, outputs, strict=True)):
        assert process.returncode == 0, f"rank {rank} of {ranks}:\n{out}{err}"
    return [out for out, _ in outputs]
