"""Which parameter goes to which optimizer: roles, rules, the table of optimizers, the members."""

from .members import MemberFactory, MemberSpec
from .plan import Plan, PlanEntry
from .rates import OPTIMIZERS, OptimizerEntry, OptimizerName, register_optimizer
from .roles import ROLES, find_aliases, find_roles
from .routed import Member, RoutedOptimizer

__all__ = [
    "OPTIMIZERS",
    "ROLES",
    "Member",
    "MemberFactory",
    "MemberSpec",
    "OptimizerEntry",
    "OptimizerName",
    "Plan",
    "PlanEntry",
    "RoutedOptimizer",
    "find_aliases",
    "find_roles",
    "register_optimizer",
]
