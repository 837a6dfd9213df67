r"""Fine-tune a language model with mlx-lm's own trainer: LoRA, DoRA, QLoRA or all of its weights.

    python examples/finetune_mlx_lm.py
    python examples/finetune_mlx_lm.py --quantize --optimizer adamw
    python examples/finetune_mlx_lm.py --model mlx-community/Qwen3-0.6B-4bit --data my_data
    python examples/finetune_mlx_lm.py --config lora.yaml --iters 2000 --resume

Without ``--model`` and ``--data`` it builds a small llama and a task for it, see `small_llama.py`,
and needs no network. Arguments and YAML files are those of ``mlx_lm.lora``; more of them are
``--resume``, ``--quantize``, ``--option``, and our optimizers' names, see `mlx_lm_arguments.py`.
Ctrl-C leaves a checkpoint.

What mlx-lm does not do is in `Tuning`: checkpoints with the optimizer's state, and batches that go
on where a run was cut off. The rest is an ordinary mlx-lm program.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from copy import copy
from dataclasses import dataclass
from hashlib import sha256
from inspect import signature
from itertools import count, islice
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from matplotlib.figure import Figure
from mlx.optimizers import Optimizer, schedulers
from mlx.utils import tree_flatten
from mlx_lm import generate, load
from mlx_lm.convert import convert
from mlx_lm.lora import CONFIG_DEFAULTS
from mlx_lm.tuner.callbacks import TrainingCallback, get_reporting_callbacks
from mlx_lm.tuner.datasets import CacheDataset, load_dataset
from mlx_lm.tuner.trainer import TrainingArgs, evaluate, iterate_batches, train
from mlx_lm.tuner.utils import build_schedule, linear_to_lora_layers, print_trainable_parameters
from mlx_lm.utils import save_config
from mlx_lm_arguments import BAD_INPUT, EXAMPLE, MLX_OPTIMIZERS, one_line, parse_arguments
from small_llama import build_model, write_task
from tqdm import tqdm
from training import catching_interrupts, how_to_resume, option

from mlx_maxfactor import (
    CheckpointError,
    GuardedOptimizer,
    Schedule,
    adaptive_schedule,
    create_optimizer,
    load_checkpoint,
    save_checkpoint,
    warmup_cosine,
)

TOKENS = 16  # of a sample
GUARD = {"skip_nonfinite": True, "max_skipped": 20}
SCHEDULES = {"warmup_cosine": warmup_cosine, "adaptive_schedule": adaptive_schedule}
# A run that goes on with another of these would not be the run that was cut off.
KEPT = ("batch_size", "grad_accumulation_steps", "mask_prompt", "max_seq_length", "seed")
KEPT += ("fine_tune_type", "lora_parameters", "num_layers")


def main() -> None:
    parser, arguments = parse_arguments((__doc__ or "").partition("\n")[0])
    try:
        tuning = prepare(arguments)
    except BAD_INPUT as problem:
        parser.error(one_line(problem))
    except KeyboardInterrupt:
        parser.exit(130, "\ninterrupted before the first iteration\n")
    print_trainable_parameters(tuning.model)
    print_plan(tuning.optimizer)
    try:
        tuning.run()
        loss = tuning.validation_loss()
        print_results(tuning, loss)
        if arguments.test:
            test_loss = tuning.loss_on("test", arguments.test_batches)
            print(f"Test loss {test_loss:.3f}, Test ppl {math.exp(test_loss):.3f}.")
        save_results(tuning, loss)
    except FloatingPointError as problem:
        parser.exit(1, f"\n{parser.prog}: error: {problem}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"\n{tuning.how_to_resume}\n")
    print_what_to_do_next(arguments)


def print_plan(optimizer: Optimizer, most: int = 17) -> None:
    """Which parameter goes to which optimizer: the first layers of it, and the total."""
    rows = str(getattr(optimizer, "plan", "no plan: one of mlx's own optimizers")).splitlines()
    if (left_out := len(rows) - most - 2) > 0:
        rows[most:-2] = [f"... and {left_out} more"]
    print("\n".join(rows), flush=True)


def prepare(arguments: argparse.Namespace) -> Tuning:
    """All that can go wrong with what the user gave goes wrong here."""
    model, tokenizer = load_model(arguments)
    datasets = load_data(arguments, tokenizer)
    sample = Sample.before(model, tokenizer, datasets[1] or datasets[0])
    add_adapters(model, arguments)
    tuning = Tuning(model, make_optimizer(model, arguments), datasets, sample, arguments)
    if arguments.resume:
        tuning.resume()
    elif tuning.path.exists():
        print(f"{tuning.folder} holds {kept_run(tuning.path)}, which this one replaces; ", end="")
        print("--resume goes on with it")
    return tuning


# Model, data and optimizer, as mlx_lm.lora makes them


def load_model(arguments: argparse.Namespace) -> tuple[nn.Module, Any]:
    """A model folder, or a name on the hub; quantized if that was asked for."""
    if arguments.model is None:
        arguments.model = str(build_model("runs/small_llama"))
    if arguments.quantize:
        arguments.model = str(quantized(arguments.model))
    # mlx-lm 0.31, the last that Python 3.10 gets, has no such argument.
    trust = getattr(arguments, "trust_remote_code", None)
    settings = {"trust_remote_code": bool(trust)}
    asked: dict[str, Any] = {} if trust is None else settings
    with naming(f"model {arguments.model}"):
        return load(arguments.model, tokenizer_config=settings, **asked)[:2]


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Say in an error of mlx-lm's what it was about."""
    try:
        yield
    except (OSError, ValueError) as problem:
        raise ValueError(f"{what}: {problem}") from problem


def quantized(model: str) -> Path:
    """A copy in 4 bits beside the model: adapters need the very weights they were trained on."""
    there = Path(model)
    folder = (there.parent if there.exists() else Path("runs")) / f"{there.name}-4bit"
    if not folder.exists():
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        convert(model, str(partial), quantize=True)
        partial.rename(folder)
    return folder


def load_data(arguments: argparse.Namespace, tokenizer: Any) -> Sequence[Any]:
    """Sets for training, validation and the test, in any format that mlx-lm knows."""
    if arguments.data is None:
        arguments.data = str(write_task("runs/small_task"))
    arguments.train = True
    with naming(f"data {arguments.data}"):
        datasets = load_dataset(arguments, tokenizer)
    for name, data in zip(("training", "validation", "test"), datasets, strict=True):
        if 0 < len(data) < arguments.batch_size:
            raise ValueError(f"batch_size is {arguments.batch_size}, the {name} set {len(data)}")
    return datasets


def add_adapters(model: nn.Module, arguments: argparse.Namespace) -> None:
    """Freeze the model but for what is trained; give it adapters to train."""
    mx.random.seed(arguments.seed)
    model.freeze()
    layers: Any = model.layers
    if arguments.num_layers > len(layers):
        raise ValueError(f"num_layers is {arguments.num_layers}, the model has {len(layers)}")
    if arguments.fine_tune_type == "full":
        arguments.lora_parameters = None
        for layer in layers[-max(arguments.num_layers, 0) :]:
            layer.unfreeze()
    else:
        parameters, dora = arguments.lora_parameters, arguments.fine_tune_type == "dora"
        linear_to_lora_layers(model, arguments.num_layers, parameters, use_dora=dora)
    if arguments.resume_adapter_file is not None:
        model.load_weights(arguments.resume_adapter_file, strict=False)


def make_optimizer(model: nn.Module, arguments: argparse.Namespace) -> Optimizer:
    """The optimizer of that name, with its options of ``optimizer_config`` and ``--option``."""
    name = arguments.optimizer
    options = {
        **(arguments.optimizer_config.get(name) or {}),
        **dict(map(option, arguments.option)),
    }
    rate = arguments.learning_rate
    if arguments.lr_schedule:
        rate = make_schedule(**arguments.lr_schedule)
    if name in MLX_OPTIMIZERS:
        rate = CONFIG_DEFAULTS["learning_rate"] if rate is None else rate
        optimizer = GuardedOptimizer(MLX_OPTIMIZERS[name](rate, **options), **GUARD)
        optimizer.init(model.trainable_parameters())
        return optimizer
    options = {"pretrained": True, **GUARD, **options}
    return create_optimizer(model, name, learning_rate=rate, **options)


def make_schedule(name: str, arguments: list[float], **warmup: Any) -> Schedule:
    """One of mlx's by mlx-lm's rules, or one of ours. Its description tells it from another."""
    if name in SCHEDULES:
        try:
            return SCHEDULES[name](*arguments, **warmup)
        except TypeError as problem:
            takes = signature(SCHEDULES[name])
            raise ValueError(f"{problem}; it takes {takes}, as in {EXAMPLE}") from None
    if not hasattr(schedulers, name):
        raise ValueError(f"lr_schedule is one of {', '.join(SCHEDULES)} or mlx's, got {name!r}")
    function = build_schedule({"name": name, "arguments": arguments, **warmup})
    peak = max(arguments[:2]) if name == "linear_schedule" else arguments[0]
    return Schedule(function, f"{name}{tuple(arguments)}, {warmup}", peak=peak)


# Training


class Tuning(TrainingCallback):
    """What mlx-lm's trainer asks for batches, and tells how it goes.

    The trainer counts from 1 at each call. Here iterations are counted over the whole run, and
    the order of the batches follows from the seed and that count alone.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        datasets: Sequence[Any],
        sample: Sample,
        arguments: argparse.Namespace,
    ) -> None:
        self.model, self.optimizer, self.arguments = model, optimizer, arguments
        self.sample = sample
        sets = ("training", "validation", "test")
        self.sets = {name: CacheDataset(data) for name, data in zip(sets, datasets, strict=True)}
        self.epoch = self.count_batches("training")
        for name in sets[1:]:
            self.count_batches(name, most=1)
        self.identity = {name: getattr(arguments, name) for name in KEPT}
        self.identity["training set"] = digest(datasets[0])
        self.folder = Path(arguments.adapter_path)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / "checkpoint.safetensors"
        self.reporter = get_reporting_callbacks(
            arguments.report_to,
            arguments.project_name,
            arguments.adapter_path,
            cast(Any, vars(arguments)),
        )
        self.history: dict[str, list[dict[str, Any]]] = {"training": [], "validation": []}
        self.iteration = 0  # the one that is on, of the whole run
        self.saved = 0  # iterations that the checkpoint has
        self.skipped = 0  # iterations whose gradients were not finite
        self.interrupts: list[int] = []
        self.bar: tqdm[Any] = tqdm(disable=True)

    def count_batches(self, name: str, most: int | None = None) -> int:
        """How many batches of a set hold a token to learn or to be measured by; there must be one.

        It counts no further than ``most``.
        """
        data, a = self.sets[name], self.arguments
        if not data:
            return 0
        batches = full_batches(data, a.batch_size, a.max_seq_length)
        count = sum(1 for _ in islice(batches, most))
        if not count:
            raise ValueError(
                f"the {name} set has no token to learn: within max_seq_length={a.max_seq_length} "
                "there are only prompts, which mask_prompt leaves out; raise max_seq_length"
            )
        return count

    def resume(self) -> None:
        """Go back to the checkpoint, if there is one."""
        if not self.path.exists():
            print(f"no {self.path}: starting from the beginning")
            return
        a = self.arguments
        # mlx's own optimizers do not know what they were built with: what is given here counts.
        given = a.optimizer in MLX_OPTIMIZERS and a.learning_rate is not None and not a.lr_schedule
        rates = "here" if given else "built"
        extra = load_checkpoint(self.path, self.model, self.optimizer, rates=rates)
        for name, kept in extra["identity"].items():
            if kept != self.identity[name]:
                here = self.identity[name]
                raise CheckpointError(f"{name} is {kept} in {self.path}, {here} here")
        self.iteration = self.saved = extra["iteration"]
        self.history = extra["history"]
        print(f"resuming {self.path} after {self.saved} iterations", *extra.differences, sep="\n")

    def run(self) -> None:
        """Train on until ``iters`` iterations are done; mlx-lm's own reports go to a file."""
        a = self.arguments
        if self.iteration >= a.iters:
            print(f"nothing was trained: iters is {a.iters}, {self.iteration} are done")
            return
        save_config(dict(vars(a)), self.folder / "adapter_config.json")
        settings = TrainingArgs(
            batch_size=a.batch_size,
            iters=a.iters - self.iteration,
            val_batches=a.val_batches,
            steps_per_report=a.steps_per_report,
            steps_per_eval=a.steps_per_eval,
            steps_per_save=sys.maxsize,
            max_seq_length=a.max_seq_length,
            adapter_file=str(self.folder / "adapters.safetensors"),
            grad_checkpoint=a.grad_checkpoint,
            grad_accumulation_steps=a.grad_accumulation_steps,
        )
        with (
            (self.folder / "mlx_lm.log").open("a") as log,
            tqdm(desc=a.optimizer, total=a.iters, initial=self.iteration, unit="it") as self.bar,
            catching_interrupts(self.bar, "iteration") as self.interrupts,
            redirect_stdout(log),
        ):
            self.bar.set_postfix_str("compiling the first step")
            train(
                self.model,
                self.optimizer,
                self.sets["training"],
                self.sets["validation"],
                settings,
                iterate_batches=self.batches,
                training_callback=self,
            )

    # What the trainer asks for

    def batches(
        self, dataset: Any, batch_size: int, max_seq_length: int, loop: bool = False, **others: Any
    ) -> Iterator[Any]:
        """mlx-lm's batches; to train, from the iteration that is next, each epoch by its number."""
        settings = (dataset, batch_size, max_seq_length)
        seed = self.arguments.seed + 1  # older mlx-lm takes 0 for none
        if not loop:  # a validation: always the same batches
            yield from full_batches(*settings, seed=seed, **others)
            return
        first, skipped = divmod(self.iteration, self.epoch)
        for epoch in count(first):
            batches = full_batches(*settings, seed=seed + epoch, **others)
            for batch in islice(batches, skipped, None):
                self.iteration += 1
                yield batch
                # The trainer is back for another: this iteration is done and evaluated.
                self.bar.update(self.iteration - self.bar.n)
                if self.interrupts and self.save():
                    raise KeyboardInterrupt
            skipped = 0

    # What the trainer tells

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        """Keep the loss; leave a checkpoint where one is due."""
        self.keep("training", train_info, self.iteration)
        self.bar.update(self.iteration - self.bar.n)
        self.bar.set_postfix_str(
            f"loss {train_info['train_loss']:.3f}, rate {train_info['learning_rate']:.2g}"
        )
        due = (self.saved // self.arguments.save_every + 1) * self.arguments.save_every
        if self.iteration >= due or self.iteration == self.arguments.iters:
            self.save()

    def on_val_loss_report(self, val_info: dict[str, Any]) -> None:
        """Keep the loss, which is that of the iterations before."""
        self.keep("validation", val_info, self.iteration - 1)

    def keep(self, kind: str, info: dict[str, Any], iteration: int) -> None:
        """Add to the history, and tell whom ``report_to`` names."""
        info["iteration"] = iteration
        kept = self.history[kind]
        if not kept or kept[-1]["iteration"] < iteration:  # a resumed run validates once more
            kept.append(info)
        if self.reporter is not None:
            report = "on_train_loss_report" if kind == "training" else "on_val_loss_report"
            getattr(self.reporter, report)(dict(info))

    def save(self) -> bool:
        """Write checkpoint and adapters; False while the trainer holds gradients of its own.

        Raises:
            FloatingPointError: A weight is not finite, or too many iterations were skipped; the
                files stay as they are.
        """
        if self.iteration % self.arguments.grad_accumulation_steps:
            return False
        trained = dict(leaves(self.model.trainable_parameters()))
        if odd := [path for path, x in trained.items() if not mx.all(mx.isfinite(x)).item()]:
            kept = (
                f"{self.path} keeps {self.saved} iterations" if self.saved else "nothing is saved"
            )
            raise FloatingPointError(
                f"after iteration {self.iteration} {odd[0]} holds an inf or a NaN: {kept}"
            )
        self.skipped = int(getattr(self.optimizer, "skipped", 0))
        save_checkpoint(
            self.path,
            self.model,
            self.optimizer,
            weights="trainable",
            iteration=self.iteration,
            identity=self.identity,
            history=self.history,
        )
        self.saved = self.iteration
        mx.save_safetensors(str(self.folder / "adapters.safetensors"), trained)
        return True

    @property
    def how_to_resume(self) -> str:
        """One line, to print where a run was cut off."""
        if not self.saved:
            return "interrupted before there was a checkpoint"
        return f"{self.path} has {self.saved} iterations; {how_to_resume()}"

    # What came of it

    def validation_loss(self) -> float | None:
        """Of the model as it is now, on the batches that the trainer's validations had."""
        return self.loss_on("validation", self.arguments.val_batches)

    def loss_on(self, name: str, count: int) -> Any:
        """Nats a token on so many batches of a set, all for -1; None if it is empty."""
        data, a = self.sets[name], self.arguments
        if not data:
            return None
        settings = (a.batch_size, count, a.max_seq_length)
        return evaluate(self.model, data, *settings, iterate_batches=self.batches)


def full_batches(*settings: Any, **others: Any) -> Iterator[Any]:
    """mlx-lm's batches, without those in which no token counts: their mean loss is a NaN."""
    for tokens, spans in iterate_batches(*settings, **others):
        last = tokens.shape[1] - 1
        if any(min(end, last) >= max(start, 1) for start, end in cast(Any, spans.tolist())):
            yield tokens, spans


def kept_run(path: Path) -> str:
    """How long the run of a checkpoint is, from its header alone; any file may lie there."""
    try:
        metadata = cast(Any, mx.load(str(path), return_metadata=True))[1]
        return f"a run of {json.loads(metadata['extra'])['iteration']} iterations"
    except (RuntimeError, KeyError, TypeError, ValueError):
        return "a run"


def digest(dataset: Any) -> str:
    """What tells this data from other data."""
    hash = sha256()
    for i in range(len(dataset)):
        hash.update(json.dumps(dataset[i], default=str).encode())
    return hash.hexdigest()[:16]


# Results


@dataclass
class Sample:
    """What the model makes of the first prompt of a data set."""

    tokenizer: Any
    prompt: list[int]
    wanted: list[int]
    untuned: str = ""

    @classmethod
    def before(cls, model: nn.Module, tokenizer: Any, dataset: Any) -> Sample:
        """Take the untuned model's; of a plain text, the first half is the prompt."""
        masked = copy(dataset)
        masked.mask_prompt = True
        tokens, offset = masked.process(masked[0])
        offset = offset or len(tokens) // 2
        sample = cls(tokenizer, tokens[:offset], tokens[offset : offset + TOKENS])
        sample.untuned = sample.written_by(model)
        return sample

    def written_by(self, model: nn.Module) -> str:
        """The likeliest continuation of the prompt."""
        return generate(model, self.tokenizer, self.prompt, max_tokens=TOKENS)

    def print(self, model: nn.Module) -> None:
        """What was wanted, what came before and what comes now."""
        decode = self.tokenizer.decode
        texts = (decode(self.prompt), decode(self.wanted), self.untuned, self.written_by(model))
        for name, text in zip(("prompt", "wanted", "before", "after"), texts, strict=True):
            print(f"{name:8} {text!r}")


def print_results(tuning: Tuning, loss: float | None) -> None:
    """The loss before and after, beside what it took; a sample of each."""
    history, optimizer, arguments = tuning.history, tuning.optimizer, tuning.arguments
    trained = sum(array.size for _, array in leaves(tuning.model.trainable_parameters()))
    state = sum(array.nbytes for _, array in leaves(optimizer.state))
    kind = ("q" if arguments.quantize else "") + arguments.fine_tune_type
    row = "{:24} {:>11} {:>11} {:>13} {:>10} {:>9}"
    print("\n" + row.format("", "validation", "trained", "optimizer", "tokens", "peak").rstrip())
    print(row.format("", "loss", "parameters", "state, bytes", "a second", "memory"))
    if loss is not None:
        before = history["validation"][0]["val_loss"]
        print(row.format("before", f"{before:.3f}", *[""] * 4).rstrip())
    speeds = [info["tokens_per_second"] for info in history["training"]]
    print(
        row.format(
            f"{kind}, {arguments.optimizer}",
            "" if loss is None else f"{loss:.3f}",
            f"{trained:,}",
            f"{state:,}",
            f"{sorted(speeds)[len(speeds) // 2]:,.0f}",
            f"{max(info['peak_memory'] for info in history['training']):.2f} GB",
        )
    )
    if tuning.skipped:
        print(f"{tuning.skipped} iterations were skipped: their gradients were not finite")
    print()
    tuning.sample.print(tuning.model)


def leaves(tree: Any) -> list[tuple[str, mx.array]]:
    return cast(Any, tree_flatten(tree))


def save_results(tuning: Tuning, loss: float | None) -> None:
    """Write losses.json and losses.png."""
    folder = tuning.folder
    results = {"final validation loss": loss, "arguments": vars(tuning.arguments)}
    text = json.dumps({**results, **tuning.history})
    finite = json.loads(text, parse_constant=lambda _: None)  # JSON has no NaN
    (folder / "losses.json").write_text(json.dumps(finite, indent=1), encoding="utf-8")
    figure = Figure(figsize=(10, 6), dpi=100, layout="constrained")
    losses, rates = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    training, validation = tuning.history["training"], tuning.history["validation"]
    steps = [info["iteration"] for info in training]
    losses.plot(steps, [info["train_loss"] for info in training], label="training")
    points = [(info["iteration"], info["val_loss"]) for info in validation]
    if loss is not None:
        points.append((tuning.iteration, loss))
        losses.plot(*zip(*points, strict=True), "o-", label="validation")
    losses.set(ylabel="nats per token", title=f"{tuning.arguments.model}, {tuning.folder}")
    losses.legend()
    rates.plot(steps, [info["learning_rate"] for info in training])
    rates.set(xlabel="iteration", ylabel="learning rate", ylim=0)
    figure.savefig(folder / "losses.png")


def print_what_to_do_next(arguments: argparse.Namespace) -> None:
    model, adapters = arguments.model, arguments.adapter_path
    print(f"\nlosses   {adapters}/losses.png and {adapters}/losses.json")
    print(f"use it   mlx_lm.generate --model {model} --adapter-path {adapters} --prompt ...")
    # Quantized again, the fused weights would lose part of what was learned.
    whole = " --dequantize" if arguments.quantize else ""
    print(
        f"fuse it  mlx_lm.fuse --model {model} --adapter-path {adapters} --save-path fused{whole}"
    )


if __name__ == "__main__":
    main()
