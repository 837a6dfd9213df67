"""Optimizers for MLX, and a router that gives each parameter the one that fits it."""

from .factory import DEFAULT_RATES, OPTIMIZERS, create_optimizer, create_optimizer_for_hrm
from .functional import newton_schulz, polar_express
from .optimizers import Adafactor, AdamW, MaxFactor, Muon, SignSGD
from .roles import ROLES
from .routing import Plan, PlanEntry, RoutedOptimizer
from .schedules import adaptive_schedule, warmup_cosine

__version__ = "0.1.0"

__all__ = [
    "DEFAULT_RATES",
    "OPTIMIZERS",
    "ROLES",
    "Adafactor",
    "AdamW",
    "MaxFactor",
    "Muon",
    "Plan",
    "PlanEntry",
    "RoutedOptimizer",
    "SignSGD",
    "adaptive_schedule",
    "create_optimizer",
    "create_optimizer_for_hrm",
    "newton_schulz",
    "polar_express",
    "warmup_cosine",
]
