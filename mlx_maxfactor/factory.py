"""``create_optimizer``: from a model and two names to one optimizer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import wraps
from inspect import signature, unwrap
from statistics import median
from typing import Any, ParamSpec, get_args

import mlx.core as mx
import mlx.nn as nn
from mlx.optimizers import Optimizer

from . import functional as f
from ._validate import (
    LARGEST_SEED,
    Rate,
    check_choice,
    check_flags,
    check_integer,
    check_steps,
    got,
    value_if_evaluated,
    warn,
)
from .distributed.sharding import Sharding
from .engine.guard import Guard
from .engine.trees import flatten
from .optimizers import AdamW, SignSGD
from .optimizers.base import Float32Optimizer, Rounding, refuse_complex
from .routing.members import MemberFactory, MemberSpec
from .routing.rates import LORA_SCALE, WIDTH, OptimizerName, RateInputs
from .routing.roles import LORA, Parameter
from .routing.routed import RoutedOptimizer
from .routing.rules import apply_rules

LORA_ROLES = frozenset({"lora_a", "lora_b"})
HIDDEN_ROLES = frozenset({"hidden", "first", "conv", "experts"}) | LORA_ROLES
UNDECAYED_ROLES = frozenset({"norm", "bias", "vector", "unknown"})
TABLE_ROLES = frozenset({"embedding", "head"})
LARGE_TABLE = 1024
"""Embeddings and output layers with more rows than this have ``table_options``: most of their rows
are rare. With 96 characters as tokens each row has a gradient in nearly every step, and momentum
helps."""

P = ParamSpec("P")


def evaluated(create: Callable[P, RoutedOptimizer]) -> Callable[P, RoutedOptimizer]:
    """Evaluate the state of a new optimizer: another thread could not evaluate it later."""

    @wraps(create)
    def created(*arguments: P.args, **options: P.kwargs) -> RoutedOptimizer:
        optimizer = create(*arguments, **options)
        mx.eval(optimizer.state)
        return optimizer

    return created


@evaluated
def create_optimizer(
    model: nn.Module,
    hidden: OptimizerName | Optimizer = "orthomaxfactor",
    rest: OptimizerName | Optimizer = "adamw",
    *,
    total_steps: int | None = None,
    learning_rate: Rate | None = None,
    rest_learning_rate: Rate | None = None,
    rules: Mapping[str, str | Optimizer] | None = None,
    exclude_first: bool = False,
    strict: bool = False,
    pretrained: bool = False,
    rest_options: Mapping[str, Any] | None = None,
    max_grad_norm: float | None = None,
    skip_nonfinite: bool = False,
    max_skipped: int | None = None,
    rounding: Rounding = "nearest",
    seed: int = 0,
    group: mx.distributed.Group | None = None,
    **hidden_options: Any,
) -> RoutedOptimizer:
    """Create one optimizer for a model: hidden matrices get one algorithm, the rest another.

    The router reads the role of each parameter from the module tree; ``print(optimizer.plan)``
    shows them. Hidden matrices go to ``hidden``: Linears, attention projections, convolutions after
    the first as ``(out, -1)``, each matrix of stacked experts, LoRA's A and B. Embeddings, output
    layers, depthwise convolutions, convolutions that read the input and expert gates go to
    ``rest``. Norms, biases, vectors and arrays that belong to no known layer go there too, without
    weight decay. In embeddings and output layers of more than 1,024 rows AdamW keeps no momentum
    and a factored second moment: most of their rows have no gradient in most steps, and stale
    momentum would move them.

    Args:
        model: The complete model. Freeze layers and add LoRA layers before.
        hidden: A name in ``OPTIMIZERS`` or an optimizer. Default "orthomaxfactor".
        rest: A name or an optimizer for all other parameters. An optimizer keeps its own weight
            decay for norms and biases too. Default "adamw" (betas (0.9, 0.95), weight decay 0.1).
        total_steps: Number of updates in the run. Each rate then warms up for a tenth of them and
            follows a cosine to a tenth of its peak. The peak is ``learning_rate``, or comes from a
            measured law of the steps and the width. None: rates are constant.
        learning_rate: Rate of ``hidden`` if it is a name: a number, or a schedule. With
            ``total_steps`` it is the peak. It also scales the default rates of the other members.
            In a model with LoRA it is the rate of A and B. Where no hidden matrix is trained, it
            is the rate of ``rest``. None: the default in ``OPTIMIZERS``.
        rest_learning_rate: Rate of ``rest`` if it is a name. With a schedule in ``learning_rate``,
            a number here is the peak of the same schedule, whose own peak must be known: put a
            function of your own in a ``Schedule``. None: the default ratio to ``learning_rate``.
        rules: Exceptions. Keys are roles or patterns of paths (``"*.wq.weight"``), values are names
            or optimizers, for patterns also roles. A path takes precedence over a role, and an
            earlier pattern over a later one.
        exclude_first: Send a Linear that reads the model's input to ``rest``.
        strict: Raise if an array belongs to no known layer and no rule names it. Without it, a
            tenth of the weights in such arrays is a warning.
        pretrained: Use the default rates for trained weights, which fall with the root of the
            width. Models with LoRA always do; A and B have their own rates and options, and their
            rates also follow the scale of the layers. The peak of ``total_steps`` is twice the
            constant rate.
        rest_options: Options of ``rest`` if it is a name.
        max_grad_norm: Largest global norm of the gradients, computed in float32. Larger gradients
            are scaled down to it. None: no limit.
        skip_nonfinite: Skip a step whose gradients hold an inf or a NaN: parameters and state keep
            their values, and ``.skipped`` counts it. It works inside a compiled step.
        max_skipped: Raise a FloatingPointError at the next check after this many skipped steps in a
            row: where ``.skipped`` is read, and in a loop that is not compiled after every
            ``max_skipped`` updates. None: no limit.
        rounding: How bf16 and fp16 parameters are rounded by members that are made from a name:
            "nearest", or "stochastic", so that updates below the spacing count on average.
        seed: Seed of stochastic rounding, from 0 to 2³² - 1.
        group: ``mx.distributed.init()``. Each rank computes gradients of its own batch. They are
            averaged, each rank updates a share of the parameters and keeps the state of it, and
            sends it to the others. None, or one rank: nothing is sent.
        **hidden_options: Options of ``hidden`` if it is a name, such as ``momentum=0.95``.

    Returns:
        The optimizer, with its state. See ``.plan``, ``.optimizers`` and ``.learning_rate``.

    Raises:
        ValueError: An unknown name, option or rule, an optimizer that contains others, a number
            beside a schedule whose peak is not known, a rate below 0, a model that is frozen whole
            or has complex parameters; with ``strict`` every unexplained parameter.

    Example:
        >>> import mlx.nn as nn
        >>> from mlx_maxfactor import create_optimizer
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
        >>> optimizer = create_optimizer(model, "muon", learning_rate=0.02)
        >>> [(entry.path, entry.optimizer) for entry in optimizer.plan][:2]
        [('layers.0.weight', 'muon'), ('layers.0.bias', 'adamw, no decay')]
    """
    check_flags(exclude_first=exclude_first, strict=strict, pretrained=pretrained)
    strategy = _strategy(group)
    trained = _find_trained(model)
    parameters, exceptions = apply_rules(model, rules or {}, strict)

    hidden_spec = MemberSpec("hidden", hidden, learning_rate, hidden_options)
    rest_spec = MemberSpec("rest", rest, rest_learning_rate, rest_options or {})
    total_steps = _check_specs(hidden_spec, rest_spec, total_steps)
    roles = HIDDEN_ROLES - {"first"} if exclude_first else HIDDEN_ROLES
    choices = {p.path: "hidden" if p.role in roles else "rest" for p in parameters} | exceptions
    own = [p for p in parameters if p.path in trained and choices[p.path] in ("hidden", hidden)]
    if not own:
        hidden_spec, rest_spec = _without_hidden(hidden_spec, rest_spec)
    factory = MemberFactory(
        hidden_spec,
        rest_spec,
        _check_rounding(rounding, seed),
        pretrained=pretrained,
        lora=any(p.role in LORA_ROLES and p.path in trained for p in parameters),
        primary=hidden_spec if own else rest_spec,
        run=_rate_inputs(model, total_steps, own or parameters, hidden_options),
    )
    routes = {p.path: _route(factory, p, choices[p.path]) for p in parameters}
    guard = Guard(max_grad_norm, skip_nonfinite, max_skipped)
    return RoutedOptimizer(model, parameters, factory.labelled(routes), routes, guard, strategy)


def estimate_state_bytes(model: nn.Module, *arguments: Any, **options: Any) -> int:
    """Bytes of optimizer state that :func:`create_optimizer` would make, from shapes alone.

    Nothing is allocated, so the model may be of any size, as long as it was not evaluated.

    Args:
        model: The model.
        *arguments: As for ``create_optimizer``.
        **options: Likewise.

    Raises:
        ValueError: As from ``create_optimizer``.

    Example:
        >>> import mlx.nn as nn
        >>> from mlx_maxfactor import estimate_state_bytes
        >>> model = nn.Sequential(*[nn.Linear(10_000, 10_000, bias=False) for _ in range(3)])
        >>> [estimate_state_bytes(model, name, rest="adafactor") for name in ("muon", "maxfactor")]
        [1200000000, 240000]
    """
    return unwrap(create_optimizer)(model, *arguments, **options).plan.state_bytes


def create_optimizer_for_hrm(
    model: nn.Module,
    lr: Rate = 1e-4,
    puzzle_emb_lr: Rate = 1e-2,
    weight_decay: float = 0.1,
    use_separate_puzzle_optimizer: bool = True,
) -> dict[str, Float32Optimizer]:
    """The two optimizers of a hierarchical reasoning model: AdamW, and SignSGD for its puzzles.

    Call ``update(model, grads)`` of both with all gradients. Each updates its own parameters. A
    batch contains few puzzles; the rows of the others do not change.

    Args:
        model: The model; its puzzle embeddings have "puzzle" in their path.
        lr: Rate of AdamW (betas (0.9, 0.95)), a number or a schedule. Default 1e-4.
        puzzle_emb_lr: Rate of SignSGD, a number or a schedule. Default 1e-2.
        weight_decay: Decay of both. Default 0.1.
        use_separate_puzzle_optimizer: False leaves everything to AdamW. Default True.

    Returns:
        ``{"main": AdamW, "puzzle": SignSGD}``, or ``{"main": AdamW}``.

    Raises:
        ValueError: A rate out of range; or no parameter has "puzzle" in its path.

    Example:
        Combined in one optimizer they have guards, and a checkpoint holds both:

        >>> import mlx.nn as nn
        >>> from mlx_maxfactor import create_optimizer, create_optimizer_for_hrm
        >>> model = nn.Module()
        >>> model.puzzles, model.layer = nn.Embedding(9, 4), nn.Linear(4, 4, bias=False)
        >>> pair = create_optimizer_for_hrm(model)
        >>> main, rules = pair["main"], {"*puzzle*": pair["puzzle"]}
        >>> optimizer = create_optimizer(model, main, main, rules=rules, skip_nonfinite=True)
        >>> [(entry.path, entry.optimizer) for entry in optimizer.plan]
        [('puzzles.weight', 'SignSGD'), ('layer.weight', 'AdamW')]

    Reference:
        Wang et al., *Hierarchical Reasoning Model*, 2025, arXiv 2506.21734.
    """
    check_flags(use_separate_puzzle_optimizer=use_separate_puzzle_optimizer)
    _check_model(model)
    main = AdamW(lr, weight_decay=weight_decay)
    optimizers: dict[str, Float32Optimizer] = {"main": main}
    if use_separate_puzzle_optimizer:
        if not any("puzzle" in path for path in flatten(model.parameters())):
            raise ValueError(
                'no parameter has "puzzle" in its path; pass use_separate_puzzle_optimizer=False'
            )
        puzzle = SignSGD(puzzle_emb_lr, weight_decay=weight_decay, sparse_rows=True)
        main.paths = lambda path: "puzzle" not in path
        puzzle.paths = lambda path: "puzzle" in path
        optimizers["puzzle"] = puzzle
    for optimizer in optimizers.values():
        optimizer.init(model.trainable_parameters())
        mx.eval(optimizer.state)
    return optimizers


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model must be an mlx.nn.Module, got a {type(model).__name__}: pass the model itself "
            "first, then the optimizer"
        )


def _find_trained(model: nn.Module) -> set[str]:
    """Paths of what is trained; there must be something."""
    _check_model(model)
    arrays = flatten(model.trainable_parameters())
    refuse_complex(arrays)
    trained = {path for path, x in arrays.items() if mx.issubdtype(x.dtype, mx.floating)}
    if not trained:
        raise ValueError(
            "model has no trainable parameters: unfreeze the layers to train, or add LoRA layers, "
            "before you create the optimizer"
        )
    return trained


def _strategy(group: Any) -> Sharding | None:
    """How several ranks share the updates. None: there is one."""
    if group is None:
        return None
    if not callable(getattr(group, "size", None)):
        raise ValueError(f"group must be what mx.distributed.init() returns, {got(group, ())}")
    return Sharding(group) if group.size() > 1 else None


def _check_rounding(rounding: str, seed: int) -> dict[str, Any]:
    """The options that all members share."""
    check_choice("rounding", rounding, get_args(Rounding))
    return {"rounding": rounding, "seed": check_integer("seed", seed, 0, LARGEST_SEED)}


def _check_specs(hidden: MemberSpec, rest: MemberSpec, total_steps: Any) -> int | None:
    """Check options and rates, and return the number of steps as an int."""
    for spec in (hidden, rest):
        spec.check_options(signature(create_optimizer).parameters)
    if total_steps is None:
        return None
    total_steps = check_steps("total_steps", total_steps, 1)
    for spec in (hidden, rest):
        if callable(spec.rate):
            raise ValueError(
                f"{spec.rate_name} is a schedule, and total_steps makes one: give "
                f"{spec.rate_name} as a number, its peak, or leave total_steps out"
            )
    return total_steps


def _route(factory: MemberFactory, parameter: Parameter, choice: str | Optimizer) -> int:
    """Which member updates a parameter."""
    role = parameter.role
    return factory.member_index(
        choice,
        decays=role not in UNDECAYED_ROLES,
        lora=role in LORA_ROLES,
        table=role in TABLE_ROLES and parameter.shape[0] > LARGE_TABLE,
    )


def _rate_inputs(
    model: nn.Module,
    total_steps: int | None,
    parameters: Sequence[Parameter],
    options: Mapping[str, Any],
) -> RateInputs:
    """What the default rates depend on."""
    block, momentum = options.get("block", 128), options.get("momentum", True)
    lora = [p for p in parameters if p.role in LORA_ROLES]
    side, held = (max, lora) if lora else (min, [p for p in parameters if len(p.shape) > 1])
    sides = [side(f.items_shape(p.shape, p.layout)[-2:]) for p in held]
    return RateInputs(
        total_steps,
        median(sides) if sides else WIDTH,
        not (isinstance(momentum, (int, float)) and momentum == 0),
        None if block is None else check_integer("block", block, 1),
        _lora_scale(model),
    )


def _lora_scale(model: nn.Module) -> float:
    """The typical factor on the product of A and B, or mlx_lm's if no layer names one."""
    names = "scale", "scaling", "alpha"  # of mlx_lm, of PEFT, of mlx_vlm
    scales = []
    for module in model.modules():
        if any(a in module and b in module for a, b in LORA):
            values = [getattr(module, name, None) for name in names]
            # PEFT keeps a dictionary by the adapter's name.
            values = [next(iter(x.values()), None) if isinstance(x, dict) else x for x in values]
            found = map(value_if_evaluated, values)
            scales += [x for x in found if isinstance(x, (int, float)) and 1e-3 <= x <= 1e4][:1]
    return float(median(scales)) if scales else LORA_SCALE


def _without_hidden(hidden: MemberSpec, rest: MemberSpec) -> tuple[MemberSpec, MemberSpec]:
    """Both specs, where no hidden matrix is trained: ``learning_rate`` is the rate of the rest."""
    if hidden.rate is None:
        return hidden, rest
    if rest.rate is not None or isinstance(rest.choice, Optimizer):
        warn(
            "learning_rate has no effect: no trainable parameter goes to hidden, and rest has a "
            "rate of its own; see print(optimizer.plan)"
        )
        return hidden, rest
    return replace(hidden, rate=None), replace(rest, rate=hidden.rate)
