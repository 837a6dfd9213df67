"""A run that saves after every step, until it is killed or has made all its steps.

python killed_run.py CHECKPOINT STEPS [SECONDS [STALL]]

Several ranks share the updates and draw the same data, so the steps do not depend on the number of
ranks. SECONDS bounds each step. Before step STALL the second rank stops, and that step is bounded
by one second.
"""

import os
import signal
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from mlx_maxfactor import (
    bounded_wait,
    create_optimizer,
    load_checkpoint,
    save_checkpoint,
    warmup_cosine,
)

EIGHT_BITS = {"momentum": 0.8, "state_dtype": mx.int8}


def build(hidden="orthomaxfactor", steps=40, **options):
    """A small bf16 model, an optimizer with every kind of state, and a step that draws its data."""
    mx.random.seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Linear(16, 3))
    model.set_dtype(mx.bfloat16)
    options |= {"learning_rate": warmup_cosine(0.02, steps, 5, start_ratio=0.2)}
    options |= {"rounding": "stochastic", "max_grad_norm": 1.0, "skip_nonfinite": True}
    optimizer = create_optimizer(model, hidden, **options)

    def step():
        x = mx.random.normal((4, 8)).astype(mx.bfloat16)
        loss = lambda: (model(x) - x[:, :3]).square().mean()  # noqa: E731
        _, gradients = nn.value_and_grad(model, loss)()
        optimizer.update(model, gradients)
        mx.eval(model.state, optimizer.state)

    return model, optimizer, step


if __name__ == "__main__":
    path, steps = Path(sys.argv[1]), int(sys.argv[2])
    seconds = float(sys.argv[3]) if len(sys.argv) > 3 else 300.0
    stall = int(sys.argv[4]) if len(sys.argv) > 4 else None
    group = mx.distributed.init()
    model, optimizer, step = build(**EIGHT_BITS, group=group)
    done = load_checkpoint(path, model, optimizer)["done"] if path.exists() else 0
    print("ready", flush=True)
    while done < steps:
        stalls = done + 1 == stall
        if stalls and group.rank() == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        with bounded_wait(1.0 if stalls else seconds):
            step()
            done += 1
            save_checkpoint(path, model, optimizer, done=done)
        print("saved", flush=True)
