"""Optimizers and schedules by the names that the command line and YAML files use."""

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any, cast

import mlx.nn as nn
import mlx.optimizers as mlx_optimizers
from mlx.optimizers import Optimizer, schedulers
from mlx_lm.lora import CONFIG_DEFAULTS
from mlx_lm.tuner.utils import build_schedule

from .._validate import shown
from ..combined import GuardedOptimizer
from ..factory import create_optimizer
from ..routing import OPTIMIZERS
from ..schedules import Schedule, adaptive_schedule, warmup_cosine

MLX_OPTIMIZERS: dict[str, type[Optimizer]] = {
    "adam": mlx_optimizers.Adam,
    "sgd": mlx_optimizers.SGD,
    "mlx_adamw": mlx_optimizers.AdamW,
    "mlx_muon": mlx_optimizers.Muon,
    "mlx_adafactor": mlx_optimizers.Adafactor,
}
"""mlx's own optimizers. Where both libraries have a name, the plain name is ours."""

GUARD: dict[str, Any] = {"skip_nonfinite": True, "max_skipped": 20}
SCHEDULES = {"warmup_cosine": warmup_cosine, "adaptive_schedule": adaptive_schedule}
EXAMPLE = "lr_schedule: {name: warmup_cosine, arguments: [0.001, 300, 30]}"


def optimizer_names() -> list[str]:
    """Every name that :func:`make_optimizer` takes."""
    return [*OPTIMIZERS, *MLX_OPTIMIZERS]


def check_optimizer(name: Any) -> None:
    """Raise ValueError unless :func:`make_optimizer` takes the name."""
    if name not in optimizer_names():
        known = ", ".join(optimizer_names())
        raise ValueError(f"optimizer must be one of {known}, got {shown(name)}")


def make_optimizer(
    model: nn.Module,
    name: str,
    *,
    learning_rate: float | None = None,
    lr_schedule: Mapping[str, Any] | None = None,
    guarded: bool = True,
    **options: Any,
) -> Optimizer:
    """The optimizer of a name, for a model that is ready to be fine-tuned.

    Args:
        model: The model, with its adapters.
        name: One of :func:`optimizer_names`.
        learning_rate: None: the optimizer's own default (mlx's optimizers: mlx-lm's, 1e-5).
        lr_schedule: A schedule as in mlx-lm's YAML files, or one of ours, in place of the rate.
        guarded: Skip steps whose gradients are not finite. Default True.
        **options: Options of the optimizer.

    Returns:
        The optimizer, with its state.

    Raises:
        ValueError: An unknown name, option or schedule.
    """
    check_optimizer(name)
    rate: Any = make_schedule(**lr_schedule) if lr_schedule else learning_rate
    guard = GUARD if guarded else {}
    if name in OPTIMIZERS:
        options = {"pretrained": True, **guard, **options}
        return create_optimizer(model, cast(Any, name), learning_rate=rate, **options)
    rate = CONFIG_DEFAULTS["learning_rate"] if rate is None else rate
    optimizer: Optimizer = MLX_OPTIMIZERS[name](rate, **options)
    if guarded:
        optimizer = GuardedOptimizer(optimizer, **guard)
    optimizer.init(model.trainable_parameters())
    return optimizer


def make_schedule(name: str, arguments: Sequence[float], **warmup: Any) -> Schedule:
    """A schedule of mlx by mlx-lm's rules, or one of ours."""
    if name in SCHEDULES:
        try:
            return SCHEDULES[name](*arguments, **warmup)
        except TypeError as problem:
            takes = signature(SCHEDULES[name])
            raise ValueError(f"{problem}; it takes {takes}, as in {EXAMPLE}") from None
    if not hasattr(schedulers, name):
        names = ", ".join(SCHEDULES)
        raise ValueError(f"lr_schedule is one of {names} or a schedule of mlx, got {shown(name)}")
    function = build_schedule({"name": name, "arguments": arguments, **warmup})
    peak = max(arguments[:2]) if name == "linear_schedule" else arguments[0]
    # The description tells it apart from other schedules in a checkpoint.
    return Schedule(function, f"{name}{tuple(arguments)}, {warmup}", peak=peak)
