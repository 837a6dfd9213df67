"""``mlx-maxfactor lora``: fine-tune with mlx-lm, our optimizers, and checkpoints that resume.

Ctrl-C, SIGTERM and SIGHUP leave a checkpoint.
"""

import json
import shlex
import signal
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.optimizers import Optimizer
from mlx_lm.tuner.utils import load_adapters, print_trainable_parameters
from tqdm import tqdm

from ..engine.trees import flatten
from ..finetuning import models
from ..finetuning.data import describe_lengths, load_data
from ..finetuning.model_config import read_config
from ..finetuning.optimizer_names import make_optimizer
from ..finetuning.tuning import Progress, Tuning
from .lora_arguments import optimizer_options, parse_arguments
from .terminal import BAD_INPUT, OneLineParser, catching_interrupts, one_line


def main(argv: Sequence[str]) -> int:
    """Fine-tune. Returns the exit status."""
    parser = OneLineParser(prog="mlx-maxfactor lora")
    try:
        parser, arguments = parse_arguments(argv)
        tuning = prepare(arguments)
    except BAD_INPUT as problem:
        parser.error(problem)
    except KeyboardInterrupt:
        parser.exit(130, "\ninterrupted before the first iteration\n")
    try:
        if arguments.train:
            train(tuning)
        if arguments.test:
            loss = tuning.loss_on("test", arguments.test_batches)
            print(f"Test loss {loss:.3f}, Test ppl {np.exp(loss):.3f}.")
    except BAD_INPUT as problem:
        less = "; try a smaller --batch-size or --max-seq-length" * ("llocate" in str(problem))
        parser.exit(1, f"\n{parser.prog}: error: {one_line(problem)}{less}\n")
    except KeyboardInterrupt:
        number = next(iter(tuning.interrupts), signal.SIGINT)
        parser.exit(128 + number, f"\n{how_to_resume(tuning, argv)}\n")
    return 0


def prepare(arguments: Namespace) -> Tuning:
    """Model, data, optimizer and checkpoint. Wrong input fails here, before any training."""
    if (ranks := mx.distributed.init().size()) > 1:
        raise ValueError(
            f"this command trains on one machine, and was started on {ranks} ranks: for several, "
            "use create_optimizer(model, group=...) in a program"
        )
    tests_only = arguments.test and not arguments.train
    arguments.train = not tests_only
    if arguments.cache_limit is not None:
        mx.set_cache_limit(arguments.cache_limit)
    if (Path(arguments.model) / "config.json").is_file():
        read_config(arguments.model)
    model, tokenizer = models.load_model(arguments.model, bool(arguments.trust_remote_code))
    datasets = load_data(arguments, tokenizer)
    if tests_only:
        with models.prefixing_errors(f"adapters {arguments.adapter_path}", arguments.adapter_path):
            if arguments.adapter_path:  # an empty path tests the base model, as in mlx-lm
                load_adapters(model, arguments.adapter_path)
        return Tuning(model, None, datasets, arguments)
    if not datasets["validation"] and (arguments.keep_best or arguments.patience):
        raise ValueError("keep_best and patience need a validation set: valid.jsonl in the folder")
    mx.random.seed(arguments.seed)
    kind, parameters = arguments.fine_tune_type, arguments.lora_parameters
    arguments.num_layers = models.add_adapters(model, kind, arguments.num_layers, parameters)
    if kind == "full":
        arguments.lora_parameters = None
    if arguments.resume_adapter_file is not None:
        models.load_adapters_into(model, arguments.resume_adapter_file)
    tuning = Tuning(model, optimizer_of(model, arguments), datasets, arguments)
    resume(tuning)
    return tuning


def optimizer_of(model: nn.Module, arguments: Namespace) -> Optimizer:
    """The optimizer with the options of the YAML file and of ``--option``."""
    rates = {"learning_rate": arguments.learning_rate, "lr_schedule": arguments.lr_schedule}
    return make_optimizer(model, arguments.optimizer, **rates, **optimizer_options(arguments))


def resume(tuning: Tuning) -> None:
    """Go back to the checkpoint if that is asked for, and say what becomes of one that is there."""
    arguments = tuning.arguments
    if arguments.resume and tuning.path.exists():
        print(f"resuming {tuning.path}", *tuning.resume(), sep="\n")
        print(f"{tuning.saved} of {arguments.iters} iterations are done")
    elif arguments.resume:
        print(f"there is no {tuning.path} yet: starting from the beginning")
    elif tuning.path.exists():
        print(f"{tuning.path} is replaced by this run; --resume would continue it")


def train(tuning: Tuning) -> None:
    """Run to the end, print the results, and write them to ``losses.json``."""
    arguments = tuning.arguments
    print_trainable_parameters(tuning.model)
    print_plan(tuning.optimizer)
    print_notes(tuning)
    if tuning.iteration >= arguments.iters:
        print(f"nothing is left to train: iters is {arguments.iters}, {tuning.iteration} are done")
    elif not tuning.has_stopped:
        bar = {"desc": arguments.optimizer, "total": arguments.iters, "unit": "it"}
        with tqdm(initial=tuning.iteration, file=Progress(), **bar) as tuning.bar:
            note = "stopping after this iteration"
            with catching_interrupts(lambda: tuning.bar.set_postfix_str(note)) as caught:
                tuning.interrupts = caught
                tuning.bar.set_postfix_str("compiling the first step")
                tuning.run()
    if tuning.has_stopped:
        best, iteration = tuning.best
        print(
            f"stopped after {tuning.iteration} iterations: for {arguments.patience} validations "
            f"(patience) no loss was below {best:.3f}, that of iteration {iteration}"
        )
    loss = tuning.loss_on("validation", arguments.val_batches)
    if loss is not None:
        if not np.isfinite(loss):
            raise FloatingPointError(
                f"the validation loss is {loss} after {tuning.iteration} iterations: the run has "
                "diverged; start again with a smaller --learning-rate"
            )
        tuning.keep_if_best(loss, tuning.iteration)
    print_results(tuning, loss)
    save_results(tuning, loss)
    print_what_to_do_next(tuning)


def print_notes(tuning: Tuning) -> None:
    """What to know before the run: how schedules count, samples that are cut."""
    a = tuning.arguments
    if a.lr_schedule and a.grad_accumulation_steps > 1:
        updates = a.iters // a.grad_accumulation_steps
        print(f"lr_schedule counts updates: {a.iters} iterations are {updates}", file=Progress())
    for name, data in tuning.sets.items():
        for note in describe_lengths(name, data, a.batch_size, a.max_seq_length):
            print(f"warning: {note}", file=Progress())


def print_plan(optimizer: Optimizer, most: int = 17) -> None:
    """Which parameter goes to which optimizer: the first rows of the plan, and the total."""
    rows = str(getattr(optimizer, "plan", "no plan: this is one of mlx's optimizers")).splitlines()
    if (left_out := len(rows) - most - 2) > 0:
        rows[most:-2] = [f"... and {left_out} more"]
    print("\n".join(rows), flush=True)


def how_to_resume(tuning: Tuning, argv: Sequence[str]) -> str:
    """One line to print where a run was interrupted."""
    if not tuning.saved:
        return "interrupted before there was a checkpoint"
    again = ["mlx-maxfactor", "lora", *(a for a in argv if a != "--resume"), "--resume"]
    return f"{tuning.path} has {tuning.saved} iterations; continue with: {shlex.join(again)}"


def print_results(tuning: Tuning, loss: float | None) -> None:
    """Loss, speed and memory."""
    history, arguments = tuning.history, tuning.arguments
    row = "{:24} {:>11} {:>11} {:>13} {:>10} {:>9}"
    print("\n" + row.format("", "validation", "trained", "optimizer", "tokens", "peak").rstrip())
    print(row.format("", "loss", "parameters", "state, bytes", "a second", "memory"))
    if loss is not None and history["validation"]:
        before = history["validation"][0]["val_loss"]
        print(row.format("before", f"{before:.3f}", *[""] * 4).rstrip())
    speeds = [info["tokens_per_second"] for info in history["training"]] or [0.0]
    peak = max((info["peak_memory"] for info in history["training"]), default=0.0)
    trained: Any = tuning.model.trainable_parameters()
    print(
        row.format(
            f"{arguments.fine_tune_type}, {arguments.optimizer}",
            "" if loss is None else f"{loss:.3f}",
            f"{sum(array.size for array in flatten(trained).values()):,}",
            f"{models.bytes_of(tuning.optimizer.state):,}",
            f"{sorted(speeds)[len(speeds) // 2]:,.0f}",
            f"{peak:.2f} GB",
        )
    )
    if tuning.skipped:
        print(f"{tuning.skipped} iterations were skipped: their gradients were not finite")


def save_results(tuning: Tuning, loss: float | None) -> None:
    """Write losses.json."""
    results = {"final validation loss": loss, "arguments": vars(tuning.arguments)}
    text = json.dumps({**results, **tuning.history})
    finite = json.loads(text, parse_constant=lambda _: None)  # JSON has no NaN
    path = tuning.folder / "losses.json"
    with models.prefixing_errors(str(path)):
        path.write_text(json.dumps(finite, indent=1), encoding="utf-8")


def print_what_to_do_next(tuning: Tuning) -> None:
    """Where the losses are, and how to use the adapters."""
    arguments = tuning.arguments
    used = ["--model", arguments.model, "--adapter-path", arguments.adapter_path]
    # Quantized again, the fused weights would lose part of what was learned.
    whole = ["--dequantize"] if models.bits_of(tuning.model) else []
    print(f"\nlosses   {tuning.folder / 'losses.json'}")
    if arguments.keep_best:
        loss, iteration = tuning.best
        print(f"best     {tuning.folder / 'best'}: {loss:.3f} after {iteration} iterations")
    print(f"use it   {shlex.join(['mlx_lm.generate', *used, '--prompt', '...'])}")
    print(f"fuse it  {shlex.join(['mlx_lm.fuse', *used, '--save-path', 'fused', *whole])}")
