"""OrthoMaxFactor: MaxFactor's statistics and relative rate, with an orthogonalized step."""

from collections.abc import Callable
from typing import Literal

import mlx.core as mx

from .. import functional as f
from .._validate import Rate, check_choice, check_flag, check_integer, check_number, check_rising
from .base import Float32Optimizer, Rounding, refuse_vector


class OrthoMaxFactor(Float32Optimizer):
    r"""OrthoMaxFactor, for hidden matrices. Its state takes about half a byte per weight.

    With :math:`b_t = \mathrm{clip}(t^{\text{beta2\_decay}}, \text{beta2\_bounds})`, for each matrix

    .. math::

        \begin{aligned}
        R_i &\leftarrow R_i + b_t (\mathrm{mean}_j\, g_{ij}^2 - R_i), \qquad
        C_j \leftarrow C_j + b_t (\mathrm{mean}_i\, g_{ij}^2 - C_j) \\
        m &\leftarrow \beta m + (1-\beta) g, \qquad
        h = \beta m + (1-\beta) g \ \text{(Nesterov) or}\ m \\
        u_{ij} &= h_{ij} / \sqrt{R_i C_j}, \qquad O = \mathrm{orthogonalize}(u) \\
        p &\leftarrow p (1 - \eta\lambda)
            - \eta \max(\text{floor}, \mathrm{RMS}(p))\, O / \mathrm{RMS}(O)
        \end{aligned}

    O is zero for a matrix whose squared gradient is zero in float32, whatever its momentum: an
    expert without tokens does not move.

    The rate is relative: with ``learning_rate`` 0.02 the RMS of a step is 2 % of the matrix's RMS.
    The best rate falls with the length of the run, about as :math:`0.8/\sqrt{\text{steps}}`.
    ``create_optimizer(model, total_steps=...)`` picks it.

    The state of an ``m × n`` matrix is ``m + n`` floats and the momentum. In 4 bits, the momentum
    takes 0.53 bytes per weight. AdamW keeps 8 bytes per weight.

    Args:
        learning_rate: η, the RMS of a step divided by the RMS of the matrix. A number or a function
            of the step. Default 0.02.
        momentum: β, in [0, 1). 0: no buffer, and ``state_dtype`` is not used. Default 0.8.
        nesterov: Look ahead by one step of momentum. Default True.
        state_dtype: Dtype of the momentum: "int4", "int8", "bfloat16" or "float32". Groups of
            weights share a scale: 32 in "int4", 64 in "int8". The step uses the momentum before it
            is rounded. Default "int4".
        block: Number of rows to orthogonalize together (of columns, if the matrix is tall). The
            last block may be smaller. This costs about ``10 · block`` operations per weight.
            Training costs 6 per weight and token. None: the whole matrix. Default 128.
        method: "newton_schulz", "polar_express", or your own function from a batch of matrices to
            a batch of matrices. Default "newton_schulz".
        steps: Iterations of the method. Default 5.
        weight_decay: λ, decoupled. Default 0.01.
        min_rms: Floor of RMS(p), so that matrices that start at zero learn. A number, or "init":
            :math:`1/\sqrt{3 \cdot \text{inputs}}`, the RMS of ``nn.Linear``'s initial weights.
            0: no floor. Default "init".
        beta2_decay: Exponent of the weight of the newest squared gradient. Default -0.8.
        beta2_bounds: Bounds of that weight. Default (0.001, 0.999).
        eps: Floor of :math:`\sqrt{R_i C_j / \max R}`, at least 1e-15. Default 1e-10.
        layout: How an array holds matrices. "batched" and "experts": the last two axes are a
            matrix. "conv": the array is one matrix, ``(out, -1)``. "transposed": a matrix is stored
            as ``(in, out)``. The router reads the layout from the module. Default "batched".
        rounding: How bf16 and fp16 parameters are rounded: "nearest", or "stochastic", with which
            updates too small for the dtype still add up. Default "nearest".
        seed: Seed of stochastic rounding. Default 0.

    Raises:
        ValueError: An option is outside its range. Or ``init_single`` gets a parameter with fewer
            than two axes, which needs another optimizer.

    Example:
        >>> import mlx.core as mx
        >>> from mlx_maxfactor import OrthoMaxFactor
        >>> optimizer = OrthoMaxFactor(0.01, method="polar_express", steps=8, weight_decay=0.0)
        >>> g = mx.array([[3.0, 0.0], [0.0, -0.1]])
        >>> p = optimizer.apply_gradients({"w": g}, {"w": mx.ones((2, 2))})["w"]
        >>> [round(x, 4) for x in mx.diag(p).tolist()]  # a diagonal O with RMS 1 has ±√2 on it
        [0.9859, 1.0141]

    Reference:
        Jordan et al., *Muon*, 2024, for the orthogonalization; Ma et al., *SWAN*, 2025, arXiv
        2412.13148, for normalizing before it; Khaled et al., *MuonBP*, 2025, arXiv 2510.16981, for
        blocks. See also SinkGD, arXiv 2502.06742, and NorMuon, arXiv 2510.05491.
    """

    casts = True  # the rule gets gradients, weights and momentum in the dtypes they are kept in

    def __init__(
        self,
        learning_rate: Rate = 0.02,
        *,
        momentum: float = 0.8,
        nesterov: bool = True,
        state_dtype: f.StateDtype = "int4",
        block: int | None = 128,
        method: f.Method | Callable[[mx.array], mx.array] = "newton_schulz",
        steps: int = 5,
        weight_decay: float = 0.01,
        min_rms: float | Literal["init"] = "init",
        beta2_decay: float = -0.8,
        beta2_bounds: tuple[float, float] = (0.001, 0.999),
        eps: float = 1e-10,
        layout: f.Layout = "batched",
        rounding: Rounding = "nearest",
        seed: int = 0,
    ):
        # Before the base class, which warns of a rate far below it. A number as floor is LoRA's.
        self._usual_rate = 0.02 if min_rms in ("init", 0) else None
        super().__init__(learning_rate, layout, rounding, seed, state_dtype)
        self.momentum = check_number("momentum", momentum, 0.0, 1.0)
        self.nesterov = check_flag("nesterov", nesterov)
        self.block = None if block is None else check_integer("block", block, 1)
        self.method = method if callable(method) else check_choice("method", method, f.METHODS)
        self.steps = check_integer("steps", steps, 1)
        self.weight_decay = check_number("weight_decay", weight_decay, 0.0)
        self.min_rms = min_rms if min_rms == "init" else check_number("min_rms", min_rms, 0.0)
        self.beta2_decay = check_number("beta2_decay", beta2_decay, -1.0, 0.0)
        self.beta2_bounds = check_rising("beta2_bounds", beta2_bounds, 0.0, 1.0)
        self.eps = check_number("eps", eps, 1e-15)

    def new_state(self, shape: tuple[int, ...]) -> dict[str, mx.array]:
        """Row and column statistics, and the momentum, if there is any."""
        refuse_vector(self, shape)
        return f.zero_statistics(shape) | ({"m": mx.zeros(shape)} if self.momentum else {})

    def rule(
        self, g: mx.array, p: mx.array, state: dict[str, mx.array]
    ) -> tuple[mx.array, dict[str, mx.array]]:
        """One update."""
        t, eta = self.step, self.learning_rate
        b = f.second_moment_weight(t, self.beta2_decay, self.beta2_bounds)
        old = state["row"], state["column"]
        row, column, newest = f.factored_second_moment(g, *old, b, is_view=True)
        h, kept = f.momentum(g, state, self.momentum, 1 - self.momentum, self.nesterov)
        # √(R C / max R) has a floor. The orthogonalization ignores the common factor max R.
        root = f.factored_root(row, column, mx.max(row, axis=-2, keepdims=True), self.eps)
        u = f.clamp(h / root)
        o, unit = f.orthogonalize(u, self.method, self.steps, self.block)
        # Without a gradient, as for an expert without tokens, old momentum moves nothing.
        rate = mx.where(newest > 0, self.step_size(p, t, eta) * unit, 0.0)
        p = p.astype(mx.float32)
        new = p - eta * (self.weight_decay * p) - f.fusion_barrier(rate) * o
        return new, {"row": row, "column": column, **kept}

    def step_size(self, p: mx.array, t: mx.array, rate: mx.array) -> mx.array:
        """η times the RMS of each matrix, or times the floor if that is larger."""
        floor = (3 * p.shape[-1]) ** -0.5 if isinstance(self.min_rms, str) else self.min_rms
        return rate * mx.maximum(f.rms(p, (-2, -1)), floor)

    def flops(self, shape: tuple[int, ...], layout: str) -> float:
        """The cost of the orthogonalization and of the elementwise operations."""
        matrices = f.items_shape(shape, layout)
        return super().flops(shape, layout) + f.orthogonalization_flops(matrices, self.block)
