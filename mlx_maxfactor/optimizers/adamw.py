"""AdamW (Loshchilov and Hutter, 2019)."""

import mlx.core as mx

from .. import functional as f
from .._validate import Rate, check_flag, check_number, check_pair
from . import moment_state as moments
from .base import Float32Optimizer, Rounding


class AdamW(Float32Optimizer):
    r"""AdamW with bias correction, in float32 for parameters of any dtype.

    .. math::

        m \leftarrow \beta_1 m + (1-\beta_1) g, \qquad v \leftarrow \beta_2 v + (1-\beta_2) g^2,
        \qquad p \leftarrow p (1 - \eta\lambda) - \eta\, \hat m / (\sqrt{\hat v} + \epsilon)

    with :math:`\hat m = m / (1 - \beta_1^t)` and :math:`\hat v = v / (1 - \beta_2^t)`.
    :math:`t` counts the parameter's own updates, so a layer that is unfrozen late is corrected too.

    Args:
        learning_rate: η, a number or a function of the step. Default 1e-4.
        betas: (β₁, β₂), each in [0, 1). With β₁ = 0, m is g and is not kept. Default (0.9, 0.95).
        eps: ε, above 0. Default 1e-8.
        weight_decay: λ, decoupled. Default 0.1.
        bias_correction: Divide m and v by 1 - βᵗ. Default True.
        factored: Keep only the row and column means of v for arrays with two or more axes, as
            Adafactor does, and use :math:`R_i C_j / \\mathrm{mean}(R)` for v. Default False.
        rounding, seed: As for ``OrthoMaxFactor``.
        state_dtype: Dtype of m, as for ``OrthoMaxFactor``. v stays float32. With "int8" and "int4",
            m is bounded by the largest value that is possible with this v. With "int4", steps are
            shorter, because m is rounded down: 0.4 to 0.6 of float32's if the gradient stays the
            same and β₁ is 0.9. Default float32.

    Raises:
        ValueError: An option is outside its range.

    Example:
        >>> import mlx.core as mx
        >>> from mlx_maxfactor import AdamW
        >>> optimizer = AdamW(learning_rate=0.5)
        >>> optimizer.apply_gradients({"b": mx.array([2.0, -4.0])}, {"b": mx.zeros(2)})["b"]
        array([-0.5, 0.5], dtype=float32)

    Reference:
        Loshchilov and Hutter, *Decoupled Weight Decay Regularization*, 2019, arXiv 1711.05101.
    """

    def __init__(
        self,
        learning_rate: Rate = 1e-4,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        bias_correction: bool = True,
        factored: bool = False,
        layout: f.Layout = "batched",
        rounding: Rounding = "nearest",
        seed: int = 0,
        state_dtype: moments.StateDtype = "float32",
    ):
        super().__init__(learning_rate, layout, rounding, seed)
        self.state_dtype = moments.check_state_dtype(state_dtype)
        self.betas = check_pair("betas", betas, 0.0, 1.0)
        self.eps = check_number("eps", eps, 0.0, ends="()")
        self.weight_decay = check_number("weight_decay", weight_decay, 0.0)
        self.bias_correction = check_flag("bias_correction", bias_correction)
        self.factored = check_flag("factored", factored)

    def init_single(self, parameter: mx.array, state: dict, layout: str | None = None) -> None:
        """Make both moments, and a count of the parameter's own updates."""
        super().init_single(parameter, state)
        shape = f.as_matrices(parameter, self._layout(layout)).shape
        if self.betas[0]:
            moments.init_momentum(state, shape, self.state_dtype)
        moments.init_second_moment(state, shape, factored=self.factored and len(shape) > 1)
        state["count"] = mx.array(0, mx.uint32)

    def apply_single(
        self, gradient: mx.array, parameter: mx.array, state: dict, layout: str | None = None
    ) -> mx.array:
        """Update one parameter."""
        layout = self._layout(layout)
        p, g = self.load(parameter, layout), f.clamp_gradient(self.load(gradient, layout))
        eta, (beta1, beta2) = self.learning_rate, self.betas

        state["count"] = state["count"] + 1
        t = state["count"].astype(mx.float32)
        root = self._second_moment_root(g, state)
        m = (1 - beta1) * g
        if beta1:
            m = beta1 * moments.read_momentum(state, g.shape) + m
            if self.state_dtype in moments.BITS:
                # Elements far below their group's largest are rounded coarsely: limit their step.
                bound = f.fusion_barrier(f.largest_moment(beta1, beta2, t)) * root
                m = mx.maximum(-bound, mx.minimum(bound, m))
            m = moments.write_momentum(m, state, beta1)

        rate, eps = eta, mx.array(self.eps)
        if self.bias_correction:
            # m/c₁ / (√(v/c₂) + ε), with both corrections moved into scalars.
            correction = mx.sqrt(f.bias_correction(beta2, t))
            rate, eps = eta * correction / f.bias_correction(beta1, t), eps * correction
        decay = f.fusion_barrier(1 - eta * self.weight_decay)
        new = p * decay - f.fusion_barrier(rate) * m / (root + f.fusion_barrier(eps))
        return self.store(new, parameter, state, layout)

    def _layout(self, layout: str | None) -> str:
        # Elementwise updates need no layout, and so the state has the same shapes as MLX's AdamW.
        return layout or self.layout if self.factored else "batched"

    def _second_moment_root(self, g: mx.array, state: dict) -> mx.array:
        """√v, or its factored estimate."""
        beta2 = self.betas[1]
        if "v" in state:
            state["v"] = beta2 * state["v"] + (1 - beta2) * mx.square(g)
            return mx.sqrt(state["v"])
        row, column = moments.update_statistics(g, state, mx.array(1 - beta2))
        mean = mx.mean(row, axis=-2, keepdims=True)
        rows, root = f.factored_root(row, column, mean, f.ROOT_FLOOR)
        return rows * root

    def row_granularity(self, shape: tuple[int, ...], layout: str) -> int:
        """Cuts can be at any row, for "int8" and "int4" between groups of m. Factored: no cuts."""
        rows = 0 if self.factored and len(shape) > 1 else 1
        return moments.aligned_to_groups(rows, shape, self.state_dtype)
