"""Algorithms that were measured but are not in the library; see NOTES.md.

Other rules for frequency-adaptive momentum, and NorMuon.
"""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_maxfactor import FrequencyAdaptiveMomentum, Muon, Schedule
from mlx_maxfactor import functional as f


@dataclass(frozen=True)
class UnityGain(FrequencyAdaptiveMomentum):
    """Every band passes a steady gradient unchanged. Damping only shortens the memory."""

    def weights(self, share: mx.array) -> tuple[mx.array, mx.array]:
        """Decay ``μ_b`` as published, gain ``1 - μ_b``."""
        decay, _ = super().weights(share)
        return decay, 1 - decay


@dataclass(frozen=True)
class LowBandsDamped(FrequencyAdaptiveMomentum):
    """A control experiment: the published rule damps the low bands instead of the high ones."""

    def damping(self, share: mx.array) -> mx.array:
        """``δ_b = clip((1 - (b + 1) / B) (1 - 5 h_b), 0, 0.9)``."""
        return super().damping(share[..., ::-1])[..., ::-1]


@dataclass(frozen=True)
class Whitened(FrequencyAdaptiveMomentum):
    """Plain momentum of a gradient whose bands are scaled to equal power."""

    def weights(self, share: mx.array) -> tuple[mx.array, mx.array]:
        """Decay ``α``, gain ``(1 - α) / √(B h_b)``, with ``B h_b`` at least 0.01."""
        gain = mx.rsqrt(mx.maximum(self.bands * share, 0.01))
        return mx.full(share.shape, self.alpha), (1 - self.alpha) * gain


@dataclass(frozen=True)
class Persistent(FrequencyAdaptiveMomentum):
    """Plain momentum, with each band weighted by its signal (a Wiener filter).

    Momentum keeps all power of a steady gradient, and of white noise the share
    ``ρ₀ = (1 - α) / (1 + α)``. The weight of a band is ``clip((ρ_b - ρ₀) / (1 - ρ₀), 0.1, 1)``,
    where ``ρ_b`` is a moving average of the share that momentum keeps of the band.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.blend != 1 or self.blend_steps != 1:
            raise ValueError("blend and blend_steps must be 1: this rule uses a filter instead")

    def init(self, shape: tuple[int, ...]) -> dict[str, mx.array]:
        """Add a moving average of the share of each band's power that momentum keeps."""
        state = super().init(shape)
        return state | {"kept": state["power"]} if "power" in state else state

    def weights(self, share: mx.array) -> tuple[mx.array, mx.array]:
        """The weights of plain momentum."""
        ones = mx.ones(share.shape)
        return self.alpha * ones, (1 - self.alpha) * ones

    def update(self, gradient: mx.array, momentum: mx.array, state: dict) -> mx.array:
        """Update plain momentum. The state averages the share of each band that it keeps."""
        momentum = super().update(gradient, momentum, state)
        if "kept" in state:
            kept, whole = (band_powers(x, self.bands) for x in (momentum, gradient))
            kept = mx.minimum(kept / mx.maximum(whole, 1e-30), 1.0)
            state["kept"] = self.beta * state["kept"] + (1 - self.beta) * kept
        return momentum

    def blended(self, gradient: mx.array, momentum: mx.array, state: dict) -> mx.array:
        """The filtered momentum."""
        if "kept" not in state:
            return momentum
        kept = state["kept"] / f.bias_correction(self.beta, state["count"].astype(mx.float32))
        noise = (1 - self.alpha) / (1 + self.alpha)
        weight = mx.clip((kept - noise) / (1 - noise), 0.1, 1.0)
        spectrum = mx.fft.rfft(momentum)
        return f.band_momentum(spectrum, mx.zeros(momentum.shape), weight, weight)


def band_powers(x: mx.array, bands: int) -> mx.array:
    """The power Σ|F|² of each band."""
    spectrum = mx.fft.rfft(x)
    total = mx.sum(mx.square(mx.abs(spectrum)), axis=(-2, -1), keepdims=True)
    return f.band_shares(spectrum, bands) * total


VARIANTS = {
    "published": FrequencyAdaptiveMomentum,
    "unity_gain": UnityGain,
    "low_bands_damped": LowBandsDamped,
    "whitened": Whitened,
    "persistent": Persistent,
}


class NorMuon(Muon):
    """Muon with rows of equal size: a second moment per row scales its step.

    Li et al. 2025, arXiv 2510.05491: ``v ← β₂v + (1 - β₂) mean_j O²``. The step is ``O / √v``,
    scaled to an RMS of 0.2.
    """

    def __init__(self, learning_rate: float | Schedule, *, beta2: float = 0.95, **options: Any):
        super().__init__(learning_rate, **options)
        self.beta2 = beta2

    def new_state(self, shape: tuple[int, ...]) -> dict[str, mx.array]:
        """Add one float per row."""
        return super().new_state(shape) | {"v": mx.zeros((*shape[:-1], 1))}

    def rule(
        self, g: mx.array, p: mx.array, state: dict[str, mx.array]
    ) -> tuple[mx.array, dict[str, mx.array]]:
        """Muon's update with normalized rows."""
        u, kept = f.momentum(g, state, self.momentum, 1.0, self.nesterov)
        step, _ = f.orthogonalize(f.clamp(u), self.method, self.steps, self.block)
        mean = mx.mean(mx.square(step), axis=-1, keepdims=True)
        v = self.beta2 * state["v"] + (1 - self.beta2) * mean
        step = step * mx.rsqrt(v + 1e-10)
        rate = 0.2 * self.step_size(p, self.step, self.learning_rate) / f.rms(step, (-2, -1))
        p = p.astype(mx.float32)
        p = p - self.learning_rate * (self.weight_decay * p) - rate * step
        return p, {**kept, "v": v}
