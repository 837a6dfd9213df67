"""The members of a routed optimizer: from names, rates and options to optimizers."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from inspect import signature
from typing import Any, Literal, cast

from mlx.optimizers import Optimizer

from ._validate import LARGEST_SEED, Rate, check_rate, got, hint
from .optimizers import Adafactor, AdamW, MaxFactor, Muon, OrthoMaxFactor, SignSGD
from .optimizers._base import Float32Optimizer
from .optimizers.adafactor import relative_step_of
from .optimizers.maxfactor import STEP_MOVED
from .rates import (
    FROM_SCRATCH,
    LORA,
    PRETRAINED,
    Use,
    peak_rates,
    schedule_of,
    with_steps,
)
from .routing import Member, set_rate
from .schedules import Schedule, scaled, with_peak

OptimizerName = Literal["orthomaxfactor", "maxfactor", "adafactor", "signsgd", "muon", "adamw"]
"""What a type checker takes for a name; a ``str`` from a file is cast to it, and checked there."""

OPTIMIZERS: dict[OptimizerName, type[Float32Optimizer]] = {
    "orthomaxfactor": OrthoMaxFactor,
    "maxfactor": MaxFactor,
    "adafactor": Adafactor,
    "signsgd": SignSGD,
    "muon": Muon,
    "adamw": AdamW,
}
"""Every optimizer that a name stands for."""

HIDDEN_WORDS = ("optimizer", "name", "optimizer_name")
"""What the name of the hidden optimizer is called elsewhere."""

RATE_WORDS = ("lr", "rest_lr", "rate", "eta", "learning_rate", "rest_learning_rate")
"""What a rate is called elsewhere, or in the other place."""


@dataclass(frozen=True, eq=False)
class Part:
    """What was asked for: an optimizer, or a name with a rate and options."""

    place: str
    choice: OptimizerName | Optimizer
    rate: Rate | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def rate_name(self) -> str:
        """What its rate is called where it was asked for."""
        return "learning_rate" if self.place == "hidden" else f"{self.place}_learning_rate"

    def __post_init__(self) -> None:
        if isinstance(self.choice, Optimizer):
            if given := [self.rate_name] * (self.rate is not None) + list(self.options):
                raise ValueError(
                    f"{self.place} is an optimizer already: give {', '.join(given)} to it, or pass "
                    "its name"
                )
            return
        if not isinstance(self.choice, str) or self.choice not in OPTIMIZERS:
            raise ValueError(
                f"{self.place} must be one of {', '.join(map(repr, OPTIMIZERS))} or an optimizer, "
                f"{got(self.choice, OPTIMIZERS)}"
            )
        if self.rate is not None:
            rate = check_rate(self.rate_name, self.rate)
            object.__setattr__(self, "rate", with_peak(rate) if callable(rate) else rate)

    def check_options(self, beside: Iterable[str], other: "Part") -> None:
        """Raise for an option that its optimizer lacks; ``beside`` are names that were near."""
        if isinstance(self.choice, Optimizer):
            return
        known = options_of(self.choice)
        for option in self.options:
            if option in known:
                continue
            problem = f"{self.choice} has no option {option!r}"
            if option == "step":
                raise ValueError(f"{problem}: {STEP_MOVED}")
            if option in RATE_WORDS:
                raise ValueError(f"{problem}: its rate is {self.rate_name}")
            if option in HIDDEN_WORDS:
                raise ValueError(f"{problem}: an optimizer's name goes to hidden, or to rest")
            if isinstance(other.choice, str) and option in options_of(other.choice):
                remedy = (
                    f"{option}=..." if self.place == "rest" else f"rest_options={{{option!r}: ...}}"
                )
                raise ValueError(
                    f"{problem}; {other.choice} has: give {remedy} to create_optimizer"
                )
            raise ValueError(
                f"{problem}{hint(option, [*known, *beside])}; it has {', '.join(known)}, and its "
                f"rate is {self.rate_name}"
            )


class Roster:
    """The members, each made when a parameter first needs it, each at its own rate.

    The rate of the part that leads scales every member that was asked for by name: a number in
    proportion to the default rates, a schedule as a multiple of itself. It is the rate of LoRA's
    matrices where there are any.

    Args:
        hidden: What was asked for hidden matrices.
        rest: And for the rest.
        shared: Options that every member gets which is made from a name.
        pretrained: The weights are trained already.
        lora: There are LoRA matrices to train.
        leader: The part that leads: ``rest`` where no hidden matrix is trained.
        total_steps: Length of the run: rates follow its law and its schedule. None: it is unknown.
        width: Shorter side of a typical hidden matrix.
    """

    def __init__(
        self,
        hidden: Part,
        rest: Part,
        shared: dict[str, Any],
        *,
        pretrained: bool,
        lora: bool,
        leader: Part,
        total_steps: int | None,
        width: float,
    ):
        self.hidden, self.rest, self.shared, self.leader = hidden, rest, shared, leader
        self.use, self.rest_rates = PRETRAINED if pretrained or lora else FROM_SCRATCH, {}
        if total_steps is not None:
            options = hidden.options
            momentum, block = options.get("momentum", True), options.get("block", 128)
            block = block if isinstance(block, int) else None
            peaks = peak_rates(total_steps, width, bool(momentum), block)
            self.rest_rates = {"adamw": peaks["rest"]} if self.use is FROM_SCRATCH else {}
            self.use = with_steps(self.use, peaks)
        self.lead_use = LORA if lora and leader is hidden else self.use
        self.unit = self._default_rate(leader, self.lead_use)
        self.lead: Rate | None = leader.rate
        if total_steps is not None:
            peak = self.unit if leader.rate is None else leader.rate
            self.lead = schedule_of(float(cast(float, peak)), total_steps)
        self.members: list[Member] = []
        self._index: dict[Any, int] = {}
        self.index_of("hidden", decays=True, lora=lora)
        self.index_of("rest", decays=True)

    def index_of(self, choice: str | Optimizer, *, decays: bool, lora: bool = False) -> int:
        """Index of the member for "hidden", "rest", a name, or an optimizer."""
        part = self._part_of(choice)
        use = LORA if lora and part is not self.rest else self.use
        if isinstance(part.choice, Optimizer):
            key = id(part.choice)
        else:
            default = options_of(part.choice)["weight_decay"]
            decays = decays or not part.options.get("weight_decay", default)
            key = (part.place, decays, use is LORA)
        if key not in self._index:
            self._index[key] = len(self.members)
            self.members.append(self._member(part, decays, use))
        return self._index[key]

    def _part_of(self, choice: str | Optimizer) -> Part:
        for part in (self.hidden, self.rest):
            if choice is part.choice or choice in (part.place, part.choice):
                return part
        named = cast(OptimizerName | Optimizer, choice)
        return Part(choice if isinstance(choice, str) else "rule", named)

    def _member(self, part: Part, decays: bool, use: Use) -> Member:
        if isinstance(part.choice, Optimizer):
            self._follow_lead(part.choice)
            return Member(type(part.choice).__name__, part.choice, _nominal(part.choice))
        # A seed apart, or the first parameters of two members would be rounded alike.
        seed = (self.shared["seed"] + len(self.members)) % (LARGEST_SEED + 1)
        defaults = {} if part is self.rest else use.options.get(part.choice, {})
        options = {**self.shared, "seed": seed, **defaults, **part.options}
        if not decays:
            options["weight_decay"] = 0.0
        label = part.choice if decays else f"{part.choice}, no decay"
        default = self._default_rate(part, use)
        leads = part is self.leader and use is self.lead_use
        if part.choice == "adafactor" and not leads and part.rate is None and use is not LORA:
            optimizer = Adafactor(**options)  # at its relative step
            rate = self._in_proportion(relative_step_of, default)
            if rate is not relative_step_of:
                optimizer.learning_rate = rate
        else:
            rate = self.lead if leads else self._rate_of(part, default)
            make = OPTIMIZERS[part.choice]
            optimizer = make(default if rate is None else rate, **options)
        return Member(label, optimizer, _nominal(optimizer) or default)

    def _default_rate(self, part: Part, use: Use) -> float:
        if isinstance(part.choice, Optimizer):
            return _nominal(part.choice)
        of_rest = self.rest_rates if part is self.rest else {}
        return of_rest.get(part.choice, use.rates[part.choice])

    def _rate_of(self, part: Part, default: float) -> Rate:
        """The rate of a member that was asked for by name and does not lead."""
        if part.rate is None or part is self.leader:
            return self._in_proportion(default, default)
        if not callable(part.rate) and callable(self.lead):
            return scaled(self.lead, float(part.rate) / _known_peak(self.lead, part.rate_name))
        return part.rate

    def _in_proportion(self, rate: Rate, default: float) -> Any:
        """A default rate, times what the leading part was given over its own default."""
        lead = self.lead
        if lead is None or not self.unit:
            return rate
        if callable(rate):
            shape, unit = lead if callable(lead) else lambda _: lead, self.unit
            return Schedule(lambda step: rate(step) * shape(step) / unit, "relative step", default)
        ratio = float(rate) / self.unit
        return scaled(lead, ratio) if callable(lead) else lead * ratio

    def _follow_lead(self, optimizer: Optimizer) -> None:
        """Let a schedule that leads shape an optimizer at a constant rate."""
        if callable(self.lead) and "learning_rate" not in optimizer._schedulers:
            peak = _known_peak(self.lead, f"the rate of {type(optimizer).__name__}")
            set_rate(optimizer, scaled(self.lead, float(optimizer.learning_rate) / peak))


def _nominal(optimizer: Optimizer) -> float:
    """The rate, or the peak of the schedule where it is known."""
    peak = getattr(optimizer._schedulers.get("learning_rate"), "peak", None)
    return float(optimizer.state.get("learning_rate", 0.0) if peak is None else peak)


def _known_peak(schedule: Any, beside: str) -> float:
    if isinstance(schedule, Schedule) and schedule.peak is not None:
        if schedule.peak == 0:
            raise ValueError(f"{beside} is a number beside a learning_rate that is always 0")
        return schedule.peak
    raise ValueError(
        f"{beside} is a number beside a learning_rate whose peak is not known: make it a schedule "
        'too, or give learning_rate=Schedule(function, "its name", peak=...)'
    )


def options_of(name: OptimizerName) -> dict[str, Any]:
    """Options of the optimizer of that name, with their defaults."""
    parameters = signature(OPTIMIZERS[name].__init__).parameters.values()
    others = ("self", "learning_rate", "layout")
    return {p.name: p.default for p in parameters if p.name not in others}
