"""One algorithm a file; none imports another."""

from .adafactor import Adafactor
from .adamw import AdamW
from .maxfactor import MaxFactor
from .momentum import FrequencyAdaptiveMomentum
from .muon import Muon
from .orthomaxfactor import OrthoMaxFactor
from .signsgd import SignSGD

__all__ = [
    "Adafactor",
    "AdamW",
    "FrequencyAdaptiveMomentum",
    "MaxFactor",
    "Muon",
    "OrthoMaxFactor",
    "SignSGD",
]
