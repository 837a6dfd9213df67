"""Every formula of the suite, as a pure function of float32 arrays.

Notation: ``g`` gradient, ``p`` parameter, ``R`` and ``C`` row and column statistics, ``V`` second
moment, ``u`` update, ``m`` momentum. Nothing here changes an array it was given, and nothing here
knows a class.
"""

from .frequency_bands import band_damping, band_momentum, band_shares
from .layouts import (
    LAYOUTS,
    Layout,
    as_matrices,
    from_matrices,
    input_axis_shape,
    matrices_shape,
    norm_axes,
)
from .moments import (
    bias_correction,
    factored_root,
    factored_second_moment,
    largest_moment,
    second_moment_weight,
)
from .norms import (
    clamp,
    clamp_gradient,
    clamped_magnitude,
    clamped_square,
    fusion_barrier,
    rms,
    row_max,
    row_sum,
    scaled_global_norm,
)
from .order import read_after
from .orthogonalization import (
    METHODS,
    POLAR_EXPRESS,
    Method,
    muon_scale,
    newton_schulz,
    orthogonalization_flops,
    orthogonalize,
    polar_express,
    rows_apart,
)
from .quantization import LEVELS, Bits, dequantize, quantize, rows_of_groups
from .rounding import ElementRange, stochastic_round
from .steps import ROOT_FLOOR, agreement, cautious_scale, unit_rms

__all__ = [
    "LAYOUTS",
    "LEVELS",
    "METHODS",
    "POLAR_EXPRESS",
    "ROOT_FLOOR",
    "Bits",
    "ElementRange",
    "Layout",
    "Method",
    "agreement",
    "as_matrices",
    "band_damping",
    "band_momentum",
    "band_shares",
    "bias_correction",
    "cautious_scale",
    "clamp",
    "clamp_gradient",
    "clamped_magnitude",
    "clamped_square",
    "dequantize",
    "factored_root",
    "factored_second_moment",
    "from_matrices",
    "fusion_barrier",
    "input_axis_shape",
    "largest_moment",
    "matrices_shape",
    "muon_scale",
    "newton_schulz",
    "norm_axes",
    "orthogonalization_flops",
    "orthogonalize",
    "polar_express",
    "quantize",
    "read_after",
    "rms",
    "row_max",
    "row_sum",
    "rows_apart",
    "rows_of_groups",
    "scaled_global_norm",
    "second_moment_weight",
    "stochastic_round",
    "unit_rms",
]
