"""Rules: a user's own choices for parameters, which override the module tree."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import mlx.nn as nn
from mlx.optimizers import Optimizer

from .._validate import got, hint, shown, warn
from ..engine.trees import flatten
from .rates import OPTIMIZERS
from .roles import ROLES, Parameter, find_aliases, find_roles

UNEXPLAINED_SHARE = 0.1
"""A larger share of weights without a known layer is a warning. A table of positions has less."""

KNOWN_ROLES = frozenset({"embedding", "head", "first", "hidden", "conv", "conv_input", "experts"})


def apply_rules(
    model: nn.Module, rules: Mapping[str, str | Optimizer], strict: bool = False
) -> tuple[list[Parameter], dict[str, str | Optimizer]]:
    """Return the parameters with their roles, and by path the optimizers that rules choose.

    ``strict`` refuses trainable arrays that belong to no known layer and match no rule.
    """
    if not isinstance(rules, Mapping) or not all(isinstance(key, str) for key in rules):
        raise ValueError(
            f"rules must map roles and path patterns to optimizers, got {shown(rules)}"
        )
    parameters = find_roles(model)
    aliases = find_aliases(model)
    paths = [*(p.path for p in parameters), *aliases]
    problems = []
    for key, value in rules.items():
        if key not in ROLES and not any(_matches(path, key) for path in paths):
            near = hint(key, [*ROLES, *paths])
            problems.append(f"rule {key!r} is no role and matches no whole path{near}")
        choices = [*OPTIMIZERS, "rest"] + ([] if key in ROLES else list(ROLES))
        known = isinstance(value, Optimizer) or (isinstance(value, str) and value in choices)
        if not known:
            problems.append(
                f"rule {key!r} must give an optimizer or one of {', '.join(choices)}, "
                f"{got(value, choices)}"
            )
    if problems:
        raise ValueError("; ".join(problems))

    by_path = {}
    for path in paths:
        key = next((k for k in rules if k not in ROLES and _matches(path, k)), None)
        if key is not None:
            by_path.setdefault(aliases.get(path, path), rules[key])
    declared = {path: v for path, v in by_path.items() if isinstance(v, str) and v in ROLES}
    parameters = find_roles(model, declared) if declared else parameters
    by_role = {}
    for p in parameters:
        role = "hidden" if p.role == "first" and "first" not in rules else p.role
        if role in rules:
            by_role[p.path] = rules[role]
    exceptions = by_role | {path: v for path, v in by_path.items() if path not in declared}
    _check_explained(model, parameters, exceptions, strict)
    return parameters, exceptions


def _matches(path: str, pattern: str) -> bool:
    return path == pattern or fnmatchcase(path, pattern)


def _check_explained(
    model: nn.Module, parameters: list[Parameter], exceptions: Mapping[str, Any], strict: bool
) -> None:
    """Arrays of no known layer are an error if ``strict``, else a warning if they are many.

    A model without any known layer is one of bare arrays on purpose.
    """
    sizes = {path: x.size for path, x in flatten(model.trainable_parameters()).items()}
    trained = [p for p in parameters if p.path in sizes]
    unexplained = [p for p in trained if p.role == "unknown" and p.path not in exceptions]
    named = [f"{p.path} {p.shape}" for p in unexplained]
    if strict and named:
        raise ValueError(
            f"strict: {len(named)} parameters belong to no layer the router knows: "
            f"{', '.join(named)}; give each a rule"
        )
    share = sum(sizes[p.path] for p in unexplained) / max(1, sum(sizes.values()))
    if share > UNEXPLAINED_SHARE and any(p.role in KNOWN_ROLES for p in parameters):
        largest = max(unexplained, key=lambda p: sizes[p.path])
        warn(
            f"{share:.0%} of the weights belong to no layer the router knows, such as "
            f"{largest.path} {largest.shape}, and go to rest: if these are matrices, give rules "
            f'such as {{"{largest.path}": "hidden"}} (or "conv", "experts")'
        )
