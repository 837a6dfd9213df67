"""Frequency-adaptive momentum: each frequency band of a gradient has its own momentum."""

from dataclasses import dataclass

import mlx.core as mx

from .. import functional as f
from .._validate import check_integer, check_number

LEAST_SIDE = 5
"""Matrices with a shorter side are too small for bands and get plain momentum."""


@dataclass(frozen=True)
class FrequencyAdaptiveMomentum:
    r"""Frequency-adaptive momentum (FAM), an option of :class:`MaxFactor`.

    :math:`F` is the real Fourier transform of the gradient along its input axis: the channels of a
    convolution, before its kernel is flattened; in the first layer of a speech model, the mel bins.
    Bin :math:`k` is in band :math:`\min(B - 1, \lfloor k B / \text{bins} \rfloor)`. Then

    .. math::

        \begin{aligned}
        \pi_b &= \text{share of } \textstyle\sum |F|^2 \text{ in band } b, \qquad
        h_b = \beta h_b + (1 - \beta) \pi_b \quad \text{(bias-corrected)} \\
        \delta_b &= \mathrm{clip}(\tfrac{b}{B} (1 - 5 h_b),\, 0,\, 0.9), \qquad
        \mu_b = \alpha (1 - \delta_b) \\
        m &\leftarrow \mathrm{irfft}\bigl(\mu_b\, \mathrm{rfft}(m)
            + (1 - \alpha)(1 + \delta_b)\, F\bigr) \\
        g' &= (1 - \kappa_t) g + \kappa_t m, \qquad
            \kappa_t = \text{blend} \cdot \min(1, t / \text{blend\_steps})
        \end{aligned}

    and :math:`g'` replaces the gradient in MaxFactor's update. With one band this is plain momentum
    :math:`\alpha`. Vectors and matrices with a side under five always get plain momentum.

    If bands are damped differently, the filter spreads the gradient along the axis, also to inputs
    that have none. MaxFactor steps by the sign, so it would move their weights by full steps.
    ``cautious=True`` leaves them unchanged.

    Args:
        alpha: α, momentum of a band that is not damped. Default 0.9.
        beta: β, decay of the moving average of the bands' shares. Default 0.999.
        bands: B, number of bands. Default 10.
        blend: Final weight of the momentum, in [0, 1]. Default 1.
        blend_steps: Number of updates until that weight is reached. Default 1.

    Raises:
        ValueError: An option is outside its range.

    Example:
        >>> from mlx_maxfactor import FrequencyAdaptiveMomentum, MaxFactor
        >>> MaxFactor(momentum=FrequencyAdaptiveMomentum(bands=4), cautious=True).momentum.bands
        4

    Reference:
        The idea comes from the published speech optimizer, which computed it but did not use it.
    """

    alpha: float = 0.9
    beta: float = 0.999
    bands: int = 10
    blend: float = 1.0
    blend_steps: int = 1

    def __post_init__(self) -> None:
        for name, ends in {"alpha": "[)", "beta": "[)", "blend": "[]"}.items():
            # Floats, so that blend=1 and blend=1.0 are equal in a checkpoint.
            value = check_number(name, getattr(self, name), 0.0, 1.0, ends)
            object.__setattr__(self, name, value)
        for name in ("bands", "blend_steps"):
            object.__setattr__(self, name, check_integer(name, getattr(self, name), 1))

    def init(self, shape: tuple[int, ...]) -> dict[str, mx.array]:
        """Make the state besides the buffer ``m``. The input axis is the last one of the shape."""
        if len(shape) < 2 or min(shape[-2:]) < LEAST_SIDE:
            return {}
        state = {"count": mx.array(0.0)}
        if self.bands > 1:
            state["power"] = mx.zeros((*shape[:-2], 1, self.bands))
        return state

    def update(self, gradient: mx.array, momentum: mx.array, state: dict) -> mx.array:
        """Return the updated buffer ``m``. Gradient and buffer have the input axis last."""
        if "count" in state:
            state["count"] = state["count"] + 1
        if "power" not in state:
            return momentum + (1 - self.alpha) * (gradient - momentum)
        spectrum = mx.fft.rfft(gradient)
        shares = f.band_shares(spectrum, self.bands)
        state["power"] = self.beta * state["power"] + (1 - self.beta) * shares
        _, decay, gain = self.response(state)
        return f.band_momentum(spectrum, momentum, decay, gain)

    def replaced(
        self, gradient: mx.array, momentum: mx.array, state: dict, nesterov: bool
    ) -> tuple[mx.array, mx.array]:
        """What replaces the gradient, and the updated buffer."""
        m = self.update(gradient, momentum, state)
        ahead = gradient + self.alpha * (m - gradient) if nesterov else m
        if "count" not in state or (self.blend == 1 and self.blend_steps == 1):
            return ahead, m
        share = self.blend * mx.minimum(1.0, state["count"] / self.blend_steps)
        share = f.fusion_barrier(share)  # of the momentum
        return (1 - share) * gradient + share * ahead, m

    def response(self, state: dict) -> tuple[mx.array, mx.array, mx.array]:
        """Each band's share ``h_b``, decay ``μ_b`` and gain, read from the state.

        Args:
            state: State of one parameter, such as
                ``optimizer.state["encoder"]["conv1"]["weight"]``.

        Returns:
            Three arrays ``(..., 1, bands)``.
        """
        t = mx.maximum(state["count"], 1)
        share = state["power"] / f.bias_correction(self.beta, t)
        return share, *self.weights(share)

    def weights(self, share: mx.array) -> tuple[mx.array, mx.array]:
        """Decay and gain of each band, computed from its share. A subclass may override this."""
        damping = self.damping(share)
        return self.alpha * (1 - damping), (1 - self.alpha) * (1 + damping)

    def damping(self, share: mx.array) -> mx.array:
        """``δ_b`` of each band, computed from its share."""
        return f.band_damping(share)
