"""Float64 twins that only tests need, in addition to those in mlx_maxfactor/reference.py."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_maxfactor import reference
from mlx_maxfactor.reference import Array

OLD = {"eps": (2.0**-23, 1e-3), "weight_decay": 0.0, "min_lr": 0.0, "scalar_boost": None}
PRESETS: dict[str, dict[str, Any]] = {
    "early": OLD | {"vector_sign": True, "beta2_bounds": (0.0, 1.0), "eps_rms": 1e-8},
    "hub": {},
    "speech": OLD | {"relative_step": True, "beta2_bounds": (0.0, 0.999)},
}
"""The options as published, where they differ from the defaults."""


@dataclass
class FrequencyAdaptiveMomentum:
    """Momentum by frequency band along the last axis, as NOTES.md has it; the DFT is a sum."""

    alpha: float = 0.9
    beta: float = 0.999
    bands: int = 10
    blend: float = 1.0
    blend_steps: int = 1

    def bins(self, n: int) -> tuple[Array, Any, Any]:
        """The band of each bin k = 0 ... n // 2, and the matrices of rfft and of irfft."""
        k, bins = np.arange(n // 2 + 1), n // 2 + 1
        band = np.minimum(self.bands - 1, k * self.bands // bins)
        turns = np.exp(-2j * np.pi * np.outer(np.arange(n), k) / n)
        twice = np.where((k == 0) | (2 * k == n), 1, 2)  # bins that stand for -k as well
        return band, turns, (turns.conj() * twice / n).T

    def shares(self, F: Any, band: Array) -> Array:
        """pi_b: the part of each matrix's sum of |F|^2 that lies in band b."""
        power = np.sum(np.abs(F) ** 2, axis=-2, keepdims=True)
        parts = [np.sum(power[..., band == b], axis=-1) for b in range(self.bands)]
        total = np.sum(power, axis=-1, keepdims=True)
        return np.stack(parts, axis=-1) / np.where(total > 0, total, 1)

    def damping(self, h: Array) -> Any:
        """damp_b of a bias-corrected h."""
        return np.clip(np.arange(self.bands) / self.bands * (1 - 5 * h), 0, 0.9)

    def filter(self, g: Array, m: Array, h: Array, t: int) -> tuple[Array, Array]:
        """The next m and h."""
        band, rfft, irfft = self.bins(g.shape[-1])
        F, previous = g @ rfft, np.broadcast_to(m, g.shape) @ rfft
        h = self.beta * h + (1 - self.beta) * self.shares(F, band)
        damp = self.damping(h / (1 - self.beta**t))[..., band]
        M = self.alpha * (1 - damp) * previous + (1 - self.alpha) * (1 + damp) * F
        return (M @ irfft).real, h


class BandMaxFactor(reference.MaxFactor):
    """MaxFactor with frequency-adaptive momentum."""

    h: Any = np.zeros(())  # the moving average of the bands' shares

    def averaged(self, g: Array) -> Array:
        fam: Any = self.momentum
        shape, g = g.shape, g.reshape(self.view)
        if g.ndim >= 2 and min(g.shape[-2:]) > 4:
            kappa = fam.blend * min(1, self.t / fam.blend_steps)
            self.m, self.h = fam.filter(g, self.m, self.h, self.t)
        else:
            kappa, self.m = 1.0, fam.alpha * self.m + (1 - fam.alpha) * g
        m = fam.alpha * self.m + (1 - fam.alpha) * g if self.nesterov else self.m
        return ((1 - kappa) * g + kappa * m).reshape(shape)


def largest_moment(beta1: float, beta2: float, t: int) -> float:
    """max |m| / sqrt(v) over all g_1 ... g_t: m is linear in g and v quadratic, so Lagrange."""
    age = np.arange(t)
    a, b = (1 - beta1) * beta1**age, (1 - beta2) * beta2**age  # weights of the gradients
    g = a / b  # the stationary point of a.g at fixed sum of b g^2
    return float(a @ g / np.sqrt(b @ g**2))


def warmup_cosine(
    step: int,
    learning_rate: float,
    total_steps: int,
    warmup_steps: int = 2000,
    min_ratio: float = 0.1,
    start_ratio: float = 0.0,
) -> float:
    """Linear from start_ratio to 1, then a cosine to min_ratio, then constant."""
    if step < warmup_steps:
        return learning_rate * (start_ratio + (1 - start_ratio) * step / warmup_steps)
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return learning_rate * (min_ratio + (1 - min_ratio) * (1 + np.cos(np.pi * progress)) / 2)


def adaptive_schedule(
    step: int, initial_lr: float = 1e-3, warmup_steps: int = 500, decay_factor: float = 0.1
) -> float:
    """Linear warm-up from 0.001 of the peak, then an inverse square root down to a floor."""
    if step < warmup_steps:
        return initial_lr * max(0.001, step / warmup_steps)
    return initial_lr * max(
        decay_factor, np.sqrt(max(1, warmup_steps) / (step if warmup_steps else step + 1))
    )


def polar_express_coefficients(steps: int) -> tuple[tuple[float, ...], ...]:
    """Amsel et al. 2025: the best odd quintic for singular values in [low, high], step by step."""
    low, high, cushion, odd, table = 1e-3, 1.0, 0.02407327424182761, np.array([1, 3, 5]), []
    for _ in range(steps):
        if high - low < 1e-5:  # the interval is a point: the limit
            table.append((15 / 8, -10 / 8, 3 / 8))
            continue
        p = minimax_quintic(max(low, cushion * high), high)
        p = p * 2 / (p @ low**odd + p @ high**odd)  # 1 - p(low) = p(high) - 1
        table.append(tuple(p.tolist()))
        low = float(p @ low**odd)
        high = 2 - low
    return tuple(table)


def minimax_quintic(low: float, high: float) -> Array:
    """Remez for p = ax + bx^3 + cx^5: 1 - p = E, -E, E, -E at low, q, r, high; p'(q, r) = 0."""
    a = b = c = 0.0
    q, r = (3 * low + high) / 4, (low + 3 * high) / 4
    for _ in range(30):  # quadratic convergence: far fewer would do
        x = np.array([low, q, r, high])
        a, b, c, _ = np.linalg.solve(np.stack([x, x**3, x**5, [1, -1, 1, -1]], 1), np.ones(4))
        q, r = np.sqrt(np.sort(np.roots([5 * c, 3 * b, a]).real))
    return np.array([a, b, c])
