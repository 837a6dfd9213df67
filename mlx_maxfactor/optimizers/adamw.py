"""AdamW (Loshchilov and Hutter, 2019)."""

import mlx.core as mx

from .. import functional as f
from .._validate import Rate, check_flag, check_number, check_pair
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
        state_dtype: f.StateDtype = "float32",
    ):
        super().__init__(learning_rate, layout, rounding, seed, state_dtype)
        self.betas = check_pair("betas", betas, 0.0, 1.0)
        self.eps = check_number("eps", eps, 0.0, ends="()")
        self.weight_decay = check_number("weight_decay", weight_decay, 0.0)
        self.bias_correction = check_flag("bias_correction", bias_correction)
        self.factored = check_flag("factored", factored)
        self.elementwise = not factored

    def new_state(self, shape: tuple[int, ...]) -> dict[str, mx.array]:
        """Both moments, and a count of updates. Without β₁ there is no first moment."""
        factored = self.factored and len(shape) > 2
        second = f.zero_statistics(shape) if factored else {"v": mx.zeros(shape)}
        first = {"m": mx.zeros(shape)} if self.betas[0] else {}
        return first | second | f.zero_count(shape)

    def rule(
        self, g: mx.array, p: mx.array, state: dict[str, mx.array]
    ) -> tuple[mx.array, dict[str, mx.array]]:
        """One update."""
        eta, (beta1, beta2), t = self.learning_rate, self.betas, state["count"] + 1
        root, second = self._second_moment_root(g, state)
        m, first = f.averaging_momentum(g, state, beta1, nesterov=False)
        if first and self.state_dtype in f.BITS:
            # Elements far below their group's largest are rounded coarsely: limit their step.
            bound = f.fusion_barrier(f.largest_moment(beta1, beta2, t)) * root
            m = first["m"] = mx.maximum(-bound, mx.minimum(bound, m))
        c1, c2 = (
            f.bias_correction(b, t) if self.bias_correction else mx.array(1.0) for b in self.betas
        )
        # m/c₁ / (√(v/c₂) + ε), with both corrections moved into scalars.
        rate = f.fusion_barrier(eta * mx.sqrt(c2) / c1)
        step = rate * m / (root + f.fusion_barrier(self.eps * mx.sqrt(c2)))
        return p - eta * (self.weight_decay * p) - step, {**first, **second, "count": t}

    def _second_moment_root(
        self, g: mx.array, state: dict[str, mx.array]
    ) -> tuple[mx.array, dict[str, mx.array]]:
        """√v or its factored estimate, and what to keep of it."""
        beta2 = self.betas[1]
        if "v" in state:
            v = beta2 * state["v"] + (1 - beta2) * mx.square(g)
            return mx.sqrt(v), {"v": v}
        row, column, _ = f.factored_second_moment(g, state["row"], state["column"], 1 - beta2)
        mean = mx.mean(row, axis=-2, keepdims=True)
        return f.factored_root(row, column, mean, f.ROOT_FLOOR), {"row": row, "column": column}
