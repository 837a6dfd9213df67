"""Names to optimizers: a model, two names, one optimizer."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from inspect import signature
from typing import Any

import mlx.nn as nn
from mlx.optimizers import Optimizer

from ._validate import Rate, check_flags, check_rate
from .optimizers import Adafactor, AdamW, MaxFactor, Muon, SignSGD
from .optimizers._base import Float32Optimizer, flatten
from .optimizers.adafactor import relative_step_of
from .roles import ROLES, Parameter, find_aliases, find_roles
from .routing import Member, RoutedOptimizer, set_rate
from .schedules import Schedule, scaled

OPTIMIZERS: dict[str, type[Float32Optimizer]] = {
    "maxfactor": MaxFactor,
    "adafactor": Adafactor,
    "signsgd": SignSGD,
    "muon": Muon,
    "adamw": AdamW,
}
"""Every optimizer that a name stands for."""

DEFAULT_RATES = {"maxfactor": 2e-2, "adafactor": 1e-2, "signsgd": 1e-2, "muon": 2e-2, "adamw": 1e-3}
"""Rates of the members. A rate given for the hidden matrices moves the others in proportion."""

HIDDEN_OPTIONS: dict[str, dict[str, Any]] = {"maxfactor": {"step": "orthogonal"}}
"""Options, where they are not the constructor's own, of a member that was asked for by name.

They are what won in NOTES.md's comparison on hidden matrices; the rest keeps the constructor's.
"""

HIDDEN_ROLES = frozenset({"hidden", "first", "conv", "experts", "lora_a", "lora_b"})
UNDECAYED_ROLES = frozenset({"norm", "bias", "vector"})


def create_optimizer(
    model: nn.Module,
    hidden: str | Optimizer = "maxfactor",
    rest: str | Optimizer = "adamw",
    *,
    learning_rate: Rate | None = None,
    rest_learning_rate: Rate | None = None,
    rules: Mapping[str, str | Optimizer] | None = None,
    exclude_first: bool = False,
    strict: bool = False,
    rest_options: Mapping[str, Any] | None = None,
    max_grad_norm: float | None = None,
    skip_nonfinite: bool = False,
    rounding: str = "nearest",
    seed: int = 0,
    **hidden_options: Any,
) -> RoutedOptimizer:
    """One optimizer for a model: hidden matrices to one algorithm, everything else to another.

    Roles are read from the module tree, see ``print(optimizer.plan)``. Hidden matrices (Linears,
    attention projections, convolutions after the first as ``(out, -1)``, stacked experts each by
    itself, LoRA's A and B) go to ``hidden``; embeddings, the head, convolutions that read the
    input, expert gates and arrays that belong to no known layer go to ``rest``; norms, biases and
    vectors go to ``rest`` without weight decay.

    Args:
        model: The complete model, with its layers frozen or LoRA-wrapped already.
        hidden: A name in ``OPTIMIZERS`` or an optimizer. Default "maxfactor", with its orthogonal
            step and no momentum; ``step="row_max"`` gives its published step.
        rest: Likewise. An optimizer keeps its own weight decay for every parameter. Default "adamw"
            (betas (0.9, 0.95), weight decay 0.1).
        learning_rate: Rate of ``hidden`` if it is a name, a number or a schedule. None: its default
            in ``DEFAULT_RATES``, and Adafactor's relative step. A schedule shapes every member
            that has no schedule of its own.
        rest_learning_rate: Rate of ``rest`` if it is a name. None keeps the default ratio to
            ``learning_rate``. A number beside a schedule is the peak of the rest's.
        rules: Exceptions: a role or a path pattern (``"*.wq.weight"``) to a name, an optimizer, or
            (patterns) a role. Paths beat roles; of several patterns the first that matches counts.
        exclude_first: Send a Linear that reads the model's input to ``rest``.
        strict: Raise if an array belongs to no known layer and no rule names it.
        rest_options: Options of ``rest`` if it is a name.
        max_grad_norm: Largest global norm of the gradients, computed in float32; larger ones are
            scaled to it. None: no limit.
        skip_nonfinite: Leave parameters and state as they are where a gradient holds an inf or a
            NaN, and count it in ``.skipped``, all inside the compiled step.
        rounding: Of bf16 and fp16 parameters, in every member that is made from a name: "nearest",
            or "stochastic", which lets updates below their spacing count on average.
        seed: Of stochastic rounding.
        **hidden_options: Options of ``hidden`` if it is a name, such as ``momentum=0.95``.

    Returns:
        The optimizer, its state made, with ``.plan``, ``.optimizers``, ``.learning_rate``.

    Raises:
        ValueError: An unknown name, option or rule, a number beside a schedule whose peak is not
            known; with ``strict`` every unexplained parameter.

    Example:
        >>> import mlx.nn as nn
        >>> from mlx_maxfactor import create_optimizer
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
        >>> optimizer = create_optimizer(model, "muon", learning_rate=0.02)
        >>> [(entry.path, entry.optimizer) for entry in optimizer.plan][:2]
        [('layers.0.weight', 'muon'), ('layers.0.bias', 'adamw, no decay')]
    """
    check_flags(exclude_first=exclude_first, strict=strict)
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be an mlx.nn.Module, got {type(model).__name__}")
    parameters, exceptions = _apply_rules(model, rules or {})
    if strict:
        _check_explained(model, parameters, exceptions)

    if not isinstance(rest_options or {}, Mapping):
        raise ValueError(f"rest_options must map names to values, got {rest_options!r}")
    roster = _Roster(
        _Part("hidden", hidden, learning_rate, hidden_options),
        _Part("rest", rest, rest_learning_rate, dict(rest_options or {})),
        {"rounding": rounding, "seed": seed},
    )
    hidden_roles = HIDDEN_ROLES - {"first"} if exclude_first else HIDDEN_ROLES
    routes = {}
    for p in parameters:
        choice = exceptions.get(p.path, "hidden" if p.role in hidden_roles else "rest")
        routes[p.path] = roster.index_of(choice, decays=p.role not in UNDECAYED_ROLES)
    return RoutedOptimizer(
        model,
        parameters,
        roster.members,
        routes,
        max_grad_norm=max_grad_norm,
        skip_nonfinite=skip_nonfinite,
    )


def create_optimizer_for_hrm(
    model: nn.Module,
    lr: float = 1e-4,
    puzzle_emb_lr: float = 1e-2,
    weight_decay: float = 0.1,
    use_separate_puzzle_optimizer: bool = True,
) -> dict[str, Float32Optimizer]:
    """The two optimizers of a hierarchical reasoning model: AdamW, and SignSGD for its puzzles.

    Call ``update(model, grads)`` of both, with all gradients: each takes its own parameters alone.
    A batch touches few puzzles; rows without gradient stay as they are.

    Args:
        model: The model; its puzzle embeddings have "puzzle" in their path.
        lr: Rate of AdamW, β (0.9, 0.95). Default 1e-4.
        puzzle_emb_lr: Rate of SignSGD. Default 1e-2.
        weight_decay: Decay of both. Default 0.1.
        use_separate_puzzle_optimizer: False leaves everything to AdamW. Default True.

    Returns:
        ``{"main": AdamW, "puzzle": SignSGD}``, or ``{"main": AdamW}``.

    Raises:
        ValueError: A rate out of range; or no parameter has "puzzle" in its path.

    Reference:
        Wang et al., *Hierarchical Reasoning Model*, 2025, arXiv 2506.21734.
    """
    check_flags(use_separate_puzzle_optimizer=use_separate_puzzle_optimizer)
    main = AdamW(lr, weight_decay=weight_decay)
    if not use_separate_puzzle_optimizer:
        main.init(model.trainable_parameters())
        return {"main": main}
    puzzles = {p.path for p in find_roles(model) if _is_puzzle(p.path)}
    if not puzzles:
        raise ValueError(
            'no parameter has "puzzle" in its path; pass use_separate_puzzle_optimizer=False'
        )
    puzzle = SignSGD(puzzle_emb_lr, weight_decay=weight_decay, sparse_rows=True)
    main.paths = lambda path: not _is_puzzle(path)
    puzzle.paths = _is_puzzle
    for optimizer in (main, puzzle):
        optimizer.init(model.trainable_parameters())
    return {"main": main, "puzzle": puzzle}


def _is_puzzle(path: str) -> bool:
    return "puzzle" in path


# Members


@dataclass(frozen=True, eq=False)
class _Part:
    """What was asked for: an optimizer, or a name with a rate and options."""

    place: str
    choice: str | Optimizer
    rate: Rate | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rate_name = "learning_rate" if self.place == "hidden" else f"{self.place}_learning_rate"
        if isinstance(self.choice, Optimizer):
            if given := [rate_name] * (self.rate is not None) + list(self.options):
                raise ValueError(
                    f"{self.place} is an optimizer already: give {', '.join(given)} to it, or pass "
                    "its name"
                )
            return
        if self.choice not in OPTIMIZERS:
            raise ValueError(
                f"{self.place} must be one of {', '.join(map(repr, OPTIMIZERS))} or an optimizer, "
                f"got {self.choice!r}"
            )
        if self.rate is not None:
            check_rate(rate_name, self.rate)
        known = _options_of(self.choice)
        for option in self.options:
            if option not in known:
                hint = _hint(option, [*known, *signature(create_optimizer).parameters])
                raise ValueError(
                    f"{self.choice} has no option {option!r}{hint}; "
                    f"it has {', '.join(known)}, and its rate is {rate_name}"
                )


class _Roster:
    """The members, each made when a parameter first needs it, each at its own rate.

    The rate given for the hidden matrices moves every member that was asked for by name: a number
    in proportion to the default rates, a schedule as a multiple of itself.
    """

    def __init__(self, hidden: _Part, rest: _Part, shared: dict[str, Any]):
        self.hidden, self.rest, self.shared = hidden, rest, shared
        self.members: list[Member] = []
        self._index: dict[Any, int] = {}
        self.index_of("hidden", decays=True)
        self.index_of("rest", decays=True)

    def index_of(self, choice: str | Optimizer, *, decays: bool) -> int:
        """Index of the member for "hidden", "rest", a name, or an optimizer."""
        part = self._part_of(choice)
        if isinstance(part.choice, Optimizer):
            key = id(part.choice)
        else:
            default = _options_of(part.choice)["weight_decay"]
            decays = decays or not part.options.get("weight_decay", default)
            key = (part.place, decays)
        if key not in self._index:
            self._index[key] = len(self.members)
            self.members.append(self._member(part, decays))
        return self._index[key]

    def _part_of(self, choice: str | Optimizer) -> _Part:
        for part in (self.hidden, self.rest):
            if choice is part.choice or choice in (part.place, part.choice):
                return part
        return _Part(choice if isinstance(choice, str) else "rule", choice)

    def _member(self, part: _Part, decays: bool) -> Member:
        if isinstance(part.choice, Optimizer):
            self._follow_lead(part.choice)
            return Member(type(part.choice).__name__, part.choice, _nominal(part.choice))
        # A seed apart, or the first parameters of two members would be rounded alike.
        seed = self.shared["seed"] + len(self.members)
        defaults = {} if part is self.rest else HIDDEN_OPTIONS.get(part.choice, {})
        options = {**self.shared, "seed": seed, **defaults, **part.options}
        if not decays:
            options["weight_decay"] = 0.0
        label = part.choice if decays else f"{part.choice}, no decay"
        make, default = OPTIMIZERS[part.choice], DEFAULT_RATES[part.choice]
        if part.choice == "adafactor" and part.rate is None:
            optimizer = Adafactor(**options)  # at its relative step
            rate = self._in_proportion(relative_step_of, default)
            if rate is not relative_step_of:
                optimizer.learning_rate = rate
        else:
            optimizer = make(self._rate_of(part), **options)
        return Member(label, optimizer, _nominal(optimizer) or default)

    def _rate_of(self, part: _Part) -> Rate:
        """The rate of a member that was asked for by name."""
        assert isinstance(part.choice, str)
        if part.rate is None:
            default = DEFAULT_RATES[part.choice]
            return self._in_proportion(default, default)
        if part is not self.hidden and not callable(part.rate) and callable(self.hidden.rate):
            peak = _known_peak(self.hidden.rate, f"{part.place}_learning_rate")
            return scaled(self.hidden.rate, float(part.rate) / peak)
        return part.rate

    def _in_proportion(self, rate: Rate, default: float) -> Any:
        """A default rate, times what was given for the hidden matrices over their default."""
        lead = self.hidden.rate
        if lead is None or not isinstance(self.hidden.choice, str):
            return rate
        unit = DEFAULT_RATES[self.hidden.choice]
        if callable(rate):
            shape = lead if callable(lead) else lambda _: lead
            return Schedule(lambda step: rate(step) * shape(step) / unit, "relative step", default)
        ratio = float(rate) / unit
        return scaled(lead, ratio) if callable(lead) else lead * ratio

    def _follow_lead(self, optimizer: Optimizer) -> None:
        """Let the schedule given for the hidden matrices shape an optimizer at a constant rate."""
        lead = self.hidden.rate
        if callable(lead) and "learning_rate" not in optimizer._schedulers:
            peak = _known_peak(lead, f"the rate of {type(optimizer).__name__}")
            set_rate(optimizer, scaled(lead, float(optimizer.learning_rate) / peak))


def _nominal(optimizer: Optimizer) -> float:
    """The rate, or the peak of the schedule where it is known."""
    peak = getattr(optimizer._schedulers.get("learning_rate"), "peak", None)
    return float(optimizer.state.get("learning_rate", 0.0) if peak is None else peak)


def _known_peak(schedule: Any, beside: str) -> float:
    if isinstance(schedule, Schedule) and schedule.peak is not None:
        return schedule.peak
    raise ValueError(
        f"{beside} is a number beside a learning_rate whose peak is not known: make it a schedule "
        "too, or make learning_rate with warmup_cosine or adaptive_schedule"
    )


def _options_of(name: str) -> dict[str, Any]:
    """Options of the optimizer of that name, with their defaults."""
    parameters = signature(OPTIMIZERS[name]).parameters.values()
    return {p.name: p.default for p in parameters if p.name not in ("learning_rate", "layout")}


def _hint(word: str, choices: Iterable[str]) -> str:
    close = get_close_matches(word, list(choices), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


# Rules


def _apply_rules(
    model: nn.Module, rules: Mapping[str, str | Optimizer]
) -> tuple[list[Parameter], dict[str, str | Optimizer]]:
    """The parameters with their roles, and the optimizer of those that a rule names, by path."""
    if not isinstance(rules, Mapping) or not all(isinstance(key, str) for key in rules):
        raise ValueError(f"rules must map roles and path patterns to optimizers, got {rules!r}")
    parameters = find_roles(model)
    aliases = find_aliases(model)
    paths = [*(p.path for p in parameters), *aliases]
    problems = []
    for key, value in rules.items():
        by_role = key in ROLES
        matched = by_role or any(fnmatchcase(path, key) for path in paths)
        if not matched:
            near = _hint(key, [*ROLES, *paths])
            problems.append(f"rule {key!r} is no role and matches no whole path{near}")
        choices = [*OPTIMIZERS, "rest"] + ([] if by_role else list(ROLES))
        if not isinstance(value, Optimizer) and value not in choices:
            problems.append(
                f"rule {key!r} must give an optimizer or one of {', '.join(choices)}, got {value!r}"
            )
    if problems:
        raise ValueError("; ".join(problems))

    by_path = {}
    for path in paths:
        key = next((k for k in rules if k not in ROLES and fnmatchcase(path, k)), None)
        if key is not None:
            by_path.setdefault(aliases.get(path, path), rules[key])
    declared = {path: v for path, v in by_path.items() if isinstance(v, str) and v in ROLES}
    parameters = find_roles(model, declared) if declared else parameters
    by_role = {}
    for p in parameters:
        role = "hidden" if p.role == "first" and "first" not in rules else p.role
        if role in rules:
            by_role[p.path] = rules[role]
    return parameters, by_role | {path: v for path, v in by_path.items() if path not in declared}


def _check_explained(
    model: nn.Module, parameters: list[Parameter], exceptions: Mapping[str, Any]
) -> None:
    paths = flatten(model.trainable_parameters())
    unexplained = [
        f"{p.path} {p.shape}"
        for p in parameters
        if p.role == "unknown" and p.path in paths and p.path not in exceptions
    ]
    if unexplained:
        raise ValueError(
            f"strict: {len(unexplained)} parameters belong to no layer the router knows: "
            f"{', '.join(unexplained)}; give each a rule"
        )
