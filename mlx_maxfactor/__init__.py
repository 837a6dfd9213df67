"""Optimizers for MLX, and a router that gives each parameter to the right one."""

from importlib.metadata import version as _version

from .checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from .distributed import LostRankError, bounded_wait
from .engine.accumulation import accumulate_gradients, averaged_gradients
from .engine.schedules import Schedule, adaptive_schedule, warmup_cosine
from .engine.weight_average import WeightAverage
from .factory import create_optimizer, create_optimizer_for_hrm, estimate_state_bytes
from .finetuning.memory import estimate_training_memory
from .functional import newton_schulz, polar_express
from .optimizers import (
    Adafactor,
    AdamW,
    Float32Optimizer,
    Muon,
    OrthoMaxFactor,
    SignSGD,
)
from .published import FrequencyAdaptiveMomentum, MaxFactor
from .routing import (
    OPTIMIZERS,
    ROLES,
    OptimizerName,
    Plan,
    PlanEntry,
    RoutedOptimizer,
    register_optimizer,
)
from .routing.combined import GuardedOptimizer

__version__ = _version("mlx_maxfactor")
__docformat__ = "google"  # for pdoc

__all__ = [
    "OPTIMIZERS",
    "ROLES",
    "Adafactor",
    "AdamW",
    "CheckpointError",
    "Float32Optimizer",
    "FrequencyAdaptiveMomentum",
    "GuardedOptimizer",
    "LostRankError",
    "MaxFactor",
    "Muon",
    "OptimizerName",
    "OrthoMaxFactor",
    "Plan",
    "PlanEntry",
    "RoutedOptimizer",
    "Schedule",
    "SignSGD",
    "WeightAverage",
    "__version__",
    "accumulate_gradients",
    "adaptive_schedule",
    "averaged_gradients",
    "bounded_wait",
    "create_optimizer",
    "create_optimizer_for_hrm",
    "estimate_state_bytes",
    "estimate_training_memory",
    "load_checkpoint",
    "newton_schulz",
    "polar_express",
    "register_optimizer",
    "save_checkpoint",
    "warmup_cosine",
]
