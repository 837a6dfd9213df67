"""The optimizers, one algorithm per file. No optimizer imports another."""

from .adafactor import Adafactor
from .adamw import AdamW
from .base import Float32Optimizer
from .muon import Muon
from .orthomaxfactor import OrthoMaxFactor
from .signsgd import SignSGD

__all__ = [
    "Adafactor",
    "AdamW",
    "Float32Optimizer",
    "Muon",
    "OrthoMaxFactor",
    "SignSGD",
]
