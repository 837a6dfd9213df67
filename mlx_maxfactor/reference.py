"""NumPy float64 twins of the optimizers and orthogonalizers, in the papers' notation.

Written from the papers and the published PyTorch code, apart from the package they check. Only the
coefficients of the Polar Express are shared, which ``tests/twins.py`` derives by itself. A twin
holds the state of ONE parameter: `twin.update(p, g)` returns the new p, and `twin.t` counts from 1.
float64 has the range that float32 lacks, so no guard against overflow appears here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .functional import POLAR_EXPRESS

Array = np.ndarray[Any, np.dtype[np.float64]]
Span = tuple[int, int] | None  # the axes of a norm, an RMS or a share; None is all of them
Schedule = Callable[[int], float]


def rms(x: Array, span: Span = None) -> Array:
    """||x||_2 / sqrt(size)."""
    return np.sqrt(np.mean(x**2, axis=span, keepdims=True))


class Twin:
    """One parameter: `rule` sees a clamped gradient, and matrices in the last two axes."""

    learning_rate: Any
    momentum: float
    nesterov: bool
    t: int = 0
    m = v = R = C = np.zeros(())  # broadcast up to their shape at the first update
    view: tuple[int, ...] = ()  # of g, with the input axis last

    def update(self, p: Array, g: Array, layout: str = "batched") -> Array:
        """Make update t; `layout` is "batched", "experts", "conv", "conv/4" or "transposed"."""
        self.t += 1
        rate = self.learning_rate
        eta: Any = rate(self.t - 1) if callable(rate) else rate
        p, g = np.asarray(p, np.float64), np.clip(np.asarray(g, np.float64), -1e15, 1e15)
        span, turned = None, p.ndim >= 2 and layout == "transposed"
        if turned:
            p, g = p.swapaxes(-1, -2), g.swapaxes(-1, -2)
        shape = self.view = p.shape
        if p.ndim > 2 and layout.startswith("conv"):  # (out, k..., in): a matrix for each group
            groups = int(layout[5:] or 1)
            stack, span = (groups, len(p) // groups, -1), (-2, -1)
            p, g, self.view = p.reshape(stack), g.reshape(stack), (-1, shape[-1])
        if p.ndim >= 2 and layout == "experts":  # each matrix by itself
            span = (-2, -1)
        new = np.asarray(self.rule(p, g, eta, span)).reshape(shape)
        return new.swapaxes(-1, -2) if turned else new

    def averaged(self, g: Array) -> Array:
        """The momentum that stands for g; momentum = 0 is g itself."""
        beta = self.momentum
        self.m = beta * self.m + (1 - beta) * g
        return beta * self.m + (1 - beta) * g if self.nesterov else self.m

    def rule(self, p: Array, g: Array, eta: Any, span: Span) -> Array:
        raise NotImplementedError


@dataclass
class MaxFactor(Twin):
    """The rule of NOTES.md."""

    learning_rate: float | Schedule = 0.01
    beta2_decay: float = -0.8
    beta2_bounds: tuple[float, float] = (0.001, 0.999)
    eps: tuple[float, float] = (1e-10, 1e-4)
    d: float = 1.0
    weight_decay: float = 0.01
    gamma: float = 0.99
    max_norm: bool = True
    min_lr: float = 1e-7
    scalar_boost: float | None = 2.0
    clip_threshold: float | None = None
    full_matrix: bool = False
    relative_step: bool = False
    vector_sign: bool = False
    maximize: bool = False
    momentum: float = 0.0
    nesterov: bool = False
    cautious: bool = False
    eps_rms: float = 0.0
    min_rms: float = 0.0

    def rule(self, p: Array, g: Array, eta: Any, span: Span) -> Array:
        g = -g if self.maximize else g
        boost = self.scalar_boost if p.size == 1 else None
        alpha, decay = self.rates(p, eta, span)
        full = p.ndim < 2 or self.full_matrix or boost is not None
        V = self.second_moment(g, full)
        if boost is not None:
            step = boost * self.averaged(g) / (np.sqrt(V) + self.eps[0])
        else:
            step = self.direction(self.averaged(g), V, span)
        if self.cautious:  # Liang et al. 2024
            mask = step * g > 0
            step = step * mask / np.maximum(np.mean(mask, axis=span, keepdims=True), 1e-3)
        return p * (1 - decay) - alpha * step

    def rates(self, p: Array, eta: float, span: Span) -> tuple[Array, Any]:
        """alpha and the decay."""
        scale = np.maximum(max(self.eps[1], self.min_rms), rms(p, span))
        if self.relative_step:
            alpha = np.minimum(eta, scale * min(1e-6 * self.t, 1 / np.sqrt(self.t)))
            return alpha, alpha * self.weight_decay
        rho_t = max(self.min_lr, min(eta, 1 / np.sqrt(self.t))) if eta > 0 else 0.0
        return scale * rho_t, eta * self.weight_decay

    def second_moment(self, g: Array, full: bool) -> Array:
        """V: (R / max R) C for matrices, otherwise a full moving average."""
        if full:
            self.v = self.gamma * self.v + (1 - self.gamma) * g**2
            return self.v
        (m, n), floor = g.shape[-2:], self.eps[0] + self.eps_rms
        b_t = np.clip(float(self.t) ** self.beta2_decay, *self.beta2_bounds)
        R_t = np.sum(g**2, axis=-1, keepdims=True) / (n + self.eps_rms)
        C_t = np.sum(g**2, axis=-2, keepdims=True) / (m + self.eps_rms)
        self.R = self.R + b_t * (R_t - self.R)
        self.C = self.C + b_t * (C_t - self.C)
        top = np.max(self.R, axis=-2, keepdims=True)
        return self.R / np.maximum(top, floor) * self.C if self.max_norm else self.R * self.C

    def direction(self, g: Array, V: Array, span: Span) -> Array:
        """u / D, and its row maximum under its sign."""
        eps1, clip = self.eps[0], self.clip_threshold
        u = g / np.sqrt(np.maximum(V, eps1**2))
        u = u / np.maximum(np.max(np.abs(u), axis=span, keepdims=True), eps1 + self.eps_rms)
        if clip is not None:
            norm = np.sqrt(np.sum(u**2, axis=span, keepdims=True))
            u = u * clip / np.maximum(norm, clip)
        D = np.maximum(1, rms(u, span) / self.d)
        if self.max_norm if u.ndim >= 2 else self.vector_sign:
            row = -1 if u.ndim >= 2 else None
            u = np.sign(u) * np.max(np.abs(u), axis=row, keepdims=True)
        return u / D


@dataclass
class OrthoMaxFactor(Twin):
    """SPEC: MaxFactor's R and C, momentum, an orthogonalized step, a relative rate."""

    learning_rate: float | Schedule = 0.02
    momentum: float = 0.8
    nesterov: bool = True
    block: int | None = 128
    method: str = "newton_schulz"
    steps: int = 5
    weight_decay: float = 0.01
    min_rms: float | str = "init"
    beta2_decay: float = -0.8
    beta2_bounds: tuple[float, float] = (0.001, 0.999)
    eps: float = 1e-10

    def rule(self, p: Array, g: Array, eta: Any, span: Span) -> Array:
        b_t = np.clip(float(self.t) ** self.beta2_decay, *self.beta2_bounds)
        self.R = self.R + b_t * (np.mean(g**2, axis=-1, keepdims=True) - self.R)
        self.C = self.C + b_t * (np.mean(g**2, axis=-2, keepdims=True) - self.C)
        top = np.max(self.R, axis=-2, keepdims=True)
        size = np.sqrt(self.R / np.where(top > 0, top, 1) * self.C)
        u = self.averaged(g) / np.maximum(size, self.eps)
        X = orthogonalize_blocks(u, self.method, self.steps, self.block)
        length = rms(X, (-2, -1))  # of each matrix
        fan_in = p.shape[-1]
        floor = 1 / np.sqrt(3 * fan_in) if self.min_rms == "init" else self.min_rms
        alpha = eta * np.maximum(floor, rms(p, (-2, -1)))
        alpha = np.where(np.any(g, axis=(-2, -1), keepdims=True), alpha, 0)  # none without gradient
        return p * (1 - eta * self.weight_decay) - alpha * X / np.where(length > 0, length, 1)


MXFP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def quantized(x: Array, bits: int) -> Array:
    """What is read back of one array: groups share a scale, each element takes its nearest level.

    4 bits: 32 elements, the smallest power of two with which 6 times it is the largest magnitude
    or above; halfway between two levels is the lower one. 8 bits: 64 elements, their largest
    magnitude in bf16, and levels (c/127)^2 that are compared by their roots.
    """
    width = 32 if bits == 4 else 64
    flat = np.pad(np.float64(x).reshape(-1), (0, -x.size % width)).reshape(-1, width)
    top = np.max(np.abs(flat), axis=1, keepdims=True)
    top = np.where(top > 0, top, 1.0)
    if bits == 4:
        level, edges = MXFP4, (MXFP4[1:] + MXFP4[:-1]) / 2
        size = 2.0 ** np.ceil(np.log2(top / 6))
        code = np.searchsorted(edges, np.abs(flat) / size, side="left")
    else:
        level, edges = (np.arange(128) / 127) ** 2, ((np.arange(127) + 0.5) / 127) ** 2
        size = 2.0 ** np.floor(np.log2(top)) / 128  # the spacing of bf16, which has 8 bits
        size = np.round(top / size) * size
        code = np.searchsorted(edges, np.abs(flat) / size, side="right")
    return (np.sign(flat) * level[code] * size).reshape(-1)[: x.size].reshape(x.shape)


@dataclass
class Adafactor(Twin):
    """Shazeer & Stern 2018 (arXiv 1804.04235), algorithms 4 and 5, with decoupled decay."""

    learning_rate: float | Schedule | None = None
    eps: tuple[float, float] = (1e-30, 1e-3)
    clip_threshold: float = 1.0
    decay_rate: float = -0.8
    weight_decay: float = 0.0

    def rule(self, p: Array, g: Array, eta: Any, span: Span) -> Array:
        eps1, eps2 = self.eps
        b_t = float(self.t) ** self.decay_rate
        g2 = g**2 + eps1
        if p.ndim >= 2:
            self.R = self.R + b_t * (np.mean(g2, axis=-1, keepdims=True) - self.R)
            self.C = self.C + b_t * (np.mean(g2, axis=-2, keepdims=True) - self.C)
            V = self.R / np.mean(self.R, axis=-2, keepdims=True) * self.C
        else:
            V = self.v = self.v + b_t * (g2 - self.v)
        u = g / np.sqrt(V)
        u = u / np.maximum(1, rms(u, span) / self.clip_threshold)
        if eta is None:
            eta = min(1e-2, 1 / np.sqrt(self.t)) * np.maximum(eps2, rms(p, span))
        return p * (1 - eta * self.weight_decay) - eta * u


@dataclass
class SignSGD(Twin):
    """Bernstein et al. 2018 (arXiv 1802.04434) with decoupled decay; a row is the last axis."""

    learning_rate: float | Schedule = 1e-2
    weight_decay: float = 0.1
    sparse_rows: bool = False

    def rule(self, p: Array, g: Array, eta: Any, span: Span) -> Array:
        new = p * (1 - eta * self.weight_decay) - eta * np.sign(g)
        row = -1 if p.ndim else None
        return np.where(np.any(g, axis=row, keepdims=True), new, p) if self.sparse_rows else new


@dataclass
class Muon(Twin):
    """Jordan et al. 2024; scales of Jordan ("spectral") and of Liu et al. 2025 ("rms")."""

    learning_rate: float | Schedule = 0.02
    momentum: float = 0.95
    nesterov: bool = True
    weight_decay: float = 0.0
    scale: str | None = None
    method: str = "newton_schulz"
    steps: int = 5
    block: int | None = None

    def rule(self, p: Array, g: Array, eta: Any, span: Span) -> Array:
        beta, (rows, cols) = self.momentum, g.shape[-2:]
        self.m = beta * self.m + g
        u = g + beta * self.m if self.nesterov else self.m
        spectral, moonshot = max(1, rows / cols) ** 0.5, 0.2 * max(rows, cols) ** 0.5
        s = {None: 1.0, "spectral": spectral, "rms": moonshot}[self.scale]
        X = orthogonalize_blocks(u, self.method, self.steps, self.block)
        return p * (1 - eta * self.weight_decay) - eta * s * X


@dataclass
class AdamW(Twin):
    """Loshchilov & Hutter 2019 (arXiv 1711.05101), algorithm 2."""

    learning_rate: float | Schedule = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    bias_correction: bool = True

    def rule(self, p: Array, g: Array, eta: Any, span: Span) -> Array:
        beta1, beta2 = self.betas
        self.m = beta1 * self.m + (1 - beta1) * g
        self.v = beta2 * self.v + (1 - beta2) * g**2
        t = self.t if self.bias_correction else np.inf
        m_hat, v_hat = self.m / (1 - beta1**t), self.v / (1 - beta2**t)
        return p * (1 - eta * self.weight_decay) - eta * m_hat / (np.sqrt(v_hat) + self.eps)


def orthogonalize(G: Array, coefficients: Any, slack: float = 1.0) -> Array:
    """X = G / (slack ||G||_F), then X = aX + (bA + cA^2)X with A = XX^T, on the wide side."""
    if G.shape[-2] > G.shape[-1]:
        return orthogonalize(G.swapaxes(-1, -2), coefficients, slack).swapaxes(-1, -2)
    norm = np.linalg.norm(G, axis=(-2, -1), keepdims=True)
    X = G / np.where(norm > 0, slack * norm, 1)
    for a, b, c in coefficients:
        A = X @ X.swapaxes(-1, -2)
        X = a * X + (b * A + c * A @ A) @ X
    return X


def newton_schulz(x: Array, steps: int = 5) -> Array:
    """Jordan et al. 2024."""
    return orthogonalize(x, [(3.4445, -4.7750, 2.0315)] * steps)


def polar_express(x: Array, steps: int = 5) -> Array:
    """Amsel et al. 2025 (arXiv 2505.16932). Each row but the limit is damped by 1.01."""
    damped = [(a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in POLAR_EXPRESS[:-1]]
    return orthogonalize(x, [*damped, *[POLAR_EXPRESS[-1]] * steps][:steps], slack=1.01)


def orthogonalize_blocks(
    G: Array, method: str = "newton_schulz", steps: int = 5, block: int | None = None
) -> Array:
    """G (..., m, n): `block` rows at a time, or columns if m > n, each block by itself."""
    polar = {"newton_schulz": newton_schulz, "polar_express": polar_express}[method]
    m, n = G.shape[-2:]
    if m > n:
        return orthogonalize_blocks(G.swapaxes(-1, -2), method, steps, block).swapaxes(-1, -2)
    size = block or m
    blocks = [polar(G[..., i : i + size, :], steps) for i in range(0, m, size)]  # (..., size, n)
    return np.concatenate(blocks, axis=-2)
