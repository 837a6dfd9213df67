"""Muon: momentum orthogonalized by Newton–Schulz or the Polar Express."""

from collections.abc import Callable
from typing import Literal, get_args

import mlx.core as mx

from .. import functional as f
from .._validate import Rate, check_choice, check_flag, check_integer, check_number
from . import moment_state as moments
from .base import Float32Optimizer, Rounding, refuse_vector

Scale = Literal["spectral", "rms"]


class Muon(Float32Optimizer):
    r"""Muon, for hidden matrices. Its state is one momentum buffer of the matrix's size.

    .. math::

        m \leftarrow \beta m + g, \qquad u = g + \beta m \ \text{(Nesterov) or}\ m, \qquad
        p \leftarrow p (1 - \eta\lambda) - \eta\, s\, \mathrm{orthogonalize}(u)

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
        state_dtype: moments.StateDtype = "float32",
        block: int | None = None,
    ):
        super().__init__(learning_rate, layout, rounding, seed)
        self.state_dtype = moments.check_state_dtype(state_dtype)
        self.momentum = check_number("momentum", momentum, 0.0, 1.0)
        self.nesterov = check_flag("nesterov", nesterov)
        self.weight_decay = check_number("weight_decay", weight_decay, 0.0)
        self.scale = check_choice("scale", scale, (None, *get_args(Scale)))
        self.method = method if callable(method) else check_choice("method", method, f.METHODS)
        self.steps = check_integer("steps", steps, 1)
        self.block = None if block is None else check_integer("block", block, 1)

    def flops(self, shape: tuple[int, ...], layout: str) -> float:
        """The cost of the orthogonalization and of the elementwise operations."""
        matrices = f.matrices_shape(shape, layout)
        return super().flops(shape, layout) + f.orthogonalization_flops(matrices, self.block)

    def row_granularity(self, shape: tuple[int, ...], layout: str) -> int:
        """A stack is cut between matrices, a matrix between blocks of rows."""
        if layout == "transposed":
            return 0
        rows = f.rows_apart(f.matrices_shape(shape, layout), self.block)
        dtype = self.state_dtype if self.momentum else "float32"
        return moments.aligned_to_groups(rows, shape, dtype)

    def init_single(self, parameter: mx.array, state: dict, layout: str | None = None) -> None:
        """Make the momentum buffer, if there is momentum."""
        refuse_vector(self, parameter)
        super().init_single(parameter, state)
        shape = f.as_matrices(parameter, layout or self.layout).shape
        if self.momentum:
            moments.init_momentum(state, shape, self.state_dtype)

    def apply_single(
        self, gradient: mx.array, parameter: mx.array, state: dict, layout: str | None = None
    ) -> mx.array:
        """Update one parameter."""
        layout = layout or self.layout
        p, g = self.load(parameter, layout), f.clamp_gradient(self.load(gradient, layout))

        u = moments.with_momentum(g, state, self.momentum, self.nesterov)
        alpha = self.step_size(p, self.step, self.learning_rate, layout)
        p = p * (1 - self.learning_rate * self.weight_decay) - alpha * self.direction(u, state)
        return self.store(p, parameter, state, layout)

    def direction(self, u: mx.array, state: dict) -> mx.array:
        """Orthogonalize each matrix or block of rows. A subclass may keep more ``state``."""
        return f.orthogonalize(u, self.method, self.steps, self.block)

    def step_size(self, parameter: mx.array, t: mx.array, rate: mx.array, layout: str) -> mx.array:
        """η · s, the spectral norm of an update."""
        rows, columns = parameter.shape[-2:]
        return rate * f.muon_scale(rows, columns, self.scale)
