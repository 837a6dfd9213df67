"""Ranks on loopback: a script started once a rank, as ``mlx.launch --backend ring`` does."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import mlx.core as mx

ROOT = Path(__file__).parent.parent
PATH = ":".join(str(ROOT / folder) for folder in (".", "examples", "tests"))


def is_available():
    return mx.distributed.is_available() and sys.platform != "win32"


def start(ranks, script, *arguments, folder, **options):
    """One process a rank; ``folder`` takes the list of their addresses."""
    sockets = [socket.socket() for _ in range(ranks)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    hosts = [[f"127.0.0.1:{s.getsockname()[1]}"] for s in sockets]
    for s in sockets:
        s.close()
    addresses = Path(folder) / "hosts.json"
    addresses.write_text(json.dumps(hosts))
    command = [sys.executable, str(Path(__file__).parent / script), *map(str, arguments)]
    return [
        subprocess.Popen(
            command,
            env={
                **os.environ,
                "MLX_RANK": str(rank),
                "MLX_HOSTFILE": str(addresses),
                "PYTHONPATH": PATH,
            },
            text=True,
            **options,
        )
        for rank in range(ranks)
    ]


def run(ranks, script, *arguments, folder, timeout=120):
    """Run a script on all ranks; what each of them printed."""
    pipe = subprocess.PIPE
    started = start(ranks, script, *arguments, folder=folder, stdout=pipe, stderr=pipe)
    try:
        outputs = [process.communicate(timeout=timeout) for process in started]
    finally:
        for process in started:
            process.kill()
    for rank, (process, (out, err)) in enumerate(zip(started, outputs, strict=True)):
        assert process.returncode == 0, f"rank {rank} of {ranks}:\n{out}{err}"
    return [out for out, _ in outputs]
