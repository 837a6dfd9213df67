"""MaxFactor: factored second moments, infinity norm, sign times row maximum."""

from collections.abc import Sequence
from typing import Any, Literal

import mlx.core as mx

from .. import functional as f
from .._validate import (
    Rate,
    check_choice,
    check_flags,
    check_not_negative,
    check_number,
    check_pair,
    check_rising,
)
from ..optimizers.base import Float32Optimizer, Rounding
from .frequency_adaptive_momentum import FrequencyAdaptiveMomentum

Preset = Literal["early", "hub", "speech"]

EARLY_AND_SPEECH: dict[str, Any] = {
    "eps": (2.0**-23, 1e-3),  # the first is the machine epsilon of float32
    "weight_decay": 0.0,
    "min_lr": 0.0,
    "scalar_boost": None,
}
"""Options that two of the presets share."""

PRESETS: dict[Preset, dict[str, Any]] = {
    "early": {
        **EARLY_AND_SPEECH,
        "vector_sign": True,
        "beta2_bounds": (0.0, 1.0),
        "eps_rms": 1e-8,
    },
    "hub": {},
    "speech": {**EARLY_AND_SPEECH, "relative_step": True, "beta2_bounds": (0.0, 0.999)},
}

LEAST_SHARE = 1e-3
"""A cautious step divides by at least this share of kept elements, as its authors' code does."""


class MaxFactor(Float32Optimizer):
    r"""MaxFactor. Its state is ``m + n`` floats for an ``m × n`` matrix.

    For a matrix, with :math:`b_t = \mathrm{clip}(t^{\text{beta2\_decay}}, \text{beta2\_bounds})`,

    .. math::

        \begin{aligned}
        R_i &\leftarrow R_i + b_t (\mathrm{mean}_j\, g_{ij}^2 - R_i), \qquad
        C_j \leftarrow C_j + b_t (\mathrm{mean}_i\, g_{ij}^2 - C_j) \\
        V_{ij} &= R_i C_j / \max(\max_i R_i, \epsilon_1), \qquad
        u = g / \sqrt{\max(V, \epsilon_1^2)}, \qquad
        u \leftarrow u / \max(\lVert u \rVert_\infty, \epsilon_1) \\
        p &\leftarrow p (1 - \eta\lambda)
            - \frac{\alpha}{\max(1, \mathrm{RMS}(u)/d)}\, \mathrm{sign}(u_{ij}) \max_k |u_{ik}| \\
        \alpha &= \max(\epsilon_2, \mathrm{RMS}(p)) \cdot
            \max(\text{min\_lr}, \min(\eta, 1/\sqrt{t}))
        \end{aligned}

    A vector keeps :math:`v \leftarrow \gamma v + (1-\gamma) g^2`, one float per element. It has
    :math:`u = g / \sqrt{\max(v, \epsilon_1^2)}` with the same norms, and steps by :math:`u`. A
    parameter with a single element steps by
    :math:`\alpha \cdot \text{scalar\_boost} \cdot g / (\sqrt v + \epsilon_1)`.

    The rate is relative: ``learning_rate`` 0.01 moves the largest elements by 1 % of the matrix's
    RMS. A matrix that starts at zero (LoRA's B) therefore moves only by ``eps[1] * learning_rate``
    at first, 1e-6 by default: give it ``min_rms``.

    Args:
        learning_rate: η, a number or a function of the step. Default 0.01.
        beta2_decay: Exponent of the weight of the newest squared gradient. Default -0.8.
        beta2_bounds: Bounds of that weight. Default (0.001, 0.999).
        eps: (ε₁, ε₂). ε₁ is the floor of divisors, at least 1e-15. ε₂ is the floor of RMS(p).
            Default (1e-10, 1e-4).
        d: An update with RMS(u) above d is scaled down. At 1 or more, none ever is. Default 1.
        weight_decay: λ, decoupled: each update multiplies p by 1 - ηλ (1 - αλ with
            ``relative_step``). Default 0.01.
        gamma: γ, decay of a vector's second moment. Default 0.99.
        max_norm: Divide V by the largest R, and step by the row maximum. False: do neither.
            Default True.
        min_lr: Floor of the relative rate. Default 1e-7.
        scalar_boost: Factor on the step of a parameter of size 1. None: treat it as a vector.
            Default 2.
        clip_threshold: Largest ‖u‖₂ after the infinity norm, or None. Default None.
        full_matrix: Matrices keep a full second moment, like vectors. Default False.
        relative_step: α = min(η, max(ε₂, RMS(p)) · min(1e-6·t, 1/√t)). Default False.
        vector_sign: Vectors step by sign(u)·max|u|. Default False.
        maximize: Maximize the objective. Default False.
        momentum: β of m ← βm + (1-β)g, in [0, 1), or a ``FrequencyAdaptiveMomentum``. m replaces g
            in u, but not in the statistics. It takes one buffer of the parameter's size. With it, a
            matrix whose gradient is zero goes on moving. Default 0: no buffer.
        nesterov: βm + (1-β)g replaces g in u instead. Needs momentum. Default False.
        cautious: Keep only elements of the step that have the same sign as g, and divide them by
            the share that was kept (Liang et al. 2024, arXiv 2411.16085). Needs momentum.
            Default False.
        eps_rms: Added to ε₁ in the floors of max R and ‖u‖_∞. Default 0.
        min_rms: Floor of RMS(p) in α, in addition to ε₂. Default 0.
        layout: How an array holds matrices, as for ``OrthoMaxFactor``. The norms
            of a "batched" array span all of it. Default "batched".
        rounding, seed: As for ``OrthoMaxFactor``.
        state_dtype: Dtype of the momentum, as for ``OrthoMaxFactor``. Default float32.

    Raises:
        ValueError: An option is outside its range. The message gives its name, range and value.

    Example:
        >>> import mlx.core as mx
        >>> from mlx_maxfactor import MaxFactor
        >>> optimizer = MaxFactor(learning_rate=0.01, weight_decay=0.0)
        >>> p = {"weight": mx.ones((2, 3))}
        >>> optimizer.apply_gradients({"weight": mx.ones((2, 3))}, p)["weight"][0, 0].item()
        0.9900000095367432

    Reference:
        The published PyTorch optimizer of this name. NOTES.md lists its defects, fixed here.
        Shazeer and Stern, *Adafactor*, 2018, arXiv 1804.04235, for the factored moments.
    """

    def __init__(
        self,
        learning_rate: Rate = 0.01,
        *,
        beta2_decay: float = -0.8,
        beta2_bounds: tuple[float, float] = (0.001, 0.999),
        eps: tuple[float, float] = (1e-10, 1e-4),
        d: float = 1.0,
        weight_decay: float = 0.01,
        gamma: float = 0.99,
        max_norm: bool = True,
        min_lr: float = 1e-7,
        scalar_boost: float | None = 2.0,
        clip_threshold: float | None = None,
        full_matrix: bool = False,
        relative_step: bool = False,
        vector_sign: bool = False,
        maximize: bool = False,
        momentum: float | FrequencyAdaptiveMomentum = 0.0,
        nesterov: bool = False,
        cautious: bool = False,
        eps_rms: float = 0.0,
        min_rms: float = 0.0,
        layout: f.Layout = "batched",
        rounding: Rounding = "nearest",
        seed: int = 0,
        state_dtype: f.StateDtype = "float32",
    ):
        self._usual_rate = None if min_rms or relative_step else 0.01
        super().__init__(learning_rate, layout, rounding, seed, state_dtype)
        self.beta2_decay = check_number("beta2_decay", beta2_decay, -1.0, 0.0)
        self.beta2_bounds = check_rising("beta2_bounds", beta2_bounds, 0.0, 1.0)
        self.eps = check_pair("eps", eps, 0.0)
        check_number("eps[0]", self.eps[0], 1e-15)
        self.d = check_number("d", d, 0.0, ends="()")
        self.gamma = check_number("gamma", gamma, 0.0, 1.0)
        self.max_norm, self.full_matrix = check_flags(max_norm=max_norm, full_matrix=full_matrix)
        self.scalar_boost = check_optional("scalar_boost", scalar_boost)
        self.clip_threshold = check_optional("clip_threshold", clip_threshold)
        self.relative_step, self.vector_sign, self.maximize = check_flags(
            relative_step=relative_step, vector_sign=vector_sign, maximize=maximize
        )
        self.weight_decay, self.min_lr, self.eps_rms, self.min_rms = check_not_negative(
            weight_decay=weight_decay, min_lr=min_lr, eps_rms=eps_rms, min_rms=min_rms
        )
        self._set_momentum(momentum, nesterov, cautious)

    def _set_momentum(self, momentum: Any, nesterov: bool, cautious: bool) -> None:
        adaptive = isinstance(momentum, FrequencyAdaptiveMomentum)
        self.momentum = momentum if adaptive else check_number("momentum", momentum, 0.0, 1.0)
        self.nesterov, self.cautious = check_flags(nesterov=nesterov, cautious=cautious)
        if (nesterov or cautious) and not momentum:
            name = "nesterov" if nesterov else "cautious"
            raise ValueError(f"{name}=True needs momentum in (0, 1), got momentum={momentum}")

    @classmethod
    def preset(cls, name: Preset, **overrides: Any) -> "MaxFactor":
        """Build one of the three published versions: ``"early"``, ``"hub"`` or ``"speech"``.

        Args:
            name: Which version.
            **overrides: Options of the constructor that replace the preset's.

        Raises:
            ValueError: An unknown name; the message lists the known ones.
        """
        return cls(**{**PRESETS[check_choice("preset", name, PRESETS)], **overrides})

    def new_state(self, shape: tuple[int, ...]) -> dict[str, mx.array]:
        """Row and column statistics, or a second moment, and the momentum, if there is any."""
        full = self.full_matrix or len(shape) < 3 or self._is_scalar(shape)
        second = {"v": mx.zeros(shape)} if full else f.zero_statistics(shape)
        return second | ({"m": mx.zeros(shape)} if self.momentum else {})

    def init_single(self, parameter: mx.array, state: dict, layout: str | None = None) -> None:
        """Make the state of one parameter."""
        super().init_single(parameter, state, layout)
        if isinstance(self.momentum, FrequencyAdaptiveMomentum):
            shape = f.input_axis_shape(parameter.shape, layout or self.layout)
            state.update(self.momentum.init(shape))

    def apply_batch(
        self,
        gradients: Sequence[mx.array],
        parameters: Sequence[mx.array],
        states: Sequence[dict],
        layout: str | None = None,
    ) -> list[mx.array]:
        """Update arrays of one shape. Bands of frequencies need the gradient's own axes."""
        if isinstance(self.momentum, FrequencyAdaptiveMomentum):
            for gradient, state in zip(gradients, states, strict=True):
                self._filter(self.momentum, gradient, state, layout or self.layout)
        updated = super().apply_batch(gradients, parameters, states, layout)
        for state in states:
            state.pop("h", None)
        return updated

    def _filter(
        self, momentum: FrequencyAdaptiveMomentum, gradient: mx.array, state: dict, layout: str
    ) -> None:
        """Put the filtered gradient ``h`` into the state, along the axis of the inputs."""
        g = f.as_gradient(f.as_items(gradient, layout))
        stack = f.is_stack(gradient.shape, layout)
        kept = {k: x if stack else x[None] for k, x in state.items() if k.startswith("m")}
        m, shape = f.unpacked(kept, g)["m"], f.input_axis_shape(gradient.shape, layout)
        h, m = momentum.replaced(g.reshape(shape), m.reshape(shape), state, self.nesterov)
        kept = f.packed({"m": m.reshape(g.shape), "h": h.reshape(g.shape)}, self.state_dtype)
        state.update(f.of_one(kept, stack))

    def rule(
        self, g: mx.array, p: mx.array, state: dict[str, mx.array]
    ) -> tuple[mx.array, dict[str, mx.array]]:
        """One update."""
        g = -g if self.maximize else g
        h, first = self._momentum(g, state)
        root, second = self._second_moment_root(g, state)
        step = self._step(f.clamp(h / root))
        if self.cautious:
            # Multiplied, not selected, so that a NaN stays a NaN.
            agrees = agreement(h, g)
            step = step * f.fusion_barrier(cautious_scale(agrees, f.each(g))) * agrees
        alpha = self.step_size(p, self.step, self.learning_rate)
        decay = (alpha if self.relative_step else self.learning_rate) * self.weight_decay
        return p - decay * p - alpha * step, {**first, **second}

    def step_size(self, p: mx.array, t: mx.array, rate: mx.array) -> mx.array:
        """α, relative to the RMS of the whole array, or of each expert's matrix."""
        t = mx.maximum(t.astype(mx.float32), 1.0)  # apply_single may be called on its own
        size = mx.maximum(f.rms(p, f.each(p)), max(self.eps[1], self.min_rms))
        if self.relative_step:
            return mx.minimum(rate, size * mx.minimum(1e-6 * t, mx.rsqrt(t)))
        floor = mx.where(rate > 0, self.min_lr, 0.0)  # a rate of 0 moves nothing
        return size * mx.maximum(mx.minimum(rate, mx.rsqrt(t)), floor)

    def _step(self, u: mx.array) -> mx.array:
        """The step of an update, with the three norms. For the row-max step they scale its rows."""
        if self._is_scalar(u.shape):
            return (self.scalar_boost or 1.0) * u
        axes, peaks = f.each(u), mx.max(mx.abs(u), axis=-1, keepdims=True)
        peak = mx.max(peaks, axis=axes, keepdims=True)
        scale = 1.0 / mx.maximum(peak, self.eps[0] + self.eps_rms)
        if self.clip_threshold is not None:
            norm = mx.sqrt(mx.sum(mx.square(u * scale), axis=axes, keepdims=True))
            scale = scale * mx.minimum(1.0, self.clip_threshold / mx.maximum(norm, f.ROOT_FLOOR))
        if self.d < 1:  # an update whose largest element is at most 1 has RMS at most 1
            scale = scale / mx.maximum(1.0, f.rms(u * scale, axes) / self.d)
        if self.max_norm if u.ndim > 2 else self.vector_sign:
            return mx.sign(u) * f.fusion_barrier(scale * peaks)
        return u * f.fusion_barrier(scale)

    def _is_scalar(self, shape: tuple[int, ...]) -> bool:
        return self.scalar_boost is not None and all(n == 1 for n in shape[1:])

    def _momentum(
        self, g: mx.array, state: dict[str, mx.array]
    ) -> tuple[mx.array, dict[str, mx.array]]:
        """What replaces the gradient in the update, and what to keep of it."""
        if isinstance(self.momentum, FrequencyAdaptiveMomentum):
            return -state["h"] if self.maximize else state["h"], {}
        return f.averaging_momentum(g, state, self.momentum, self.nesterov)

    def _second_moment_root(
        self, g: mx.array, state: dict[str, mx.array]
    ) -> tuple[mx.array, dict[str, mx.array]]:
        """``max(√V, ε₁)``, of a single number ``√v + ε₁``; and what to keep of it."""
        if "v" in state:
            v = self.gamma * state["v"] + (1 - self.gamma) * mx.square(g)
            root = mx.sqrt(v)
            scalar = self._is_scalar(g.shape)
            root = root + self.eps[0] if scalar else mx.maximum(self.eps[0], root)
            return root, {"v": v}
        weight = f.second_moment_weight(self.step, self.beta2_decay, self.beta2_bounds)
        row, column, _ = f.factored_second_moment(g, state["row"], state["column"], weight)
        largest = mx.max(row, axis=-2, keepdims=True)
        divisor = mx.maximum(largest, self.eps[0] + self.eps_rms) if self.max_norm else 1.0
        return f.factored_root(row, column, divisor, self.eps[0]), {"row": row, "column": column}


def check_optional(name: str, value: Any) -> float | None:
    """None, or a number above 0."""
    return None if value is None else check_number(name, value, 0.0, ends="()")


def agreement(momentum: mx.array, gradient: mx.array) -> mx.array:
    """1 where momentum and gradient have the same sign, else 0; one byte per element."""
    # mx.sign, because the product of two small numbers may underflow to zero. Not a boolean: C++
    # compilers turn one into a branch, which is mispredicted half of the time.
    return (mx.sign(momentum) * gradient > 0).astype(mx.uint8)


def cautious_scale(agrees: mx.array, axes: tuple[int, ...] | None = None) -> mx.array:
    """The factor on a cautious step: one over the share of kept elements.

    Liang et al. 2024, arXiv 2411.16085. The share is taken as at least 1e-3.
    """
    rows = mx.sum(agrees, axis=-2, keepdims=True) if agrees.ndim > 2 else agrees
    total = mx.sum(rows.astype(mx.float32), axis=axes, keepdims=True)
    return 1 / mx.maximum(total * (total.size / agrees.size), LEAST_SHARE)
