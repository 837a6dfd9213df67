"""Make the members of a routed optimizer from names, rates and options."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

from mlx.optimizers import MultiOptimizer, Optimizer

from .._validate import LARGEST_SEED, Rate, check_rate, got, hint, shown, warn
from ..engine.schedules import Schedule, scaled, with_peak
from ..optimizers.adafactor import Adafactor, relative_step_of
from ..optimizers.base import options_of
from ..optimizers.foreign import as_member
from .rates import OPTIMIZERS, RateInputs, RatePreset, default_rate, schedule_of
from .routed import Member


@dataclass(frozen=True, eq=False)
class MemberSpec:
    """A requested member: an optimizer, or a name with a rate and options.

    ``argument`` names where it was requested: "hidden", "rest", or a rule.
    """

    argument: str
    choice: str | Optimizer
    rate: Rate | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rate_name(self) -> str:
        """The name of the argument that sets its rate."""
        return "learning_rate" if self.argument == "hidden" else f"{self.argument}_learning_rate"

    def __post_init__(self) -> None:
        if not isinstance(self.options, Mapping):
            raise ValueError(f"rest_options must map names to values, got {shown(self.options)}")
        if isinstance(self.choice, MultiOptimizer):
            raise ValueError(
                f"{self.argument} must be a single optimizer, got {type(self.choice).__name__}: "
                "give its parts as rules, and a guard's options to create_optimizer"
            )
        if isinstance(self.choice, Optimizer):
            if given := [self.rate_name] * (self.rate is not None) + list(self.options):
                raise ValueError(
                    f"{self.argument} is an optimizer already: give {', '.join(given)} to it, or "
                    "pass its name"
                )
            return
        if not isinstance(self.choice, str) or self.choice not in OPTIMIZERS:
            raise ValueError(
                f"{self.argument} must be one of {', '.join(map(repr, OPTIMIZERS))} or an "
                f"optimizer, {got(self.choice, OPTIMIZERS)}"
            )
        if self.rate is not None:
            rate = check_rate(self.rate_name, self.rate)
            object.__setattr__(self, "rate", with_peak(rate) if callable(rate) else rate)

    def check_options(self, also_valid: Iterable[str]) -> None:
        """Raise for an unknown option. The message may also suggest the names in ``also_valid``."""
        if isinstance(self.choice, Optimizer):
            return
        known = options_for(self.choice)
        if odd := [option for option in self.options if option not in known]:
            near = hint(str(odd[0]), [*known, *also_valid])
            raise ValueError(
                f"{self.choice} has no option {odd[0]!r}{near}: it has {', '.join(known)}; its "
                f"rate is {self.rate_name}, and options of the other optimizer go to rest_options, "
                "or to create_optimizer"
            )


class MemberFactory:
    """Makes the members for ``hidden`` and ``rest``, and others when a parameter needs them.

    The rate of the primary spec also scales the rates of the other members that were requested by
    name, in proportion to their default rates. If it is a schedule, theirs are multiples of it. In
    a model with LoRA matrices, it is their rate.

    Args:
        hidden: The member requested for hidden matrices.
        rest: The member requested for the other parameters.
        shared: Options of every member that is made from a name.
        pretrained: Whether the weights are already trained.
        lora: Whether there are LoRA matrices to train.
        primary: The spec whose rate scales the others: ``rest`` if no hidden matrix is trained.
        run: The inputs of the rate laws.
    """

    def __init__(
        self,
        hidden: MemberSpec,
        rest: MemberSpec,
        shared: dict[str, Any],
        *,
        pretrained: bool,
        lora: bool,
        primary: MemberSpec,
        run: RateInputs,
    ):
        self.hidden, self.rest, self.shared, self.primary = hidden, rest, shared, primary
        self.run = run
        self.preset: RatePreset = "pretrained" if pretrained or lora else "scratch"
        self.primary_preset: RatePreset = "lora" if lora and primary is hidden else self.preset
        self.primary_default = self._default_rate(primary, self.primary_preset)
        self.rate: Rate | None = primary.rate
        if run.total_steps is not None:
            peak = self.primary_default if primary.rate is None else primary.rate
            self.rate = schedule_of(float(cast(float, peak)), run.total_steps)
        self.members: list[Member] = []
        self._index: dict[Any, int] = {}
        self.member_index("hidden", decays=True, lora=lora)
        self.member_index("rest", decays=True)

    def member_index(
        self, choice: str | Optimizer, *, decays: bool, lora: bool = False, table: bool = False
    ) -> int:
        """Index of the member for "hidden", "rest", a name, or an optimizer. It may be new.

        Args:
            choice: Which optimizer was requested.
            decays: Whether the parameter is one that decays.
            lora: Whether it is a LoRA matrix.
            table: Whether it is an embedding or an output layer.
        """
        spec = self._spec_of(choice)
        preset: RatePreset = "lora" if lora and spec is not self.rest else self.preset
        if isinstance(spec.choice, Optimizer):
            key = id(spec.choice)
        else:
            default = options_for(spec.choice).get("weight_decay", 0.0)
            decays = decays or not spec.options.get("weight_decay", default)
            own = OPTIMIZERS[spec.choice].table_options
            table = table and bool(own) and not own.keys() & spec.options.keys()
            key = (spec.argument, decays, preset, table)
        if key not in self._index:
            self._index[key] = len(self.members)
            self.members.append(self._member(spec, decays, preset, table))
        return self._index[key]

    def labelled(self, routes: Mapping[str, int]) -> list[Member]:
        """The members, each that updates any parameter with a label of its own."""
        members, count = [], Counter[str]()
        for i, member in enumerate(self.members):
            if i in routes.values():
                count[member.label] += 1
            same = count[member.label]
            label = f"{member.label} {same}" if same > 1 else member.label
            members.append(replace(member, label=label))
        return members

    def _spec_of(self, choice: str | Optimizer) -> MemberSpec:
        for spec in (self.hidden, self.rest):
            if choice in (spec.argument, spec.choice):
                return spec
        return MemberSpec(choice if isinstance(choice, str) else "rule", choice)

    def _member(self, spec: MemberSpec, decays: bool, preset: RatePreset, table: bool) -> Member:
        if isinstance(spec.choice, Optimizer):
            self._share_schedule(spec.choice)
            return Member(type(spec.choice).__name__, spec.choice, peak_rate_of(spec.choice))
        # With one seed, the first parameters of two members would be rounded with the same bits.
        seed = (self.shared["seed"] + len(self.members)) % (LARGEST_SEED + 1)
        entry = OPTIMIZERS[spec.choice]
        defaults = entry.lora_options if preset == "lora" else {}
        if table:
            defaults = entry.table_options
        options = {**self.shared, "seed": seed, **defaults, **spec.options}
        if not decays:
            options["weight_decay"] = 0.0
        default = self._default_rate(spec, preset, table)
        is_primary = spec is self.primary and preset == self.primary_preset
        if spec.choice == "adafactor" and not is_primary and spec.rate is None and preset != "lora":
            optimizer = Adafactor(**options)  # with its relative step
            optimizer.learning_rate = self._in_proportion(relative_step_of, default)
        else:
            rate = self.rate if is_primary else self._rate_of(spec, default)
            optimizer = entry.kind(entry.learning_rate, **options)
            optimizer.set_rate(default if rate is None else rate)
            if preset != "scratch":
                optimizer.expect_rate(default)
            # A rate that follows from another one was not chosen, so it is set without a warning.
            if spec.rate is not None and (is_primary or spec is not self.primary):
                optimizer.warn_if_small(rate)
        label = ", ".join([spec.choice] + [entry.table_label] * table + ["no decay"] * (not decays))
        peak = peak_rate_of(optimizer)
        if not peak and (is_primary or spec.rate != 0):  # not known, or 0 because the primary is
            peak = default
        if is_primary and preset == "lora" and "min_rms" in defaults and 0 < peak <= default / 20:
            warn(
                f"learning_rate {peak:g} is small for LoRA with {spec.choice}, whose rate is the "
                f"RMS of a step: the default is {default:g}"
            )
        return Member(label, optimizer, peak)

    def _default_rate(self, spec: MemberSpec, preset: RatePreset, table: bool = False) -> float:
        if isinstance(spec.choice, Optimizer):
            return peak_rate_of(spec.choice)
        rate = default_rate(spec.choice, preset, self.run)
        if self.run.total_steps is None or not (table or spec is self.rest):
            return rate
        peak = OPTIMIZERS[spec.choice].rest_peak_of(self.run, table)
        return peak if preset == "scratch" else min(peak, rate)

    def _rate_of(self, spec: MemberSpec, default: float) -> Rate:
        """The rate of a member that was requested by name and is not the primary one."""
        if spec.rate is None or spec is self.primary:
            return self._in_proportion(default, default)
        if not callable(spec.rate) and callable(self.rate):
            return scaled(self.rate, float(spec.rate) / _known_peak(self.rate, spec.rate_name))
        return spec.rate

    def _in_proportion(self, rate: Rate, default: float) -> Any:
        """A default rate times the ratio of the primary's rate to its default."""
        primary = self.rate
        if primary is None or not self.primary_default:
            return rate
        if callable(rate):
            shape, unit = primary if callable(primary) else lambda _: primary, self.primary_default
            peak = getattr(primary, "peak", None) if callable(primary) else float(primary)
            peak = None if peak is None else default * peak / unit
            return Schedule(lambda step: rate(step) * shape(step) / unit, "relative step", peak)
        ratio = float(rate) / self.primary_default
        return scaled(primary, ratio) if callable(primary) else primary * ratio

    def _share_schedule(self, optimizer: Optimizer) -> None:
        """Give an optimizer with a constant rate the shape of the primary's schedule."""
        own = optimizer._schedulers.get("learning_rate")
        if isinstance(own, SharedSchedule):  # from an earlier call
            as_member(optimizer).set_rate(own.own_rate)
        elif own is not None or "learning_rate" not in optimizer.state:
            return  # it has a schedule, or, as MLX's Adafactor, a rate relative to the weights
        if callable(self.rate):
            rate = float(optimizer.learning_rate)
            peak = _known_peak(self.rate, f"the rate of {type(optimizer).__name__}")
            shared = scaled(self.rate, rate / peak)
            as_member(optimizer).set_rate(SharedSchedule(**vars(shared), own_rate=rate))


@dataclass(frozen=True, repr=False)
class SharedSchedule(Schedule):
    """A schedule that an optimizer with a constant rate, ``own_rate``, was given."""

    own_rate: float = 0.0


def peak_rate_of(optimizer: Optimizer) -> float:
    """The peak of the schedule if it is known, else the current rate."""
    schedule = optimizer._schedulers.get("learning_rate")
    peak = None if schedule is None else getattr(with_peak(schedule), "peak", None)
    return float(optimizer.state.get("learning_rate", 0.0) if peak is None else peak)


def _known_peak(schedule: Any, beside: str) -> float:
    if peak := getattr(schedule, "peak", None):
        return peak
    raise ValueError(
        f"{beside} is a number beside a learning_rate whose peak is not known, or 0: make it a "
        'schedule too, or give learning_rate=Schedule(function, "its name", peak=...)'
    )


def options_for(name: str) -> dict[str, Any]:
    """Options of a named optimizer with their defaults. The router sets the layout itself."""
    options = options_of(OPTIMIZERS[name].kind)
    return {key: value for key, value in options.items() if key != "layout"}
