"""Optimizers for MLX, and a router that gives each parameter the one that fits it."""

from ._version import __version__
from .accumulation import accumulate_gradients, averaged_gradients
from .checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from .collectives import LostRankError, bounded_wait
from .distributed import ShardedOptimizer
from .factory import create_optimizer, create_optimizer_for_hrm, estimate_state_bytes
from .functional import newton_schulz, polar_express
from .guard import GuardedOptimizer
from .members import OPTIMIZERS, OptimizerName
from .optimizers import (
    Adafactor,
    AdamW,
    FrequencyAdaptiveMomentum,
    MaxFactor,
    Muon,
    OrthoMaxFactor,
    SignSGD,
)
from .profiling import Profile, profile_step
from .rates import DEFAULT_RATES
from .roles import ROLES
from .routing import Plan, PlanEntry, RoutedOptimizer
from .schedules import Schedule, adaptive_schedule, warmup_cosine

__all__ = [
    "DEFAULT_RATES",
    "OPTIMIZERS",
    "ROLES",
    "Adafactor",
    "AdamW",
    "CheckpointError",
    "FrequencyAdaptiveMomentum",
    "GuardedOptimizer",
    "LostRankError",
    "MaxFactor",
    "Muon",
    "OptimizerName",
    "OrthoMaxFactor",
    "Plan",
    "PlanEntry",
    "Profile",
    "RoutedOptimizer",
    "Schedule",
    "ShardedOptimizer",
    "SignSGD",
    "__version__",
    "accumulate_gradients",
    "adaptive_schedule",
    "averaged_gradients",
    "bounded_wait",
    "create_optimizer",
    "create_optimizer_for_hrm",
    "estimate_state_bytes",
    "load_checkpoint",
    "newton_schulz",
    "polar_express",
    "profile_step",
    "save_checkpoint",
    "warmup_cosine",
]
