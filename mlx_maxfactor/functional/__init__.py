"""Parts of formulas that optimizers share, as pure functions of float32 arrays.

Notation: ``g`` gradient, ``p`` parameter, ``R`` and ``C`` row and column statistics, ``V`` second
moment, ``u`` update, ``m`` momentum. Nothing here changes an array it was given, and nothing here
knows a class.
"""

from .frequency_bands import band_damping, band_momentum, band_shares
from .layouts import (
    LAYOUTS,
    Layout,
    as_items,
    as_matrices,
    from_items,
    input_axis_shape,
    is_stack,
    items_shape,
    matrices_shape,
)
from .moments import (
    ROOT_FLOOR,
    averaging_momentum,
    bias_correction,
    factored_root,
    factored_second_moment,
    largest_moment,
    second_moment_weight,
)
from .norms import (
    as_gradient,
    clamp,
    each,
    fusion_barrier,
    on_cpu,
    rms,
    row_squares,
    scaled_global_norm,
)
from .orthogonalization import (
    METHODS,
    POLAR_EXPRESS,
    Method,
    muon_scale,
    newton_schulz,
    orthogonalization_flops,
    orthogonalize,
    polar_express,
)
from .quantization import FORGOTTEN, GROUPS, Bits, dequantize, quantize
from .rounding import stochastic_round

__all__ = [
    "FORGOTTEN",
    "GROUPS",
    "LAYOUTS",
    "METHODS",
    "POLAR_EXPRESS",
    "ROOT_FLOOR",
    "Bits",
    "Layout",
    "Method",
    "as_gradient",
    "as_items",
    "as_matrices",
    "averaging_momentum",
    "band_damping",
    "band_momentum",
    "band_shares",
    "bias_correction",
    "clamp",
    "dequantize",
    "each",
    "factored_root",
    "factored_second_moment",
    "from_items",
    "fusion_barrier",
    "input_axis_shape",
    "is_stack",
    "items_shape",
    "largest_moment",
    "matrices_shape",
    "muon_scale",
    "newton_schulz",
    "on_cpu",
    "orthogonalization_flops",
    "orthogonalize",
    "polar_express",
    "quantize",
    "rms",
    "row_squares",
    "scaled_global_norm",
    "second_moment_weight",
    "stochastic_round",
]
