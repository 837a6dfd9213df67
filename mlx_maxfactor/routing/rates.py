"""The table of optimizers: names, and the default learning rates of each.

Every rate was measured; examples/records/README.md has the runs, and says how well the law holds.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from .._validate import check_number, shown
from ..engine.schedules import Schedule, warmup_cosine
from ..optimizers import Adafactor, AdamW, Muon, OrthoMaxFactor, SignSGD
from ..optimizers.base import Float32Optimizer
from ..published import MaxFactor
from .roles import ROLES

OptimizerName = Literal["orthomaxfactor", "maxfactor", "adafactor", "signsgd", "muon", "adamw"]
"""What a type checker takes for a name; a ``str`` from a file is cast to it, and checked there."""

WIDTH = 64
"""Width of the model whose rates the laws give unchanged."""

LORA_SCALE = 20.0
"""The scale of LoRA whose rates the law gives unchanged: mlx_lm's."""


class RateInputs(NamedTuple):
    """What the default rates depend on.

    Attributes:
        total_steps: Updates in the run. None: the rate is constant.
        width: Shorter side of a typical hidden matrix; of LoRA's A and B the longer one.
        momentum: Whether the hidden optimizer has momentum.
        block: Rows that it orthogonalizes at a time. None: the whole matrix.
        lora_scale: The factor on the product of LoRA's A and B.
    """

    total_steps: int | None = None
    width: float = WIDTH
    momentum: bool = True
    block: int | None = 128
    lora_scale: float = LORA_SCALE


@dataclass(frozen=True)
class OptimizerEntry:
    r"""One row of the table of optimizers.

    Attributes:
        kind: The class.
        learning_rate: Default rate from scratch. A rate that is given for the hidden matrices
            scales the default rates of the other members.
        pretrained: Default rate for trained weights of width 64; it falls with the root of the
            width. None: ``learning_rate``, which falls likewise.
        lora: Default rate for LoRA's A and B at width 64 and scale 20. None: likewise.
        lora_options: Options for LoRA's A and B.
        peak: The best peak of warm-up and cosine from scratch, as a function of the run. None:
            ``learning_rate``.
        rest_peak: The best peak for the parameters that are not hidden. None: ``peak``.
        table_options: Options for embeddings and output layers, whose rows are tokens.
        table_label: What the plan adds to the name where these options are used.
        table_peak: The best peak there. None: ``rest_peak``.
    """

    kind: type[Float32Optimizer]
    learning_rate: float
    pretrained: float | None = None
    lora: float | None = None
    lora_options: Mapping[str, Any] = field(default_factory=dict)
    peak: Callable[[RateInputs], float] | None = None
    rest_peak: float | None = None
    table_options: Mapping[str, Any] = field(default_factory=dict)
    table_label: str = ""
    table_peak: Callable[[RateInputs], float] | None = None

    def peak_of(self, run: RateInputs) -> float:
        """The peak for a run from scratch, to two digits."""
        return _two_digits(self.learning_rate if self.peak is None else self.peak(run))

    def rest_peak_of(self, run: RateInputs, table: bool) -> float:
        """The peak for parameters that are not hidden: of a table, or another."""
        if table and self.table_peak is not None:
            return _two_digits(self.table_peak(run))
        return self.peak_of(run) if self.rest_peak is None else self.rest_peak


def _two_digits(x: float) -> float:
    return float(f"{x:.2g}")


def _orthomaxfactor_peak(run: RateInputs) -> float:
    r"""The law: the total movement relative to the matrix is constant, so :math:`0.8/\sqrt{steps}`.

    In blocks of b rows the largest singular value of a step grows with the number of blocks, so
    wider matrices take :math:`\sqrt{b / width}` of it. Without momentum steps average out less, and
    the best rate is higher.
    """
    blocks = math.sqrt(min(1.0, run.block / run.width)) if run.block else 1.0
    return max(1.5e-3, (0.8 if run.momentum else 1.4) * _per_root_of_steps(run) * blocks)


def _per_root_of_steps(run: RateInputs) -> float:
    return 1 / math.sqrt(run.total_steps or 1)


OPTIMIZERS: dict[str, OptimizerEntry] = {
    "orthomaxfactor": OptimizerEntry(
        OrthoMaxFactor,
        2e-2,
        pretrained=2e-3,
        lora=2e-4,
        lora_options={"min_rms": 1.0},
        peak=_orthomaxfactor_peak,
    ),
    "maxfactor": OptimizerEntry(
        MaxFactor, 1e-2, pretrained=2e-3, lora=1e-3, lora_options={"min_rms": 1.0}
    ),
    "adafactor": OptimizerEntry(Adafactor, 1e-2, pretrained=3e-4, lora=1e-3),
    "signsgd": OptimizerEntry(SignSGD, 1e-2, pretrained=3e-4, lora=3e-4),
    "muon": OptimizerEntry(
        Muon,
        2e-2,
        pretrained=1e-3,
        lora=1e-3,
        lora_options={"scale": "rms", "momentum": 0.8},
        peak=lambda run: 0.8 * _per_root_of_steps(run) * math.sqrt(WIDTH / run.width),
    ),
    "adamw": OptimizerEntry(
        AdamW,
        1e-3,
        pretrained=2e-4,
        lora=8e-5,
        lora_options={"betas": (0.9, 0.999), "bias_correction": False},
        peak=lambda run: 3e-3 * WIDTH / run.width,
        rest_peak=1e-2,
        # Stale momentum moves rows that have no gradient, and in a large vocabulary most have none.
        table_options={"betas": (0.0, 0.999), "factored": True},
        table_label="no momentum",
        table_peak=lambda run: 2e-2 * math.sqrt(WIDTH / run.width),
    ),
}
"""Every optimizer that has a name.

LoRA's B starts at zero, where a rate relative to its size would move nothing. So LoRA's rates are
absolute: the RMS of an update, for mlx_lm's scale of 20 (Muon's rate is five times the RMS). AdamW
has no bias correction there, as in MLX: its first steps are then six times larger, and no constant
rate has the same effect.
"""


def register_optimizer(
    name: str,
    kind: type[Float32Optimizer],
    learning_rate: float,
    *,
    pretrained: float | None = None,
    lora: float | None = None,
    lora_options: Mapping[str, Any] | None = None,
    peak: Callable[[RateInputs], float] | None = None,
) -> None:
    """Give your own optimizer a name that ``create_optimizer`` takes.

    Args:
        name: The name, for ``hidden``, ``rest`` and ``rules``.
        kind: A subclass of :class:`mlx_maxfactor.Float32Optimizer`.
        learning_rate: Its default rate.
        pretrained: Its default rate for trained weights of width 64; it falls with the root of the
            width. None: ``learning_rate``, which falls likewise.
        lora: Its default rate for LoRA's A and B at width 64 and scale 20; it falls with the root
            of the width, and with the scale. None: likewise.
        lora_options: Its options for LoRA's A and B.
        peak: Its best peak rate for a :class:`mlx_maxfactor.routing.rates.RateInputs`, where
            ``create_optimizer`` is given ``total_steps``. None: ``learning_rate``.

    Raises:
        ValueError: The name is taken by another class, or the class or a rate is not valid.

    Example:
        >>> from mlx_maxfactor import OPTIMIZERS, SignSGD, register_optimizer
        >>> class Gentle(SignSGD):
        ...     '''SignSGD under another name.'''
        >>> register_optimizer("gentle", Gentle, learning_rate=1e-3)
        >>> OPTIMIZERS.pop("gentle").learning_rate  # this removes the name again
        0.001
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"name must be an identifier, got {shown(name)}")
    if name in ("hidden", "rest", *ROLES):
        raise ValueError(f"{name!r} has another meaning in rules: take another name")
    if not (isinstance(kind, type) and issubclass(kind, Float32Optimizer)):
        raise ValueError(f"kind must be a subclass of Float32Optimizer, got {shown(kind)}")
    # A class that is defined again, as in a notebook, keeps its name.
    if (taken := OPTIMIZERS.get(name)) and _place_of(taken.kind) != _place_of(kind):
        raise ValueError(f"{name!r} is already the name of {_place_of(taken.kind)}")
    rates = {"learning_rate": learning_rate, "pretrained": pretrained, "lora": lora}
    for key, rate in rates.items():
        if rate is not None:
            check_number(key, rate, 0.0, ends="()")
    OPTIMIZERS[name] = OptimizerEntry(
        kind, learning_rate, pretrained, lora, lora_options or {}, peak
    )


def _place_of(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


RatePreset = Literal["scratch", "pretrained", "lora"]
"""What an optimizer is used for, which decides its default rate and options."""


def default_rate(name: str, preset: RatePreset, run: RateInputs | None = None) -> float:
    r"""The default rate of an optimizer: constant, or the peak of a run of known length.

    For trained weights it falls with the root of the width: at equal RMS, the spectral norm of an
    orthogonalized step grows with it. What LoRA adds to a layer is ``scale · B A``, so that A's and
    B's rate is also divided by the scale. The peak of a schedule is twice the constant rate, so
    that both move the weights equally far, but not above the peak from scratch.
    """
    entry, run = OPTIMIZERS[name], run or RateInputs()
    if preset == "scratch":
        return entry.learning_rate if run.total_steps is None else entry.peak_of(run)
    given = entry.lora if preset == "lora" else entry.pretrained
    rate = (entry.learning_rate if given is None else given) * math.sqrt(
        WIDTH / max(run.width, WIDTH)
    )
    if preset == "lora":
        rate *= LORA_SCALE / run.lora_scale
    if run.total_steps is not None:
        rate = 2 * rate if preset == "lora" else min(2 * rate, entry.peak_of(run))
    return _two_digits(rate)


def schedule_of(peak: float, total_steps: int) -> Schedule:
    """A tenth of the run to warm up, then a cosine to a tenth of the peak."""
    warmup = total_steps // 10
    # A start at 0 would waste the first update.
    return warmup_cosine(peak, total_steps, warmup, start_ratio=1 / (warmup + 1))
