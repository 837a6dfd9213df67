"""Frequency-adaptive momentum: each frequency band of a gradient has a momentum of its own."""

from dataclasses import dataclass

import mlx.core as mx

from .. import functional as f
from .._validate import check_integer, check_number

LEAST_SIDE = 5
"""Matrices with a shorter side have no bands to speak of, and get plain momentum."""


@dataclass(frozen=True)
class FrequencyAdaptiveMomentum:
    r"""Frequency-adaptive momentum (FAM), an option of :class:`MaxFactor`.

    With :math:`F` the real Fourier transform of the gradient along its input axis (the channels
    of a convolution, before its kernel is flattened; the mel bins of a spectrogram's first layer),
    and bin :math:`k` in band :math:`\min(B - 1, \lfloor k B / \text{bins} \rfloor)`,

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

    and :math:`g'` stands for the gradient in MaxFactor's update. With one band this is plain
    momentum :math:`\alpha`, which vectors and matrices with a side under five always get.

    Where bands are damped unlike, the filter spreads along the axis, to inputs without gradient
    too, and MaxFactor steps by the sign: ``cautious=True`` leaves those as they are.

    Args:
        alpha: α, momentum of a band that is not damped. Default 0.9.
        beta: β, of the moving average of the bands' shares. Default 0.999.
        bands: B, number of bands. Default 10.
        blend: Weight of the momentum in the end, in [0, 1]. Default 1.
        blend_steps: Updates until it has that weight. Default 1.

    Raises:
        ValueError: An option outside its range.

    Example:
        >>> from mlx_maxfactor import FrequencyAdaptiveMomentum, MaxFactor
        >>> MaxFactor(momentum=FrequencyAdaptiveMomentum(bands=4), cautious=True).momentum.bands
        4

    Reference:
        The idea is the published speech optimizer's, which computed it and threw it away.
    """

    alpha: float = 0.9
    beta: float = 0.999
    bands: int = 10
    blend: float = 1.0
    blend_steps: int = 1

    def __post_init__(self) -> None:
        for name, ends in {"alpha": "[)", "beta": "[)", "blend": "[]"}.items():
            # As floats, so that a file saved with blend=1 is one saved with blend=1.0.
            value = check_number(name, getattr(self, name), 0.0, 1.0, ends)
            object.__setattr__(self, name, value)
        for name in ("bands", "blend_steps"):
            object.__setattr__(self, name, check_integer(name, getattr(self, name), 1))

    def init(self, shape: tuple[int, ...]) -> dict[str, mx.array]:
        """State in addition to the buffer ``m``. The last axis of the shape is the input's."""
        if len(shape) < 2 or min(shape[-2:]) < LEAST_SIDE:
            return {}
        state = {"count": mx.array(0, mx.uint32)}
        if self.bands > 1:
            state["power"] = mx.zeros((*shape[:-2], 1, self.bands))
        return state

    def update(self, gradient: mx.array, momentum: mx.array, state: dict) -> mx.array:
        """The buffer ``m`` after a gradient; both have the input's axis last."""
        if "count" in state:
            state["count"] = state["count"] + 1
        if "power" not in state:
            return self.alpha * momentum + (1 - self.alpha) * gradient
        spectrum = mx.fft.rfft(gradient)
        shares = f.band_shares(spectrum, self.bands)
        state["power"] = self.beta * state["power"] + (1 - self.beta) * shares
        _, decay, gain = self.response(state)
        return f.band_momentum(spectrum, momentum, decay, gain)

    def response(self, state: dict) -> tuple[mx.array, mx.array, mx.array]:
        """What the state says of each band: its share ``h_b``, decay ``μ_b`` and gain.

        Args:
            state: Of one parameter, ``optimizer.state["encoder"]["conv1"]["weight"]``.

        Returns:
            Three arrays ``(..., 1, bands)``.
        """
        t = mx.maximum(state["count"], 1).astype(mx.float32)
        share = state["power"] / f.bias_correction(self.beta, t)
        return share, *self.weights(share)

    def weights(self, share: mx.array) -> tuple[mx.array, mx.array]:
        """Decay and gain of each band from its share. A subclass may have another rule."""
        damping = self.damping(share)
        return self.alpha * (1 - damping), (1 - self.alpha) * (1 + damping)

    def damping(self, share: mx.array) -> mx.array:
        """``δ_b`` of each band from its share."""
        return f.band_damping(share)

    def blended(self, gradient: mx.array, momentum: mx.array, state: dict) -> mx.array:
        """What replaces the gradient: a mixture that moves from it to the momentum."""
        if "count" not in state or (self.blend == 1 and self.blend_steps == 1):
            return momentum
        t = state["count"].astype(mx.float32)
        weight = f.fusion_barrier(self.blend * mx.minimum(1.0, t / self.blend_steps))
        return (1 - weight) * gradient + weight * momentum
