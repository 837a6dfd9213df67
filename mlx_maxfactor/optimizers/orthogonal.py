"""The orthogonal step: all singular values of an update made equal."""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from .. import functional as f
from .._validate import check_choice, check_flags, check_integer


@dataclass(frozen=True)
class Orthogonal:
    r"""The orthogonal step, a value of ``MaxFactor(step=...)``.

    With :math:`h` the gradient or its momentum and :math:`R, C` MaxFactor's statistics,

    .. math::

        u_{ij} = h_{ij} / \sqrt{R_i C_j}, \qquad O = \mathrm{orthogonalize}(u), \qquad
        p \leftarrow p (1 - \eta\lambda) - \alpha\, O / \mathrm{RMS}(O)

    of each matrix by itself, with MaxFactor's relative rate :math:`\alpha`. The state is that of
    the statistics, ``m + n`` floats. Per element it costs about ``20 min(m, n)`` to
    ``30 min(m, n)`` floating-point operations whole and ``20 b`` in blocks of b rows, where
    training costs 6 a token.

    Args:
        block: Orthogonalize so many rows at a time (columns of a tall matrix), which costs less
            where matrices are large. Default None: the whole matrix.
        method: "newton_schulz" or "polar_express". Default "newton_schulz".
        steps: Iterations of the method. Default 5.
        capped: The rate never passes 1/√t, as in the row-max step. Default True.

    Raises:
        ValueError: An option outside its range.

    Example:
        >>> import mlx.core as mx
        >>> from mlx_maxfactor import MaxFactor, Orthogonal
        >>> step = Orthogonal(method="polar_express", steps=8)
        >>> optimizer = MaxFactor(0.01, step=step, weight_decay=0.0)
        >>> g = mx.array([[3.0, 0.0], [0.0, -0.1]])
        >>> p = optimizer.apply_gradients({"w": g}, {"w": mx.ones((2, 2))})["w"]
        >>> [round(x, 4) for x in mx.diag(p).tolist()]  # RMS 1 of a diagonal: √2 on it
        [0.9859, 1.0141]

    Reference:
        Jordan et al., *Muon*, 2024, for the orthogonalization; Ma et al., *SWAN*, 2025, arXiv
        2412.13148, for normalizing and whitening without momentum; Khaled et al., *MuonBP*, 2025,
        arXiv 2510.16981, for blocks. Beside them: SinkGD, arXiv 2502.06742; NorMuon, arXiv
        2510.05491.
    """

    block: int | None = None
    method: f.Method = "newton_schulz"
    steps: int = 5
    capped: bool = True

    def __post_init__(self) -> None:
        if self.block is not None:
            object.__setattr__(self, "block", check_integer("block", self.block, 1))
        check_choice("method", self.method, f.METHODS)
        object.__setattr__(self, "steps", check_integer("steps", self.steps, 1))
        check_flags(capped=self.capped)

    def direction(
        self, u: mx.array, whole: Callable[[mx.array], mx.array] | None = None
    ) -> mx.array:
        """Each matrix of ``(..., m, n)`` orthogonalized, at RMS 1; zero for a zero matrix.

        Of some rows of a matrix in blocks, ``whole`` makes their root mean square that of all rows.
        """
        return f.unit_rms(f.orthogonalize(u, self.method, self.steps, self.block), whole)
