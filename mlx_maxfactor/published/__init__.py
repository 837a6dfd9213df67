"""MaxFactor as it was published: three presets, and momentum by bands of frequencies."""

from .frequency_adaptive_momentum import FrequencyAdaptiveMomentum
from .maxfactor import MaxFactor

__all__ = ["FrequencyAdaptiveMomentum", "MaxFactor"]
