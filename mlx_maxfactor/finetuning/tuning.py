"""A fine-tuning run in mlx-lm's own trainer, with checkpoints that resume bit for bit.

mlx-lm's trainer saves weights alone, and its batches follow NumPy's global random state. `Tuning`
adds what is missing: checkpoints with the optimizer's state, and batches that go on where the run
stopped. The batches and their order are mlx-lm's, so a run without an interruption ends as
``mlx_lm.lora`` does.
"""

import math
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.optimizers import Optimizer
from mlx_lm.tuner.callbacks import TrainingCallback, get_reporting_callbacks
from mlx_lm.tuner.trainer import TrainingArgs, evaluate, iterate_batches, train
from mlx_lm.utils import save_config
from tqdm import tqdm

from ..checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from ..checkpoint.file import check_target, write
from ..engine.trees import flatten
from .data import name_of_data
from .models import prefixing_errors
from .optimizer_names import MLX_OPTIMIZERS

# A run that went on with another of these would not be the run that was interrupted.
KEPT = ("batch_size", "grad_accumulation_steps", "mask_prompt", "max_seq_length", "seed")
KEPT += ("fine_tune_type", "lora_parameters", "num_layers", "steps_per_eval")

WRITTEN = ("checkpoint.safetensors", "adapters.safetensors", "adapter_config.json", "losses.json")
"""What a run writes to its folder, beside the log."""

DATA = ("training set", "validation set")
"""What may differ on purpose: a repaired line changes it."""

NEW_RUN = "start a new run from adapters.safetensors in its folder with --resume-adapter-file"
REMEDY = f"give the options of the interrupted run, or {NEW_RUN}"


class Finished(Exception):  # noqa: N818
    """Raised in mlx-lm's trainer to end it where all is saved: it would save once more itself."""


class Progress:
    """A file, or the standard error, for progress. A run goes on where it cannot be written."""

    def __init__(self, path: Path | None = None):
        self.path = path

    def write(self, text: str) -> int:
        """Write, if that is possible."""
        with suppress(OSError, ValueError):
            settings: Any = {"encoding": "utf-8", "errors": "backslashreplace"}
            place = self.path.open("a", **settings) if self.path else nullcontext(sys.stderr)
            with place as file:
                print(text, end="", file=file, flush=True)
        return len(text)

    def isatty(self) -> bool:
        """A log is no terminal: mlx-lm's trainer would draw in it, and take over standard error."""
        return self.path is None and sys.stderr.isatty()

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)

    def flush(self) -> None:
        """Nothing is left to write."""


class BatchOrder:
    """mlx-lm's order of batches: the permutations that NumPy draws from one seed.

    A permutation is drawn for each epoch and for each validation. The state at the start of the
    epoch and the position in it are all that a checkpoint needs.

    Attributes:
        epoch: NumPy's state at the start of the current epoch.
        position: Batches of the epoch that were handed out.
        state: NumPy's state now.
        first: NumPy's state at the first validation.
    """

    def __init__(self, seed: int):
        self.state = self.epoch = self.first = np.random.RandomState(seed).get_state()
        self.position = 0

    @contextmanager
    def drawing(self, state: Any, keep: bool = False) -> Iterator[None]:
        """Let mlx-lm draw from this state. ``keep`` the state afterwards."""
        before = np.random.get_state()
        np.random.set_state(state)
        try:
            yield
            if keep:
                self.state = np.random.get_state()
        finally:
            np.random.set_state(before)

    def description(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON."""
        states = {name: getattr(self, name) for name in ("epoch", "state", "first")}
        kept = {name: [key, [*map(int, x)], *rest] for name, (key, x, *rest) in states.items()}
        return {**kept, "position": self.position}

    def restore(self, description: dict[str, Any]) -> None:
        """Go back to what :meth:`description` returned."""
        vars(self).update(description)


class Tuning(TrainingCallback):
    """A run: it gives mlx-lm's trainer its batches, and keeps what the trainer reports.

    The trainer counts iterations from 1 at each call. Here they are counted over the whole run.

    Args:
        model: The model, with its adapters.
        optimizer: Its optimizer. None: the model is only tested.
        datasets: Sets by "training", "validation" and "test", see ``data.load_data``.
        arguments: mlx-lm's arguments, see ``commands.lora_arguments``.

    Attributes:
        iteration: The current iteration of the whole run, from 1.
        saved: Iterations that the checkpoint contains.
        path: The checkpoint.
        best: The lowest validation loss, and after how many iterations.
        skipped: Iterations whose gradients were not finite.
        history: What the trainer reported, by "training" and "validation".

    Raises:
        ValueError: A set has no token to learn.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None,
        datasets: Mapping[str, Any],
        arguments: Namespace,
    ):
        self.model, self.arguments = model, arguments
        self.optimizer: Any = optimizer
        self.sets = datasets
        for name in datasets:
            self._check_tokens(name)
        self.identity = {name: getattr(arguments, name) for name in KEPT}
        self.folder = Path(arguments.adapter_path)
        self.path = self.folder / "checkpoint.safetensors"
        if optimizer is not None:
            for name in WRITTEN:
                if (self.folder / name).is_dir():
                    raise ValueError(f"{self.folder / name} is a folder: remove it")
            check_target(self.path)
            sets = (datasets["training"], datasets["validation"])
            self.identity |= {k: x and x.digest() for k, x in zip(DATA, sets, strict=True)}
            folder = self.folder / "best" if arguments.keep_best else self.folder
            with prefixing_errors(f"adapter_path {folder}: no folder can be made there"):
                folder.mkdir(parents=True, exist_ok=True)
        with prefixing_errors(f"report_to {arguments.report_to}"):
            places = (arguments.report_to, arguments.project_name, arguments.adapter_path)
            self.reporter = get_reporting_callbacks(*places, cast(Any, vars(arguments)))
        self.order = BatchOrder(arguments.seed)
        self.history: dict[str, list[dict[str, Any]]] = {"training": [], "validation": []}
        self.iteration = self.saved = self.skipped = 0
        self.best: tuple[float, int] = (math.inf, 0)
        self.interrupts: list[int] = []
        self.bar: tqdm[Any] = tqdm(disable=True)

    def _check_tokens(self, name: str) -> None:
        data, a = self.sets[name], self.arguments
        if data and not any(full_batches(data, a.batch_size, a.max_seq_length)):
            raise ValueError(
                f"{name_of_data(a)}: the {name} set has no token to learn: within max_seq_length="
                f"{a.max_seq_length} there are only prompts, which mask_prompt leaves out; raise "
                "max_seq_length"
            )

    def resume(self) -> list[str]:
        """Go back to the checkpoint. Returns what differs from it and may differ.

        Adapters are written after the checkpoint, so a killed run may have left older ones: they
        are written again.

        Raises:
            FileNotFoundError: There is no checkpoint.
            CheckpointError: It belongs to another run.
        """
        a = self.arguments
        # MLX's optimizers do not know how they were built: a rate given here is used.
        given = a.optimizer in MLX_OPTIMIZERS and not a.lr_schedule and a.learning_rate is not None
        rates = "here" if given else "built"
        try:
            extra = load_checkpoint(self.path, self.model, self.optimizer, rates=rates)
        except CheckpointError as problem:
            first, *others = problem.problem.splitlines()
            found = f"{first} {'; '.join(map(str.strip, others))}".strip()
            if ": load an older" in found:  # this command keeps only one
                found = f"{found.partition(': load an older')[0]}: remove it, and {NEW_RUN}"
            raise CheckpointError(f"{found}; {REMEDY}" if problem.remedy else found) from problem
        if not isinstance(extra.get("identity"), dict):
            raise CheckpointError(f"{self.path} is not a checkpoint of mlx-maxfactor lora")
        notes = self._compare(extra["identity"])
        self.iteration = self.saved = extra["iteration"]
        self.history = extra["history"]
        self.best = self._saved_best()
        self.order.restore(extra["order"])
        self.write_adapters(self.folder)
        return [*extra.differences, *notes]

    def _saved_best(self) -> tuple[float, int]:
        """The best validation of the run so far: of the adapters in best/, if they are kept."""
        if self.arguments.keep_best:
            with suppress(RuntimeError, KeyError, ValueError):  # no such file, or a damaged one
                path = str(self.folder / "best" / "adapters.safetensors")
                metadata = cast(Any, mx.load(path, return_metadata=True))[1]
                return float(metadata["validation loss"]), int(metadata["iteration"])
            return self.best
        found = [(info["val_loss"], info["iteration"]) for info in self.history["validation"]]
        return min((x for x in found if math.isfinite(x[0])), default=self.best)

    def _compare(self, saved: Mapping[str, Any]) -> list[str]:
        """What differs from the interrupted run, and may. Raises CheckpointError for the rest."""
        odd = [name for name, here in self.identity.items() if saved.get(name) != here]
        changed = [f"the {name} is not that of {self.path}" for name in odd if name in DATA]
        different = [
            f"{name} is {saved.get(name)} in {self.path}, and {self.identity[name]} here"
            for name in odd
            if name not in DATA
        ]
        if different:
            raise CheckpointError(f"{'; '.join([*different, *changed])}; {REMEDY}")
        if changed and not self.arguments.allow_changed_data:
            raise CheckpointError(
                f"{'; '.join(changed)} (its lines, the tokenizer or the chat template changed): "
                "restore it, or continue with it by --allow-changed-data"
            )
        return changed

    def run(self) -> None:
        """Train until ``iters`` iterations are done. mlx-lm's own output goes to ``mlx_lm.log``.

        Raises:
            FloatingPointError: A weight is not finite, or too many steps in a row were skipped.
            KeyboardInterrupt: Ctrl-C, after a checkpoint was written.
        """
        a = self.arguments
        for folder in (self.folder, self.folder / "best")[: 1 + a.keep_best]:
            with prefixing_errors(str(folder / "adapter_config.json")):
                save_config(dict(vars(a)), folder / "adapter_config.json")
        names = {field.name for field in fields(TrainingArgs)}
        settings = TrainingArgs(**{name: x for name, x in vars(a).items() if name in names})
        settings.iters = a.iters - self.iteration
        settings.steps_per_save = sys.maxsize
        mx.reset_peak_memory()
        with redirect_stdout(Progress(self.folder / "mlx_lm.log")), suppress(Finished):
            train(
                self.model,
                self.optimizer,
                self.sets["training"],
                args=settings,
                iterate_batches=self.batches,
                training_callback=self,
            )

    def batches(self, dataset: Any, batch_size: int, max_seq_length: int, **_: Any) -> Iterator:
        """Training batches from the next iteration on, without end."""
        settings, every = (dataset, batch_size, max_seq_length), self.arguments.save_every
        while True:
            with self.order.drawing(self.order.epoch, keep=self.order.position == 0):
                remaining = islice(full_batches(*settings), self.order.position, None)
                batch = next(remaining, None)
            while batch is not None:
                self.order.position += 1
                self.iteration += 1
                self._validate_if_due()
                yield batch
                # The trainer asks for the next batch: this iteration is done and evaluated.
                self.bar.update(self.iteration - self.bar.n)
                ends = self.interrupts or self.has_stopped
                is_due = self.iteration // every > self.saved // every
                if (ends or is_due) and self.save() and ends:
                    raise KeyboardInterrupt if self.interrupts else Finished
                batch = next(remaining, None)
            self.order.epoch, self.order.position = self.order.state, 0

    def _validate_if_due(self) -> None:
        """Validate where mlx-lm does: at the first iteration, at multiples, at the last one."""
        a = self.arguments
        always = self.iteration == 1 or self.iteration % a.steps_per_eval == 0
        if not (always or self.iteration == a.iters) or not self.sets["validation"]:
            return
        before = self.order.state
        if self.iteration == 1:
            self.order.first = before
        if always:  # a longer run does not validate where this one ends
            with self.order.drawing(before, keep=True):
                next(iterate_batches(self.sets["validation"], a.batch_size, a.max_seq_length))
        start = time.perf_counter()
        # mlx-lm validates on other batches each time. To be compared, losses need the same ones.
        compared = a.keep_best or a.patience is not None
        loss = self.loss_on("validation", a.val_batches, None if compared else before)
        seconds = time.perf_counter() - start
        self._report("validation", {"val_loss": loss, "val_time": seconds}, self.iteration - 1)
        self.bar.write(f"iteration {self.iteration - 1}: validation loss {loss:.3f}", self.bar.fp)
        self.keep_if_best(loss, self.iteration - 1)
        self.model.train()

    def keep_if_best(self, loss: float, iteration: int) -> None:
        """Note the loss after so many iterations, and write the adapters if none was lower."""
        if loss < self.best[0]:
            self.best = (loss, iteration)
            if self.arguments.keep_best:
                about = {"validation loss": repr(loss), "iteration": str(iteration)}
                self.write_adapters(self.folder / "best", about)

    @property
    def has_stopped(self) -> bool:
        """Whether the last ``patience`` validations were all above the best one."""
        later = [x for x in self.history["validation"] if x["iteration"] > self.best[1]]
        patience = self.arguments.patience
        return patience is not None and len(later) >= patience

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        """Keep the loss, and write a checkpoint if it is the last one."""
        self._report("training", train_info, self.iteration)
        self.bar.update(self.iteration - self.bar.n)
        self.bar.set_postfix_str(
            f"loss {train_info['train_loss']:.3f}, rate {train_info['learning_rate']:.2g}"
        )
        if self.iteration == self.arguments.iters:
            self.save()
            raise Finished

    def _report(self, kind: str, info: dict[str, Any], iteration: int) -> None:
        info = {**info, "iteration": iteration}
        self.history[kind].append(info)
        if self.reporter is not None:
            report = "on_train_loss_report" if kind == "training" else "on_val_loss_report"
            with prefixing_errors(f"report_to {self.arguments.report_to}"):
                getattr(self.reporter, report)(dict(info))

    def save(self) -> bool:
        """Write checkpoint and adapters. Returns False while the trainer accumulates gradients.

        Raises:
            FloatingPointError: A weight is not finite, or too many iterations were skipped. The
                files stay as they are.
        """
        if self.iteration % self.arguments.grad_accumulation_steps:
            return False
        trained = flatten(self.model.trainable_parameters())
        if odd := [path for path, x in trained.items() if not mx.all(mx.isfinite(x)).item()]:
            kept = f"{self.path} keeps {self.saved} iterations"
            raise FloatingPointError(
                f"after iteration {self.iteration} {odd[0]} holds an inf or a NaN: "
                + (kept if self.saved else "nothing is saved")
            )
        self.skipped = int(getattr(self.optimizer, "skipped", 0))
        run: dict[str, Any] = {"iteration": self.iteration, "identity": self.identity}
        run |= {"history": self.history, "order": self.order.description()}
        save_checkpoint(self.path, self.model, self.optimizer, weights="trainable", **run)
        self.saved = self.iteration
        self.write_adapters(self.folder)
        return True

    def write_adapters(self, folder: Path, about: Mapping[str, str] | None = None) -> None:
        """Write the trained weights for mlx-lm, all of them or none, as checkpoints are."""
        weights = flatten(self.model.trainable_parameters())
        write(folder / "adapters.safetensors", weights, about or {})

    def loss_on(self, name: str, count: int, state: Any = None) -> Any:
        """Nats a token on so many batches of a set (-1: all of them). None if the set is empty.

        ``state`` is NumPy's, which picks the batches. None: those of the first validation.
        """
        data, a = self.sets[name], self.arguments
        if not data:
            return None
        with self.order.drawing(state or self.order.first):
            settings = (a.batch_size, count, a.max_seq_length)
            return evaluate(self.model, data, *settings, iterate_batches=full_batches)


def full_batches(*settings: Any, **others: Any) -> Iterator[Any]:
    """mlx-lm's batches of one epoch, without those that have no token to learn.

    The mean loss of such a batch is a NaN.
    """
    for tokens, spans in iterate_batches(*settings, **{**others, "loop": False}):
        last = tokens.shape[1] - 1
        if any(min(end, last) >= max(start, 1) for start, end in cast(Any, spans.tolist())):
            yield tokens, spans
