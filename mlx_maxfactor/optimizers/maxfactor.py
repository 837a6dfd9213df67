"""MaxFactor: factored second moments, infinity norm, sign times row maximum."""

from collections.abc import Callable
from typing import Any, Literal

import mlx.core as mx

from .. import functional as f
from .._validate import (
    Rate,
    check_choice,
    check_flag,
    check_flags,
    check_not_negative,
    check_number,
    check_pair,
    check_rising,
)
from . import moment_state as moments
from .base import Float32Optimizer, Rounding
from .frequency_adaptive_momentum import FrequencyAdaptiveMomentum

STEP_MOVED = "the orthogonal step is OrthoMaxFactor(...), and MaxFactor takes the row-max step"

Reader = Callable[[mx.array], mx.array]
"""Reads the gradient or its momentum after another array, see ``functional.read_after``."""

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
            in u, but not in the statistics. It takes one buffer of the parameter's size. Default 0:
            no buffer.
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
        state_dtype: moments.StateDtype = "float32",
    ):
        self._usual_rate = None if min_rms or relative_step else 0.01
        super().__init__(learning_rate, layout, rounding, seed)
        self.beta2_decay = check_number("beta2_decay", beta2_decay, -1.0, 0.0)
        self.beta2_bounds = check_rising("beta2_bounds", beta2_bounds, 0.0, 1.0)
        self.eps = check_pair("eps", eps, 0.0)
        check_number("eps[0]", self.eps[0], 1e-15)
        self.d = check_number("d", d, 0.0, ends="()")
        self.weight_decay = check_number("weight_decay", weight_decay, 0.0)
        self.gamma = check_number("gamma", gamma, 0.0, 1.0)
        self.max_norm, self.full_matrix = check_flags(max_norm=max_norm, full_matrix=full_matrix)
        self.min_lr = check_number("min_lr", min_lr, 0.0)
        self.scalar_boost = check_optional("scalar_boost", scalar_boost)
        self.clip_threshold = check_optional("clip_threshold", clip_threshold)
        self.relative_step = check_flag("relative_step", relative_step)
        self.vector_sign, self.maximize = check_flags(vector_sign=vector_sign, maximize=maximize)
        self._set_momentum(momentum, nesterov, cautious, state_dtype)
        self.eps_rms, self.min_rms = check_not_negative(eps_rms=eps_rms, min_rms=min_rms)

    def _set_momentum(
        self,
        momentum: float | FrequencyAdaptiveMomentum,
        nesterov: bool,
        cautious: bool,
        state_dtype: moments.StateDtype,
    ) -> None:
        adaptive = isinstance(momentum, FrequencyAdaptiveMomentum)
        self.momentum = momentum if adaptive else check_number("momentum", momentum, 0.0, 1.0)
        self.state_dtype = moments.check_state_dtype(state_dtype)
        self.nesterov, self.cautious = check_flags(nesterov=nesterov, cautious=cautious)
        for name, flag in (("nesterov", nesterov), ("cautious", cautious)):
            if flag and not momentum:
                raise ValueError(f"{name}=True needs momentum in (0, 1), got momentum={momentum}")

    def __new__(cls, *_: Any, **options: Any) -> "MaxFactor":
        """Refuse the option ``step`` of version 0.1.0, and name its replacement."""
        if "step" in options:
            raise ValueError(f"MaxFactor has no option 'step': {STEP_MOVED}")
        return super().__new__(cls)

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

    def row_granularity(self, shape: tuple[int, ...], layout: str) -> int:
        """A stack is cut between experts. A matrix is not cut, because its norms span all rows."""
        # Single numbers are updated differently, and bands are computed for the whole stack.
        plain = not isinstance(self.momentum, FrequencyAdaptiveMomentum)
        apart = f.norm_axes(len(shape), layout) and plain and not self._is_scalar(shape[1:])
        dtype = self.state_dtype if self.momentum else "float32"
        return moments.aligned_to_groups(int(bool(apart)), shape, dtype)

    def init_single(self, parameter: mx.array, state: dict, layout: str | None = None) -> None:
        """Make row and column statistics for a matrix, or a second moment for other arrays."""
        super().init_single(parameter, state)
        layout = layout or self.layout
        shape = f.as_matrices(parameter, layout).shape
        moments.init_second_moment(state, shape, factored=self._is_factored(shape))
        if self.momentum:
            moments.init_momentum(state, shape, self.state_dtype)
        if isinstance(self.momentum, FrequencyAdaptiveMomentum):
            state.update(self.momentum.init(f.input_axis_shape(parameter.shape, layout)))

    def apply_single(
        self, gradient: mx.array, parameter: mx.array, state: dict, layout: str | None = None
    ) -> mx.array:
        """Update one parameter."""
        layout = layout or self.layout
        p = self.load(parameter, layout)
        axes = f.norm_axes(p.ndim, layout)
        alpha = self.step_size(p, self.step, self.learning_rate, layout)
        decay = (alpha if self.relative_step else self.learning_rate) * self.weight_decay

        def g(after: mx.array) -> mx.array:
            x = self.load(f.read_after(gradient, after), layout)
            return -x if self.maximize else x

        h = self._momentum(g, state, f.input_axis_shape(parameter.shape, layout))
        rows, root = self._second_moment_root(g(alpha), state)
        scale = self._scale(h(rows), rows, root, alpha, axes)
        if self.cautious:
            # Multiplied, not selected, so that a NaN stays a NaN.
            agrees = f.agreement(h(rows), g(rows))
            scale = f.fusion_barrier(scale * f.cautious_scale(agrees, axes))
            step = self._step(h(scale), rows, root, scale) * agrees
        else:
            step = self._step(h(scale), rows, root, scale)
        p = self.load(f.read_after(parameter, alpha), layout)
        return self.store(p * f.fusion_barrier(1 - decay) - step, parameter, state, layout)

    def step_size(self, parameter: mx.array, t: mx.array, rate: mx.array, layout: str) -> mx.array:
        """α, relative to the RMS of the whole array, or of each expert's matrix."""
        t = mx.maximum(t.astype(mx.float32), 1.0)  # apply_single may be called on its own
        size = f.rms(parameter, f.norm_axes(parameter.ndim, layout))
        size = mx.maximum(size, max(self.eps[1], self.min_rms))
        if self.relative_step:
            return mx.minimum(rate, size * mx.minimum(1e-6 * t, mx.rsqrt(t)))
        floor = mx.where(rate > 0, self.min_lr, 0.0)  # a rate of 0 moves nothing
        return size * mx.maximum(mx.minimum(rate, mx.rsqrt(t)), floor)

    def _scale(
        self,
        h: mx.array,
        rows: mx.array,
        root: mx.array,
        alpha: mx.array,
        axes: tuple[int, ...] | None,
    ) -> mx.array:
        """The factor on the step: α and the three norms of ``u = h / (rows · root)``.

        All steps are homogeneous in ``u``, so one number per norm scales them. For the row-max step
        it includes the maximum of each row.
        """
        if self._is_scalar(h.shape):
            return alpha * (self.scalar_boost or 1.0)
        u = f.clamp_gradient(h) / root / rows
        peaks = f.row_max(f.clamped_magnitude(h) / root) / rows
        peak = mx.max(peaks, axis=axes, keepdims=True)
        scale = 1.0 / mx.maximum(peak, self.eps[0] + self.eps_rms)
        if self.clip_threshold is not None:
            norm = mx.sqrt(mx.sum(mx.square(u * scale), axis=axes, keepdims=True))
            scale = scale * mx.minimum(1.0, self.clip_threshold / mx.maximum(norm, f.ROOT_FLOOR))
        if self.d < 1:  # an update whose largest element is at most 1 has RMS at most 1
            scale = scale / mx.maximum(1.0, f.rms(u * scale, axes) / self.d)
        scale = alpha * scale
        return f.fusion_barrier(scale * peaks if self._steps_by_row_max(h.shape) else scale)

    def _step(self, h: mx.array, rows: mx.array, root: mx.array, scale: mx.array) -> mx.array:
        if self._steps_by_row_max(h.shape):
            return mx.sign(h) * scale
        return f.clamp_gradient(h) / root / rows * scale

    def _is_scalar(self, shape: tuple[int, ...]) -> bool:
        return self.scalar_boost is not None and all(n == 1 for n in shape)

    def _is_factored(self, shape: tuple[int, ...]) -> bool:
        return len(shape) > 1 and not self.full_matrix and not self._is_scalar(shape)

    def _steps_by_row_max(self, shape: tuple[int, ...]) -> bool:
        by_row_max = self.max_norm if len(shape) > 1 else self.vector_sign
        return by_row_max and not self._is_scalar(shape)

    def _momentum(self, read: Reader, state: dict, shape: tuple[int, ...]) -> Reader:
        """The replacement for the gradient in the update. ``shape`` has the input axis last."""
        if not self.momentum:
            return read
        g = f.clamp_gradient(read(self.step))
        momentum = self.momentum
        if isinstance(momentum, FrequencyAdaptiveMomentum):
            alpha, view, g = momentum.alpha, g.shape, g.reshape(shape)
            m = momentum.update(g, moments.read_momentum(state, view).reshape(shape), state)
            moments.write_momentum(m.reshape(view), state, alpha)
            ahead = alpha * m + (1 - alpha) * g if self.nesterov else m
            h = momentum.blended(g, ahead, state).reshape(view)
        else:
            h = moments.with_momentum((1 - momentum) * g, state, momentum, self.nesterov)
        return lambda after: f.read_after(h, after)

    def _second_moment_root(self, g: mx.array, state: dict) -> tuple[mx.array, mx.array]:
        """``max(√V, ε₁)`` as two factors, the first with one number per row. A scalar: √v + ε₁."""
        if not self._is_factored(g.shape):
            state["v"] = self.gamma * state["v"] + (1 - self.gamma) * f.clamped_square(g)
            root = mx.sqrt(state["v"])
            scalar = self._is_scalar(g.shape)
            return mx.array(1.0), root + self.eps[0] if scalar else mx.maximum(self.eps[0], root)
        weight = f.second_moment_weight(self.step, self.beta2_decay, self.beta2_bounds)
        row, column = moments.update_statistics(g, state, weight)
        divisor = mx.array(1.0)
        if self.max_norm:
            largest = mx.max(row, axis=-2, keepdims=True)
            divisor = mx.maximum(largest, self.eps[0] + self.eps_rms)
        return f.factored_root(row, column, divisor, self.eps[0])


def check_optional(name: str, value: Any) -> float | None:
    """None, or a number above 0."""
    return None if value is None else check_number(name, value, 0.0, ends="()")
