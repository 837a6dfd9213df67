"""Adafactor (Shazeer and Stern, 2018)."""

import mlx.core as mx

from .. import functional as f
from .._validate import Rate, check_number, check_pair
from . import moment_state as moments
from .base import Float32Optimizer, Rounding


class Adafactor(Float32Optimizer):
    r"""Adafactor without first moment. Its state is ``m + n`` floats for an ``m × n`` matrix.

    :math:`t` counts the parameter's own updates. For a matrix, with
    :math:`b_t = t^{\text{decay\_rate}}`,

    .. math::

        \begin{aligned}
        R_i &\leftarrow R_i + b_t (\mathrm{mean}_j (g_{ij}^2 + \epsilon_1) - R_i), \qquad
        C_j \leftarrow C_j + b_t (\mathrm{mean}_i (g_{ij}^2 + \epsilon_1) - C_j) \\
        V &= R C^\top / \mathrm{mean}(R), \qquad u = g / \sqrt V, \qquad
        u \leftarrow u / \max(1, \mathrm{RMS}(u) / \text{clip\_threshold}) \\
        p &\leftarrow p (1 - \alpha\lambda) - \alpha u
        \end{aligned}

    A vector keeps the full :math:`v` instead of :math:`V`. The rate :math:`\alpha` is
    ``learning_rate``. If that is None, the rate is relative:
    :math:`\min(10^{-2}, 1/\sqrt t) \cdot \max(\epsilon_2, \mathrm{RMS}(p))`.

    Args:
        learning_rate: α, a number or a function of the step. None: the relative step. If a rate is
            set later, it then replaces min(1e-2, 1/√t). Default None.
        eps: (ε₁, ε₂). ε₁ is added to each squared gradient. ε₂ is the floor of RMS(p) in the
            relative step. Both are above 0. Default (1e-30, 1e-3).
        clip_threshold: Largest RMS of an update. Default 1.
        decay_rate: Exponent of the weight of the newest squared gradient. Default -0.8.
        weight_decay: λ, decoupled: each update multiplies p by 1 - αλ. Default 0.
        layout: How an array holds matrices, as for ``OrthoMaxFactor``.
        rounding, seed: As for ``OrthoMaxFactor``.

    Raises:
        ValueError: An option is outside its range.

    Example:
        >>> import mlx.core as mx
        >>> from mlx_maxfactor import Adafactor
        >>> optimizer = Adafactor(learning_rate=0.5)
        >>> optimizer.apply_gradients({"b": mx.array([2.0, -4.0])}, {"b": mx.zeros(2)})["b"]
        array([-0.5, 0.5], dtype=float32)

    Reference:
        Shazeer and Stern, *Adafactor: Adaptive Learning Rates with Sublinear Memory Cost*, 2018,
        arXiv 1804.04235.
    """

    def __init__(
        self,
        learning_rate: Rate | None = None,
        *,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        weight_decay: float = 0.0,
        layout: f.Layout = "batched",
        rounding: Rounding = "nearest",
        seed: int = 0,
    ):
        self.relative_step = learning_rate is None
        rate = relative_step_of if learning_rate is None else learning_rate
        super().__init__(rate, layout, rounding, seed)
        self.eps = check_pair("eps", eps, 0.0, ends="()")
        self.clip_threshold = check_number("clip_threshold", clip_threshold, 0.0, ends="()")
        self.decay_rate = check_number("decay_rate", decay_rate, -1.0, 0.0)
        self.weight_decay = check_number("weight_decay", weight_decay, 0.0)

    def _shown_rate(self) -> str:
        relative = self._schedulers.get("learning_rate") is relative_step_of
        return "None" if relative else super()._shown_rate()

    def init_single(self, parameter: mx.array, state: dict, layout: str | None = None) -> None:
        """Make row and column statistics, or a vector's second moment, and a count of updates."""
        super().init_single(parameter, state)
        state["count"] = mx.array(0, mx.uint32)
        shape = f.as_matrices(parameter, layout or self.layout).shape
        moments.init_second_moment(state, shape, factored=len(shape) > 1)

    def apply_single(
        self, gradient: mx.array, parameter: mx.array, state: dict, layout: str | None = None
    ) -> mx.array:
        """Update one parameter."""
        layout = layout or self.layout
        alpha = self.step_size(self.load(parameter, layout), self.step, self.learning_rate, layout)
        g = self.load(f.read_after(gradient, alpha), layout)
        rows, root = self._second_moment_root(g, state)

        def update(after: mx.array) -> mx.array:
            u = f.clamp_gradient(self.load(f.read_after(gradient, after), layout)) / root / rows
            # The estimate is 0 where a dead row meets a dead column, and u is squared below.
            return f.clamp_gradient(u)

        u = update(rows)
        clip = mx.maximum(1.0, f.rms(u, f.norm_axes(g.ndim, layout)) / self.clip_threshold)
        scale = f.fusion_barrier(alpha / clip)
        if gradient.dtype != mx.float32:
            u = update(scale)  # recomputing it from 16 bits is faster than keeping it
        p = self.load(f.read_after(parameter, scale), layout)
        p = p * f.fusion_barrier(1 - alpha * self.weight_decay) - u * scale
        return self.store(p, parameter, state, layout)

    def _second_moment_root(self, g: mx.array, state: dict) -> tuple[mx.array, mx.array]:
        """√V as two factors. The first has one number per row."""
        state["count"] = state["count"] + 1
        weight = f.second_moment_weight(state["count"], self.decay_rate)
        if "v" in state:
            square = f.clamped_square(g) + self.eps[0]
            state["v"] = state["v"] + weight * (square - state["v"])
            return mx.array(1.0), mx.maximum(f.ROOT_FLOOR, mx.sqrt(state["v"]))
        row, column = moments.update_statistics(g, state, weight, self.eps[0])
        return f.factored_root(row, column, mx.mean(row, axis=-2, keepdims=True), f.ROOT_FLOOR)

    def step_size(self, parameter: mx.array, t: mx.array, rate: mx.array, layout: str) -> mx.array:
        """The rate. In the relative step it is multiplied by max(ε₂, RMS(p))."""
        if not self.relative_step:
            return rate
        size = f.rms(parameter, f.norm_axes(parameter.ndim, layout))
        return rate * mx.maximum(size, self.eps[1])


def relative_step_of(step: mx.array) -> mx.array:
    """min(1e-2, 1/√t) at update t = step + 1."""
    return mx.minimum(1e-2, mx.rsqrt(step.astype(mx.float32) + 1))
