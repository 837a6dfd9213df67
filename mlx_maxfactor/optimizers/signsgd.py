"""SignSGD: every element moves by the same amount. It has no state."""

import mlx.core as mx

from .. import functional as f
from .._validate import Rate, check_flag, check_number
from .base import Float32Optimizer, Rounding


class SignSGD(Float32Optimizer):
    r"""SignSGD with decoupled weight decay. It keeps no state.

    .. math:: p \leftarrow p (1 - \eta\lambda) - \eta\, \mathrm{sign}(g)

    Args:
        learning_rate: η, the distance that each element moves. A number or a function of the step.
            Default 0.01.
        weight_decay: λ. Default 0.1.
        sparse_rows: Leave rows (last axis) unchanged, without decay, if their gradient is zero. For
            embeddings, if a batch uses only a few rows. Default False.
        rounding, seed: As for ``OrthoMaxFactor``; stochastic rounding keeps a key per parameter.

    Raises:
        ValueError: An option is outside its range.

    Example:
        >>> import mlx.core as mx
        >>> from mlx_maxfactor import SignSGD
        >>> optimizer = SignSGD(learning_rate=0.5, weight_decay=0.0)
        >>> optimizer.apply_gradients({"b": mx.array([3.0, -0.1])}, {"b": mx.zeros(2)})["b"]
        array([-0.5, 0.5], dtype=float32)

    Reference:
        Bernstein et al., *signSGD*, 2018, arXiv 1802.04434.
    """

    def __init__(
        self,
        learning_rate: Rate = 1e-2,
        *,
        weight_decay: float = 0.1,
        sparse_rows: bool = False,
        rounding: Rounding = "nearest",
        seed: int = 0,
    ):
        super().__init__(learning_rate, rounding=rounding, seed=seed)
        self.weight_decay = check_number("weight_decay", weight_decay, 0.0)
        self.sparse_rows = check_flag("sparse_rows", sparse_rows)
        self.elementwise = not sparse_rows

    def rule(
        self, g: mx.array, p: mx.array, state: dict[str, mx.array]
    ) -> tuple[mx.array, dict[str, mx.array]]:
        """One update."""
        eta = self.learning_rate
        new = p * f.fusion_barrier(1 - eta * self.weight_decay) - eta * mx.sign(g)
        return mx.where(self._is_touched(g), new, p) if self.sparse_rows else new, state

    def _is_touched(self, g: mx.array) -> mx.array:
        return mx.any(g != 0, axis=-1, keepdims=True) if g.ndim > 1 else g != 0
