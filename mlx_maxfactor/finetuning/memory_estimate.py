"""Estimate the peak memory of a training step before anything of the model's size is allocated.

Weights and optimizer state follow from shapes. Activations, gradients and temporary arrays are
measured on this device, in the same compiled step as ``mlx-maxfactor lora`` makes, with one layer
of each kind at full width; each further layer adds what a second one of its kind added.
"""

import gc
import time
import timeit
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import combinations, product
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.optimizers import Optimizer
from mlx.utils import tree_map
from mlx_lm.lora import CONFIG_DEFAULTS
from mlx_lm.tuner.trainer import default_loss, grad_checkpoint

from ..engine.trees import flatten
from ..factory import estimate_state_bytes
from ..routing import OPTIMIZERS
from .layer_kinds import Plan, keep_layers, plan_of, whole
from .model_config import base_model, value_of
from .models import add_adapters, bytes_of, main_dtype, number_of_layers
from .optimizer_names import make_mlx_optimizer, make_optimizer, optimizer_names, with_defaults

Step = Callable[[Sequence[mx.array], Any, bool], tuple[mx.array, Any]]
"""From a batch, the gradients so far, and whether it is the last one: the loss, and gradients."""

BATCHES = 3
"""The most that are accumulated: a fourth batch needs what the third one did."""

SECONDS = 10.0
"""Models that cannot be measured in this time are measured at a part of their width."""

SHARES = (1 / 4, 1 / 2, 1)
"""Sequence lengths that are measured, as shares of the longest one."""

MARGIN = 1.04
"""Peaks vary by a few percent from run to run, and too little memory is worse than too much."""

FEW_TOKENS = 16
"""Length at which a step in 16 bits is measured on a CPU."""

LONGEST = 60.0
"""Seconds that a batch may take at the longest length. Where it takes more, the rest follows from
shorter lengths."""


@dataclass(frozen=True)
class Request:
    """A fine-tuning run: what its memory depends on.

    Attributes:
        config: The model's ``config.json``.
        optimizer: A name, see ``optimizers.optimizer_names``.
        options: Options of the optimizer.
        fine_tune_type: "lora", "dora" or "full".
        num_layers: How many of the last layers are trained; -1: all; None: 16, or all of fewer.
        lora_parameters: mlx-lm's: rank, scale, dropout and keys.
        batch_size: Sequences in a batch.
        max_seq_length: Tokens in a sequence.
        grad_checkpoint: Whether each layer's activations are computed again in the backward pass.
        grad_accumulation_steps: Batches for one update.
        dtype: Dtype of the weights that are not quantized; None: as the weights or the config say.
        bits: Bits of quantized weights; None: as the weights or the config say.
        folder: Where the config lies, perhaps beside weights.
    """

    config: Mapping[str, Any]
    optimizer: str = "orthomaxfactor"
    options: Mapping[str, Any] | None = None
    fine_tune_type: str = "lora"
    num_layers: int | None = None
    lora_parameters: Mapping[str, Any] | None = None
    batch_size: int = 4
    max_seq_length: int = 2048
    grad_checkpoint: bool = False
    grad_accumulation_steps: int = 1
    dtype: str | None = None
    bits: int | None = None
    folder: Path | None = None

    @cached_property
    def layers(self) -> int:
        """Layers of the model."""
        return len(cast(Any, self.base()).layers)

    @property
    def trained_layers(self) -> int:
        """Layers that are trained."""
        return number_of_layers(self.num_layers, self.layers)

    def base(self, halvings: int = 0) -> nn.Module:
        """The model before adapters, its width halved so often. No array of it is evaluated."""
        return base_model(self.config, self.folder, self.dtype, self.bits, halvings)

    def build(self, halvings: int = 0, *, every_layer: bool = False) -> nn.Module:
        """The model, ready to be trained. No array of it is evaluated.

        Args:
            halvings: How often the width is halved.
            every_layer: Train all layers. Default: as requested.
        """
        model = self.base(halvings)
        parameters = self.lora_parameters or CONFIG_DEFAULTS["lora_parameters"]
        trained = -1 if every_layer else self.num_layers
        add_adapters(model, self.fine_tune_type, trained, parameters, any_rank=halvings > 0)
        return model

    def state_bytes(self, model: nn.Module, name: str) -> int:
        """Bytes of the state of an optimizer, which may be another one, from shapes."""
        own = self.options if name == self.optimizer else None
        options = with_defaults(name, own or {})
        if name in OPTIMIZERS:
            return estimate_state_bytes(model, cast(Any, name), **options)
        theirs = make_mlx_optimizer(name, 1e-5, options)
        theirs.init(model.trainable_parameters())
        return bytes_of(theirs.state)


@dataclass(frozen=True)
class MemoryEstimate:
    """The peak memory of a training step, in bytes.

    Attributes:
        request: What was estimated.
        weights: Weights, adapters included.
        states: Optimizer state with each optimizer, by name.
        measured: What was measured, in words.
        device: The device that it was measured on, and holds for.
        lengths: Sequence lengths that were measured.
        steps: ``step`` of each of them.
    """

    request: Request
    weights: int
    states: Mapping[str, int]
    measured: str
    device: str
    lengths: Sequence[int]
    steps: Sequence[int]

    @property
    def state(self) -> int:
        """Optimizer state."""
        return self.states[self.request.optimizer]

    @property
    def step(self) -> int:
        """Activations, gradients and temporary arrays where they need most."""
        return round(float(_at_lengths(self.lengths, self.steps, self.request.max_seq_length)))

    @property
    def peak(self) -> int:
        """Everything together."""
        return self.weights + self.state + self.step

    def longest_sequence(self, limit: float) -> int:
        """Tokens of the longest sequence whose step fits into so many bytes, in steps of 32."""
        lengths = np.arange(32, 1 << 20, 32)
        step = _at_lengths(self.lengths, self.steps, lengths)
        too_long = np.flatnonzero(self.weights + self.state + step > limit)
        return int(lengths[too_long[0]] - 32 if len(too_long) else lengths[-1])


def estimate(request: Request, shares: Sequence[float] = SHARES) -> MemoryEstimate:
    """Estimate the peak of a request, measured at these shares of its sequence length."""
    model = request.build()
    weights = bytes_of(model.parameters())
    states = {name: request.state_bytes(model, name) for name in optimizer_names()}
    del model
    lengths, steps, measured = measure(request, shares)
    return MemoryEstimate(request, weights, states, measured, device_name(), lengths, steps)


def measure(request: Request, shares: Sequence[float]) -> tuple[list[int], list[int], str]:
    """Bytes of a step by sequence length, in the whole model, and what was measured, in words."""
    asked, factor, words = request, 1.0, ""
    if mx.default_device() == mx.cpu and main_dtype(request.base()) != mx.float32:
        # A CPU multiplies 16-bit matrices twenty times slower, and its float32 arrays are twice as
        # big. Adapters, and a part of what is computed with them, are in float32 in any case.
        factor = 1 / 2 if request.fine_tune_type == "full" else 2 / 3
        request, words = replace(request, dtype="float32"), " in float32"
    lengths = _lengths(request, shares)
    short = [min(FEW_TOKENS, lengths[0])] if words else []
    halvings, plan, measured = _measure_plan(request, short + lengths, len(short) + 1)
    beyond = 0.0
    if short:
        at_few = float(np.dot(plan.weights, [run.pop(0) for run in measured]))
        beyond = _beyond(asked, plan, short, halvings, factor * at_few)
    if halvings:
        scale = width_of(request.base()) / width_of(request.base(halvings))
        factor, beyond = factor * scale, beyond * scale
        words += f" at 1/{2**halvings} of width and vocabulary"
    trained = asked.build().trainable_parameters()
    # A guard looks at all gradients before the update, and accumulation keeps them.
    guarded = with_defaults(request.optimizer, request.options or {}).get("skip_nonfinite")
    kept = bytes_of(trained) if guarded or request.grad_accumulation_steps > 1 else 0
    own = bytes_of(_with_layers(request, plan, plan.kept[0], halvings).trainable_parameters())
    logits = request.batch_size * 4 * (_vocabulary(request) >> halvings)
    steps = []
    for length, *runs in zip(lengths, *measured, strict=False):  # up to the shortest run
        step = factor * float(np.dot(plan.weights, runs)) + beyond
        # Few layers need most at the logits, all layers where most gradients are there.
        least = kept + factor * max(0, runs[0] - 2 * logits * length - own) if kept else 0
        steps.append(round(MARGIN * max(step, least, 1.0)))
    lengths = lengths[: len(steps)]
    counts = " and ".join(map(str, sorted({len(kept) for kept in plan.kept})))
    tokens = f"up to {request.batch_size} x {lengths[-1]:,} tokens"
    return lengths, steps, f"{counts} layers{words}, {tokens}"


def _beyond(
    request: Request, plan: Plan, short: Sequence[int], halvings: int, expected: float
) -> float:
    """What a step in 16 bits needs beyond what was expected from one in float32.

    With few tokens a CPU can measure it. An update's float32 arrays are as large in both.
    """
    try:
        runs = [measure_steps(request, plan, kept, short, halvings)[0] for kept in plan.kept]
    except Exception:  # MLX lacks products of gathered experts in 16 bits on a CPU
        return 0.0
    return max(0.0, float(np.dot(plan.weights, runs)) - expected)


def _with_layers(request: Request, plan: Plan, kept: Sequence[int], halvings: int) -> nn.Module:
    """The model with some of its layers, all of them trained."""
    model = request.build(halvings, every_layer=True)
    keep_layers(model, kept, plan.kinds)
    return model


def _lengths(request: Request, shares: Sequence[float]) -> list[int]:
    """Lengths to measure, from one that fits on this device in any case."""
    lengths = sorted({max(2, round(share * request.max_seq_length)) for share in shares})
    row = 16 * request.batch_size * _vocabulary(request)  # logits of a token, and what they need
    while lengths[0] > 1024 or (lengths[0] > 2 and lengths[0] * row > available_bytes()):
        lengths.insert(0, max(2, lengths[0] // 4))
    if lengths[0] * row > available_bytes():
        raise ValueError(
            f"batch_size {request.batch_size} with a vocabulary of {_vocabulary(request):,}: two "
            "tokens of each sequence do not fit on this device"
        )
    return lengths


def _vocabulary(request: Request) -> int:
    size = value_of(request.config, "vocab_size")
    return size if isinstance(size, int) else 32


def _measure_plan(
    request: Request, lengths: Sequence[int], at_least: int
) -> tuple[int, Plan, list[list[int]]]:
    """Measure at a part of the width, or with every layer, where nothing else runs."""
    problem: Exception | None = None
    wanted, chosen = _halvings(request, sum(lengths))
    for halvings in sorted({wanted, 0}, reverse=True):
        for plan in (chosen, whole(request.base(halvings))):
            try:
                rest = lengths, halvings, at_least
                runs = [measure_steps(request, plan, kept, *rest) for kept in plan.kept]
                return halvings, plan, runs
            except Exception as failed:  # models may raise anything
                problem = problem or failed
    raise ValueError(f"the model does not run: {problem}") from problem


@contextmanager
def _keeping_random_state() -> Iterator[None]:
    """A step that fails leaves a placeholder in MLX's random state."""
    high, low = cast(Any, mx.random.state)[0].tolist()
    try:
        yield
    finally:
        mx.random.seed(high << 32 | low)


def _halvings(request: Request, tokens: int) -> tuple[int, Plan]:
    """How often width and vocabulary are halved, so that a few layers are measured soon."""
    speed = _speed(main_dtype(request.base()))
    batches = 2 * request.batch_size * min(request.grad_accumulation_steps, BATCHES)
    trained, checkpointed = request.trained_layers, request.grad_checkpoint
    for halvings, more in product(range(6), (True, False)):
        plan = plan_of(request.base(halvings), trained, checkpointed, more)
        models = [_with_layers(request, plan, kept, halvings) for kept in plan.kept]
        weights = sum(x.size for m in models for x in flatten(m.parameters()).values())
        # Two updates, six operations of both passes for each weight and token.
        soon = 6 * weights * batches * tokens / speed < SECONDS
        if soon and all(_fits(request, model) for model in models):
            return halvings, plan
    return 6, plan_of(request.base(6), trained, checkpointed, False)


def _fits(request: Request, model: nn.Module) -> bool:
    """Whether weights and state leave enough memory for a step on this device."""
    held = bytes_of(model.parameters()) + request.state_bytes(model, request.optimizer)
    return held < 0.6 * available_bytes()


def _speed(dtype: mx.Dtype) -> float:
    """Operations a second in a matrix product."""
    x = mx.ones((512, 512), dtype)
    return 2 * 512**3 / min(timeit.repeat(lambda: mx.eval(x @ x.T), number=1, repeat=3))


def measure_steps(
    request: Request,
    plan: Plan,
    kept: Sequence[int],
    lengths: Sequence[int],
    halvings: int = 0,
    at_least: int = 1,
) -> list[int]:
    """Peak bytes of a compiled training step beyond weights and state, with the layers kept.

    After ``at_least`` lengths, one that would not fit on this device, or take long, ends the list.
    """
    gc.collect()
    mx.clear_cache()
    before, available = mx.get_active_memory(), available_bytes()
    model = request.build(halvings, every_layer=True)
    steps: list[int] = []
    with restoring_layers(model), _keeping_random_state():
        if request.grad_checkpoint:
            grad_checkpoint(cast(Any, model).layers[0])
        keep_layers(model, kept, plan.kinds)
        if not _fits(request, model):
            raise ValueError("a few of its layers do not fit on this device")
        optimizer = make_optimizer(model, request.optimizer, **(request.options or {}))
        state = [model.state, optimizer.state, mx.random.state]
        mx.eval(state)
        model.train()
        step = _compiled_step(model, optimizer, state, request.grad_accumulation_steps)
        held = bytes_of(model.parameters()) + bytes_of(optimizer.state)
        for length in lengths:
            done = lengths[: len(steps)]
            if len(steps) >= at_least and _at_most(done, steps, length) > available:
                break
            peak, seconds = _peak_and_seconds(request, step, state, length, halvings)
            steps.append(peak - before - held)
            too_long = seconds * (request.max_seq_length / length) > LONGEST
            if len(steps) >= at_least and too_long:
                break
    return steps


def _peak_and_seconds(
    request: Request, step: Step, state: Any, length: int, halvings: int
) -> tuple[int, float]:
    """Peak bytes of an update, and seconds of its fastest batch."""
    shape, several = (request.batch_size, length), min(request.grad_accumulation_steps, BATCHES)
    vocabulary = max(1, _vocabulary(request) >> halvings)
    batch = mx.random.randint(0, vocabulary, shape), mx.array([[0, length]] * shape[0])
    mx.eval(batch)
    peak, seconds, total = 0, LONGEST, None
    for i in range(2 * several):
        start = time.perf_counter()
        mx.reset_peak_memory()
        loss, total = step(batch, total, (i + 1) % several == 0)
        mx.eval(loss, total, state)
        mx.clear_cache()
        peak = max(peak, mx.get_peak_memory())
        seconds = min(seconds, time.perf_counter() - start)  # the first time, it is compiled
    return peak, seconds


def _compiled_step(model: nn.Module, optimizer: Optimizer, state: list[Any], count: int) -> Step:
    """The step of mlx-lm's trainer, which gives back the total of the gradients up to the last."""
    loss_and_gradients = nn.value_and_grad(model, default_loss)

    @partial(mx.compile, inputs=state, outputs=state)
    def step(batch: Sequence[mx.array], total: Any, is_last: bool) -> Any:
        loss, gradients = loss_and_gradients(model, *batch)
        if total is not None:
            gradients = tree_map(mx.add, gradients, total)
        if not is_last:
            return loss, gradients
        if count > 1:
            gradients = tree_map(lambda x: x / count, gradients)
        optimizer.update(model, gradients)
        return loss, None

    return step


@contextmanager
def restoring_layers(model: nn.Module) -> Iterator[None]:
    """Restore the class of the layers, which mlx-lm's gradient checkpointing changes."""
    kind = type(cast(Any, model).layers[0])
    call: Callable[..., Any] = kind.__call__
    try:
        yield
    finally:
        kind.__call__ = call


def available_bytes() -> int:
    """What this device may use: Metal's working set, or the memory of the machine."""
    info = mx.device_info()
    for key in ("max_recommended_working_set_size", "free_memory", "memory_size"):
        if key in info:
            return int(info[key])
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return 1024 * int(fields["MemAvailable"].split()[0])
    except (KeyError, OSError):
        return 8 << 30


def width_of(model: nn.Module) -> int:
    """Columns that all matrices together make of a token, which its activations grow with."""
    return sum(x.shape[-2] for x in flatten(model.parameters()).values() if x.ndim > 1)


def device_name() -> str:
    """The device that MLX uses."""
    if mx.default_device() == mx.cpu:
        return "this machine's CPU"
    return str(mx.device_info().get("device_name", "this machine's GPU"))


def _at_most(lengths: Sequence[int], steps: Sequence[int], length: int) -> float:
    """The most that a longer sequence may need, as far as can be known."""
    if len(steps) < 3:
        return steps[-1] * (length / lengths[-1]) ** 2
    return float(_at_lengths(lengths, steps, length))


def _at_lengths(lengths: Sequence[int], steps: Sequence[int], wanted: Any) -> Any:
    """A quadratic through the measured lengths, as attention scores grow with the square.

    No coefficient is negative: a longer sequence never needs less. Relative errors count.
    """
    x, y = np.array(lengths, float) / lengths[-1], np.array(steps, float)
    powers, best, found = np.stack([x**0, x, x**2], axis=1), np.inf, np.zeros(3)
    for count in range(1, min(3, len(x)) + 1):
        for columns in map(list, combinations((1, 2, 0), count)):  # too few lengths: it grows
            part = powers[:, columns] / y[:, None]
            coefficients = np.linalg.lstsq(part, np.ones(len(y)), rcond=None)[0]
            error = float(np.sum((part @ coefficients - 1) ** 2))
            if np.all(coefficients >= 0) and error < best - 1e-12:
                best, found = error, np.zeros(3)
                found[columns] = coefficients
    return np.polyval(found[::-1], wanted / lengths[-1])
