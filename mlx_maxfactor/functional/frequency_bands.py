"""Momentum by frequency band: the shares of a gradient's power, and the filter."""

import mlx.core as mx

from .statistics import fusion_barrier


def bands_of_bins(bins: int, bands: int) -> mx.array:
    """Band of each bin of a real spectrum, ``⌊k · bands / bins⌋``, shape ``(bins,)``."""
    return mx.arange(bins) * bands // bins


def band_shares(spectrum: mx.array, bands: int) -> mx.array:
    """Share ``π_b`` of ``Σ|F|²`` in each band; zero without power anywhere.

    Args:
        spectrum: ``F`` of the rows of each matrix, ``(..., m, bins)``, complex.
        bands: Number of bands.

    Returns:
        ``(..., 1, bands)``, of all rows together.
    """
    # Scaled first: the square of 1e20, or of 1e-25, is not a float32. On a GPU mx.abs squares too.
    real, imaginary = mx.real(spectrum), mx.imag(spectrum)
    larger = mx.maximum(mx.abs(real), mx.abs(imaginary))
    peak = mx.max(larger, axis=(-2, -1), keepdims=True)
    peak = fusion_barrier(mx.where(peak > 0, peak, 1.0))
    square = mx.square(real / peak) + mx.square(imaginary / peak)
    power = mx.sum(square, axis=-2, keepdims=True)
    members = bands_of_bins(spectrum.shape[-1], bands)[:, None] == mx.arange(bands)
    in_band = mx.sum(mx.where(members, power[..., None], 0.0), axis=-2)
    total = mx.sum(in_band, axis=-1, keepdims=True)
    return in_band / mx.where(total > 0, total, 1.0)


def band_damping(share: mx.array) -> mx.array:
    """``clip((b / bands) · (1 - 5 h_b), 0, 0.9)``: high bands with a small share, most of all.

    Args:
        share: ``h_b``, moving average of the shares, ``(..., bands)``.
    """
    bands = share.shape[-1]
    return mx.clip(mx.arange(bands) / bands * (1 - 5 * share), 0.0, 0.9)


def band_momentum(
    spectrum: mx.array, momentum: mx.array, decay: mx.array, gain: mx.array
) -> mx.array:
    """Moving average with a decay and a gain of its own in each frequency band of the last axis.

    ``irfft(μ_b(k) · rfft(m)_k + gain_b(k) · F_k)``.

    Args:
        spectrum: ``F`` of the newest gradient, ``(..., m, bins)``, complex.
        momentum: ``m``, ``(..., m, n)`` where ``bins = n // 2 + 1``.
        decay: ``μ_b``, ``(..., 1, bands)``.
        gain: Weight of the newest gradient, ``(..., 1, bands)``.
    """
    band = bands_of_bins(spectrum.shape[-1], decay.shape[-1])
    decay, gain = mx.take(decay, band, axis=-1), mx.take(gain, band, axis=-1)
    mixed = decay * mx.fft.rfft(momentum) + gain * spectrum
    return mx.fft.irfft(mixed, momentum.shape[-1])
