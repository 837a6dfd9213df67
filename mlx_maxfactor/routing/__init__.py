"""Which parameter goes to which optimizer: roles, rules, the table of optimizers, the members."""

from .plan import Plan, PlanEntry
from .rates import OPTIMIZERS, OptimizerName, register_optimizer
from .roles import ROLES
from .routed import RoutedOptimizer

__all__ = [
    "OPTIMIZERS",
    "ROLES",
    "OptimizerName",
    "Plan",
    "PlanEntry",
    "RoutedOptimizer",
    "register_optimizer",
]
