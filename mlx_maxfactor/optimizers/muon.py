"""Muon: momentum orthogonalized by Newton–Schulz or the Polar Express."""

from collections.abc import Callable
from typing import Literal, get_args

import mlx.core as mx

from .. import functional as f
from .._validate import Rate, check_choice, check_flag, check_integer, check_number
from .base import Float32Optimizer, Rounding, refuse_vector

Scale = Literal["spectral", "rms"]


class Muon(Float32Optimizer):
    r"""Muon, for hidden matrices. Its state is one momentum buffer of the matrix's size.

    .. math::

        m \leftarrow \beta m + g, \qquad u = g + \beta m \ \text{(Nesterov) or}\ m, \qquad
        p \leftarrow p (1 - \eta\lambda) - \eta\, s\, \mathrm{orthogonalize}(u)

    A matrix whose gradient is zero, as of an expert without tokens, goes on moving at full size
    until its momentum is zero, as in every published Muon. :class:`OrthoMaxFactor` stops.

    Args:
        learning_rate: η, the spectral norm of an update if s is 1. A number or a function of the
            step. Default 0.02.
        momentum: β, in [0, 1). 0: no buffer. Default 0.95.
        nesterov: Look ahead by one step of momentum. Default True.
        weight_decay: λ, decoupled: it is not part of the matrix that is orthogonalized. Default 0.
        scale: s, which depends on the shape of the matrix. None: 1. "spectral":
            √max(1, rows/columns) (Keller Jordan). "rms": 0.2·√max(rows, columns) (Moonshot), so
            that a rate and a decay tuned for AdamW carry over. Default None.
        method: "newton_schulz", "polar_express", or your own function from a batch of matrices to
            a batch of matrices. Default "newton_schulz".
        steps: Iterations of the method. Default 5.
        layout: How an array holds matrices, as for ``OrthoMaxFactor``. Each
            matrix is orthogonalized separately.
        rounding, seed: As for ``OrthoMaxFactor``.
        state_dtype: Dtype of the momentum, as for ``OrthoMaxFactor``. Default float32.
        block: Number of rows to orthogonalize together, as for ``OrthoMaxFactor``. ``scale`` is
            still computed from the whole matrix. Default None: all rows.

    Raises:
        ValueError: An option is outside its range. Or ``init_single`` gets a parameter with fewer
            than two axes, which needs another optimizer.

    Example:
        >>> import mlx.core as mx
        >>> from mlx_maxfactor import Muon
        >>> optimizer = Muon(learning_rate=0.1, method="polar_express", steps=8)
        >>> p = optimizer.apply_gradients({"w": 3 * mx.eye(2)}, {"w": mx.zeros((2, 2))})["w"]
        >>> bool(mx.allclose(p, -0.1 * mx.eye(2), atol=1e-5))
        True

    Reference:
        Keller Jordan et al., *Muon: An optimizer for hidden layers in neural networks*, 2024.
        Liu et al., *Muon is Scalable for LLM Training*, 2025, arXiv 2502.16982.
    """

    casts = True

    def __init__(
        self,
        learning_rate: Rate = 0.02,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        scale: Scale | None = None,
        method: f.Method | Callable[[mx.array], mx.array] = "newton_schulz",
        steps: int = 5,
        layout: f.Layout = "batched",
        rounding: Rounding = "nearest",
        seed: int = 0,
        state_dtype: f.StateDtype = "float32",
        block: int | None = None,
    ):
        super().__init__(learning_rate, layout, rounding, seed, state_dtype)
        self.momentum = check_number("momentum", momentum, 0.0, 1.0)
        self.nesterov = check_flag("nesterov", nesterov)
        self.weight_decay = check_number("weight_decay", weight_decay, 0.0)
        self.scale = check_choice("scale", scale, (None, *get_args(Scale)))
        self.method = method if callable(method) else check_choice("method", method, f.METHODS)
        self.steps = check_integer("steps", steps, 1)
        self.block = None if block is None else check_integer("block", block, 1)

    def new_state(self, shape: tuple[int, ...]) -> dict[str, mx.array]:
        """The momentum, if there is any."""
        refuse_vector(self, shape)
        return {"m": mx.zeros(shape)} if self.momentum else {}

    def rule(
        self, g: mx.array, p: mx.array, state: dict[str, mx.array]
    ) -> tuple[mx.array, dict[str, mx.array]]:
        """One update."""
        u, kept = f.momentum(g, state, self.momentum, 1.0, self.nesterov)
        o, _ = f.orthogonalize(f.clamp(u), self.method, self.steps, self.block)
        p, eta = p.astype(mx.float32), self.learning_rate
        return p - eta * (self.weight_decay * p) - self.step_size(p, self.step, eta) * o, kept

    def step_size(self, p: mx.array, t: mx.array, rate: mx.array) -> mx.array:
        """η · s, the spectral norm of an update."""
        rows, columns = p.shape[-2:]
        return rate * f.muon_scale(rows, columns, self.scale)

    def flops(self, shape: tuple[int, ...], layout: str) -> float:
        """The cost of the orthogonalization and of the elementwise operations."""
        matrices = f.items_shape(shape, layout)
        return super().flops(shape, layout) + f.orthogonalization_flops(matrices, self.block)
