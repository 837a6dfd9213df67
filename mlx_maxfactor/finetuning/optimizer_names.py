"""Optimizers and schedules by the names that the command line and YAML files use."""

import math
from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any, cast

import mlx.nn as nn
import mlx.optimizers as mlx_optimizers
from mlx.optimizers import Optimizer, schedulers
from mlx_lm.lora import CONFIG_DEFAULTS
from mlx_lm.tuner.utils import build_schedule

from .._validate import check_choice, check_flag, check_integer, check_number, check_pair
from ..engine.schedules import Schedule, adaptive_schedule, warmup_cosine, with_peak
from ..factory import create_optimizer
from ..routing import OPTIMIZERS
from ..routing.combined import GuardedOptimizer
from .models import prefixing_errors

MLX_OPTIMIZERS: dict[str, type[Optimizer]] = {
    "adam": mlx_optimizers.Adam,
    "sgd": mlx_optimizers.SGD,
    "mlx_adamw": mlx_optimizers.AdamW,
    "mlx_muon": mlx_optimizers.Muon,
    "mlx_adafactor": mlx_optimizers.Adafactor,
}
"""mlx's own optimizers. Where both libraries have a name, the plain name is ours."""

GUARD: dict[str, Any] = {"skip_nonfinite": True, "max_skipped": 20}
"""Options of every optimizer: steps that are not finite are skipped, but not 20 in a row."""

GUARD_OPTIONS = ("max_grad_norm", "skip_nonfinite", "max_skipped")
RANGES: dict[str, tuple[float, float, str]] = {
    **dict.fromkeys(("momentum", "betas", "beta_1"), (0.0, 1.0, "[)")),
    "dampening": (0.0, 1.0, "[]"),
    "decay_rate": (-1.0, 0.0, "[)"),
    "clip_threshold": (0.0, math.inf, "()"),
}
"""Ranges of the options of mlx's optimizers, which mlx does not check. Others are at least 0."""

MLX_SCHEDULES = ("cosine_decay", "exponential_decay", "linear_schedule", "step_decay")
SCHEDULES = {"warmup_cosine": warmup_cosine, "adaptive_schedule": adaptive_schedule}
WARMUP = ("warmup", "warmup_init")
EXAMPLE = "lr_schedule: {name: warmup_cosine, arguments: [0.001, 300, 30]}"


def optimizer_names() -> list[str]:
    """Every name that :func:`make_optimizer` takes."""
    return [*OPTIMIZERS, *MLX_OPTIMIZERS]


def optimizer_name(given: Any, argument: str = "optimizer") -> str:
    """The name in lower case. Raises ValueError unless :func:`make_optimizer` takes it."""
    return check_choice(argument, str(given).lower(), optimizer_names())


def with_defaults(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options over fine-tuning's own: rates for trained weights, and a guard.

    ``skip_nonfinite=False`` turns the guard off.
    """
    rates = {"pretrained": True} if name in OPTIMIZERS else {}
    guard = GUARD if options.get("skip_nonfinite", True) else {}
    return {**rates, **guard, **options}


def make_mlx_optimizer(name: str, rate: Any, options: Mapping[str, Any]) -> Optimizer:
    """One of mlx's own optimizers, guarded if the options say so."""
    guard = {key: x for key, x in options.items() if key in GUARD_OPTIONS}
    rest = {key: x for key, x in options.items() if key not in GUARD_OPTIONS}
    kind = MLX_OPTIMIZERS[name]
    takes = {key: x.default for key, x in [*signature(kind).parameters.items()][1:]}
    for key, value in rest.items():
        check_choice(f"an option of {name}", key, tuple(takes))
        limits = RANGES.get(key, (0.0, math.inf, "[)"))
        _check_like(f"{name}: {key}", value, takes[key], limits)
    with prefixing_errors(name):
        optimizer: Optimizer = kind(rate, **rest)
    needed = guard.get("skip_nonfinite") or guard.get("max_grad_norm") is not None
    return GuardedOptimizer(optimizer, **guard) if needed else optimizer


def _check_like(name: str, value: Any, default: Any, limits: tuple[float, float, str]) -> None:
    """Raise ValueError unless a value is of the kind of the default. mlx does not check it."""
    if isinstance(default, bool):
        check_flag(name, value)
    elif isinstance(default, int):
        check_integer(name, value, 1)
    elif isinstance(default, tuple | list):
        check_pair(name, value, *limits)
    elif default is not None or value is not None:
        check_number(name, value, *limits)


def make_optimizer(
    model: nn.Module,
    name: str,
    *,
    learning_rate: float | None = None,
    lr_schedule: Mapping[str, Any] | None = None,
    **options: Any,
) -> Optimizer:
    """The optimizer of a name, for a model that is ready to be fine-tuned.

    Args:
        model: The model, with its adapters.
        name: One of :func:`optimizer_names`.
        learning_rate: None: the optimizer's own default (mlx's optimizers: mlx-lm's, 1e-5).
        lr_schedule: A schedule as in mlx-lm's YAML files, or one of ours, in place of the rate.
        **options: Options of the optimizer and of its guard. Steps whose gradients are not finite
            are skipped, unless ``skip_nonfinite=False``.

    Returns:
        The optimizer, with its state.

    Raises:
        ValueError: An unknown name, option or schedule.
    """
    name = optimizer_name(name)
    options = with_defaults(name, options)
    rate: Any = make_schedule(**lr_schedule) if lr_schedule else learning_rate
    if name in OPTIMIZERS:
        return create_optimizer(model, cast(Any, name), learning_rate=rate, **options)
    rate = CONFIG_DEFAULTS["learning_rate"] if rate is None else rate
    optimizer = make_mlx_optimizer(name, rate, options)
    optimizer.init(model.trainable_parameters())
    return optimizer


def make_schedule(name: str, arguments: Sequence[float], **others: Any) -> Schedule:
    """A schedule of mlx by mlx-lm's rules, or one of ours."""
    check_choice("lr_schedule: name", name, (*SCHEDULES, *MLX_SCHEDULES))
    function = SCHEDULES.get(name) or getattr(schedulers, name)
    keys = WARMUP if name in MLX_SCHEDULES else signature(function).parameters
    for key in others:
        check_choice(f"lr_schedule: a key of {name}", key, ("name", "arguments", *keys))
    try:
        if name in SCHEDULES:
            return SCHEDULES[name](*arguments, **others)
        built = build_schedule({"name": name, "arguments": arguments, **others})
    except (TypeError, ZeroDivisionError) as problem:
        takes = f"it takes {signature(function)}, as in {EXAMPLE}"
        raise ValueError(f"lr_schedule: {problem}; {takes}") from None
    peak = getattr(with_peak(built), "peak", None)
    if not peak:
        raise ValueError(f"lr_schedule: {name}{tuple(arguments)} is 0 or grows without bound")
    # The description tells it apart from other schedules in a checkpoint.
    return Schedule(built, f"{name}{tuple(arguments)}, {others}", peak=peak)
