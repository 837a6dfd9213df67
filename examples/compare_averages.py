"""Measure what an average of the weights is worth at the end of a training.

    python examples/compare_averages.py language_model --steps 1500 --seed 1
    python examples/compare_averages.py speech --steps 1600 --seed 1

One run carries several averages at the same time. What is printed is the validation loss of the
last weights and of each average, for the default optimizer with and without momentum, with the
default schedule and at a constant rate.
"""

import argparse
import importlib
import sys
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from tqdm import trange

from mlx_maxfactor import WeightAverage, create_optimizer

DECAYS = (0.99, 0.998)
SCHEDULES = ("cosine", "constant")
SHARES = (0.1, 0.25)  # of the run, at its end


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure averages of the weights.")
    add = parser.add_argument
    add("task", choices=("language_model", "speech"))
    add("--steps", type=int, required=True)
    add("--seed", type=int, default=1)
    add("--schedules", nargs="+", choices=SCHEDULES, default=SCHEDULES)
    given = parser.parse_args()
    sys.argv = [f"train_{given.task}.py", f"--steps={given.steps}", f"--seed={given.seed}"]
    for momentum in (0.8, 0.0):
        for schedule in given.schedules:
            task = make_task(given.task)
            losses = train(task, given.steps, given.seed, momentum, schedule == "constant")
            cells = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
            print(f"{given.task}, {given.steps} steps, seed {given.seed}", end=", ")
            print(f"momentum {momentum:g}, {schedule}: {cells}", flush=True)


def make_task(name: str) -> Any:
    """The task of an example, with its default arguments."""
    module: Any = importlib.import_module(f"train_{name}")
    if name == "language_model":
        arguments, text = module.parse_arguments()
        return module.LanguageModel(text, arguments)
    arguments, clips = module.parse_arguments()
    return module.Speech(*clips, arguments)


def train(task: Any, steps: int, seed: int, momentum: float, constant: bool) -> dict[str, float]:
    """Validation losses of the last weights and of every average."""
    mx.random.seed(seed)
    model: nn.Module = task.model()
    options: dict[str, Any] = {"momentum": momentum, "max_grad_norm": 1.0, "skip_nonfinite": True}
    optimizer = create_optimizer(model, total_steps=steps, rules=task.rules(), **options)
    if constant:
        optimizer.learning_rate = peak_of(optimizer) / 3
    averages = {f"decay {decay}": WeightAverage(model, decay) for decay in DECAYS}
    averages |= {
        f"last {share:.0%}": WeightAverage(model, 1.0, start=round((1 - share) * steps))
        for share in SHARES
    }
    average_states = [average.state for average in averages.values()]
    state = [model.state, optimizer.state, average_states]
    loss_and_gradients = nn.value_and_grad(model, partial(task.loss, model))

    @partial(mx.compile, inputs=state, outputs=state)
    def step(*batch: mx.array) -> mx.array:
        loss, gradients = loss_and_gradients(*batch)
        optimizer.update(model, gradients)
        for average in averages.values():
            average.update(model)
        return loss

    random = np.random.default_rng(seed)
    for _ in trange(steps, leave=False):
        mx.eval(step(*task.training_batch(random)), state)
    losses = {"last weights": task.validate(model)["loss"]}
    for name, average in averages.items():
        with average.applied(model):
            losses[name] = task.validate(model)["loss"]
    return losses


def peak_of(optimizer: Any) -> float:
    """The largest rate of the hidden matrices' schedule."""
    return max(entry.rate for entry in optimizer.plan if entry.role in ("hidden", "first"))


if __name__ == "__main__":
    main()
