"""Adafactor (Shazeer and Stern, 2018)."""

import mlx.core as mx

from .. import functional as f
from .._validate import Rate, check_number, check_pair
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

    def new_state(self, shape: tuple[int, ...]) -> dict[str, mx.array]:
        """Row and column statistics, or a vector's second moment, and a count of updates."""
        second = f.zero_statistics(shape) if len(shape) > 2 else {"v": mx.zeros(shape)}
        return second | f.zero_count(shape)

    def rule(
        self, g: mx.array, p: mx.array, state: dict[str, mx.array]
    ) -> tuple[mx.array, dict[str, mx.array]]:
        """One update."""
        count = state["count"] + 1
        b = f.second_moment_weight(count, self.decay_rate)
        u, second = self._normalized(g, state, b)
        u = u / f.fusion_barrier(mx.maximum(1.0, f.rms(u, f.each(u)) / self.clip_threshold))
        alpha = self.step_size(p, self.step, self.learning_rate)
        new = p - alpha * (self.weight_decay * p + u)
        return new, {**second, "count": count}

    def _normalized(
        self, g: mx.array, state: dict[str, mx.array], b: mx.array
    ) -> tuple[mx.array, dict[str, mx.array]]:
        """``g / √V``, and what to keep of V."""
        if "v" in state:
            v = state["v"] + b * (mx.square(g) + self.eps[0] - state["v"])
            return f.clamp(g / mx.maximum(f.ROOT_FLOOR, mx.sqrt(v))), {"v": v}
        row, column, _ = f.factored_second_moment(g, state["row"], state["column"], b, self.eps[0])
        mean = mx.mean(row, axis=-2, keepdims=True)
        root = f.factored_root(row, column, mean, f.ROOT_FLOOR)
        return f.clamp(g / root), {"row": row, "column": column}

    def step_size(self, p: mx.array, t: mx.array, rate: mx.array) -> mx.array:
        """The rate. In the relative step it is multiplied by max(ε₂, RMS(p))."""
        if not self.relative_step:
            return rate
        return f.fusion_barrier(rate * mx.maximum(f.rms(p, f.each(p)), self.eps[1]))


def relative_step_of(step: mx.array) -> mx.array:
    """min(1e-2, 1/√t) at update t = step + 1."""
    return mx.minimum(1e-2, mx.rsqrt(step.astype(mx.float32) + 1))
