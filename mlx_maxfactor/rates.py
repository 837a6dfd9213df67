"""Default learning rates: of every optimizer, by what it trains, how long, and how wide.

Everything here was measured; NOTES.md, "Rates", has the runs and what the law costs.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from .schedules import Schedule, warmup_cosine

DEFAULT_RATES = {
    "orthomaxfactor": 2e-2,
    "maxfactor": 1e-2,
    "adafactor": 1e-2,
    "signsgd": 1e-2,
    "muon": 2e-2,
    "adamw": 1e-3,
}
"""Rates of the members. A rate given for the hidden matrices also scales those of the others."""

WIDTH = 64
"""Width of the model whose rates the law gives unchanged."""


@dataclass(frozen=True)
class Use:
    """What members are used for: their default rates, and options of the hidden one, by name."""

    rates: Mapping[str, float]
    options: Mapping[str, Mapping[str, Any]]


FROM_SCRATCH = Use(DEFAULT_RATES, {})
"""Weights that start at random."""

PRETRAINED = Use(DEFAULT_RATES | {"orthomaxfactor": 1e-2, "signsgd": 1e-3, "muon": 1e-2}, {})
"""Weights that are trained already. Higher rates ruin them before they improve them, and forget."""

LORA = Use(
    {
        "orthomaxfactor": 5e-4,
        "maxfactor": 1e-3,
        "adafactor": 1e-3,
        "signsgd": 3e-4,
        "muon": 3e-3,
        "adamw": 3e-4,
    },
    {
        "orthomaxfactor": {"min_rms": 1.0},
        "maxfactor": {"min_rms": 1.0},
        "muon": {"scale": "rms", "momentum": 0.8},
        "adamw": {"betas": (0.9, 0.999), "bias_correction": False},
    },
)
"""LoRA's A and B. B starts at zero, where a rate relative to its size moves nothing, so that here
every rate is absolute: the RMS of an update (of Muon's a fifth), as AdamW's is, and suits mlx_lm's
scale of 20. AdamW is mlx's: without bias correction its first steps are six times larger, which no
constant rate makes up for."""


def peak_rates(
    total_steps: int, width: float, momentum: bool = True, block: int | None = 128
) -> dict[str, float]:
    r"""The best peak of warm-up and cosine, from scratch, as a law of steps and width.

    What orthogonalized steps move a matrix in all stays the same, relative to its size: the peak of
    ``OrthoMaxFactor`` is :math:`0.8 / \sqrt{\text{steps}}`. In blocks of b rows the largest
    singular value of a step grows with the number of blocks, so that wider matrices take
    :math:`\sqrt{b / \text{width}}` of it. AdamW's peak hardly depends on the steps, and falls with
    the width.

    Args:
        total_steps: Updates in the run.
        width: Shorter side of a typical hidden matrix.
        momentum: Whether the hidden optimizer has any: without it, steps average less, and the best
            rate is higher.
        block: Rows that are orthogonalized at a time.

    Returns:
        Peak by name, for hidden matrices; ``"rest"`` is AdamW's for everything else.
    """
    root, narrow = math.sqrt(total_steps), WIDTH / width
    blocks = math.sqrt(min(1.0, block / width)) if block else 1.0
    peaks = {
        **DEFAULT_RATES,
        "orthomaxfactor": max(1.5e-3, (0.8 if momentum else 1.4) / root * blocks),
        "muon": 0.8 / root * math.sqrt(narrow),
        "adamw": 3e-3 * narrow,
        "rest": 1e-2,
    }
    return {name: float(f"{peak:.2g}") for name, peak in peaks.items()}


def schedule_of(peak: float, total_steps: int) -> Schedule:
    """A tenth of the run to warm up, then a cosine to a tenth of the peak."""
    warmup = total_steps // 10
    # A start at 0 would waste the first update.
    return warmup_cosine(peak, total_steps, warmup, start_ratio=1 / (warmup + 1))


def with_steps(use: Use, peaks: Mapping[str, float]) -> Use:
    """Default rates for a run of known length; for trained weights at most those they had."""
    if use is LORA:
        return use
    rates = {
        name: peaks[name] if use is FROM_SCRATCH else min(rate, peaks[name])
        for name, rate in use.rates.items()
    }
    return replace(use, rates=rates)
