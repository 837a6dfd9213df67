"""The base class of all optimizers here and of your own: float32, layouts, rates, state."""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from inspect import Parameter, signature
from operator import itemgetter
from typing import Any, Literal, get_args

import mlx.core as mx
import mlx.nn as nn
from mlx.optimizers import Optimizer
from mlx.utils import tree_map

from .. import functional as f
from .._validate import (
    LARGEST_SEED,
    Rate,
    check_choice,
    check_integer,
    check_rate,
    shown,
    value_if_evaluated,
    warn,
)
from ..engine.schedules import described
from ..engine.step import StepDecision, check_update, find_slots, in_order, take_step
from ..engine.trees import at, children, flatten, trainable

COMPLEX = (
    "complex parameters are not supported: store the real and imaginary parts as two arrays, or "
    "freeze them"
)
"""The message for a complex parameter. It follows the path."""

RESERVED = frozenset({"step", "learning_rate", "scheduled"})
"""Keys of the state that belong to no parameter."""

Rounding = Literal["nearest", "stochastic"]
"""How updates of bf16 and fp16 parameters are rounded."""

SMALL, SMALL_ELEMENTWISE = 2**17, 2**14
"""Parameters of at most this many elements are updated in groups: where a copy into the group costs
less than kernels of their own."""

ELEMENTWISE_FLOPS = 300.0
"""The cost of an elementwise update, per element, in operations of a matrix product."""


class Float32Optimizer(Optimizer):
    """An MLX optimizer whose arithmetic and state are float32, whatever the parameter's dtype.

    An optimizer is two functions. :meth:`new_state` returns the state of new arrays, and
    :meth:`rule` returns the updated arrays with their new state. Everything else is done here:
    dtypes, layouts, clamping, rounding, few bits. To write your own optimizer, define these two, or
    MLX's ``init_single`` and ``apply_single``. :func:`mlx_maxfactor.register_optimizer` gives it a
    name in ``create_optimizer``. NOTES.md has a complete example. Beyond MLX's class:

    - a layer that is unfrozen late gets its state with its first gradient;
    - integer arrays and empty arrays are not changed;
    - a rate that is set by hand ends the schedule, also in a compiled step;
    - a state that is assigned is copied into the live dictionary, where a compiled step sees it.

    Args:
        learning_rate: A number of at least 0, or a function of the step (0 at the first update).
            A function is checked at its first step. If it falls below 0 later, 0 is used, because
            a compiled step cannot raise.
        layout: How an array holds matrices, see ``functional.LAYOUTS``. Default "batched".
        rounding: "nearest", or "stochastic" for bf16 and fp16 parameters. Default "nearest".
        seed: Seed of stochastic rounding, from 0 to 2³² - 1. Default 0.
        state_dtype: Dtype of the state array ``m``: "float32", "bfloat16", "int8" or "int4".

    Attributes:
        layouts: Layouts by path; they take precedence over ``layout``. The router sets them.
        paths: Whether this optimizer updates the parameter at a path. None: it updates all.
        built_rate: The constant rate that it was built with, or that was set before its first
            update and before any load. None with a schedule.

    Raises:
        ValueError: An option is outside its range.

    Example:
        >>> import mlx.core as mx
        >>> from mlx_maxfactor import Float32Optimizer
        >>> class SGD(Float32Optimizer):
        ...     def rule(self, g, p, state):
        ...         return p - self.learning_rate * g, state
        >>> SGD(0.1).apply_gradients({"w": mx.ones(2)}, {"w": mx.ones(2)})["w"].tolist()
        [0.8999999761581421, 0.8999999761581421]
    """

    _usual_rate: float | None = None
    """A typical rate, if rates are relative to the weights and therefore unlike AdamW's."""

    updates_at_once = False

    elementwise = False
    """Whether each element is updated by itself, so that one fused kernel is enough."""

    casts = False
    """Whether the rule takes arrays and state as they are kept, and casts them in each formula. A
    float32 copy that two kernels read is written to memory first."""

    def __init__(
        self,
        learning_rate: Rate,
        layout: f.Layout = "batched",
        rounding: Rounding = "nearest",
        seed: int = 0,
        state_dtype: f.StateDtype = "float32",
    ):
        super().__init__()
        self.state_dtype = _check_state_dtype(state_dtype)
        self.rounding: str = check_choice("rounding", rounding, get_args(Rounding))
        self.seed = check_integer("seed", seed, 0, LARGEST_SEED)
        self._keys_made = 0
        self.layout: str = check_choice("layout", layout, f.LAYOUTS)
        self.layouts: dict[str, str] = {}
        self.paths: Callable[[str], bool] | None = None
        self.built_rate: mx.array | None = None
        self._first_step = self.step
        self._has_warned = False
        # A subclass that has MLX's two methods updates one array at a time.
        self._is_batched = type(self).apply_single is Float32Optimizer.apply_single
        self.learning_rate = learning_rate

    # Rates

    @property
    def learning_rate(self) -> mx.array:
        """The rate of the last update. Setting a number ends the schedule; a function starts one.

        A function that is set after a step was compiled needs that step compiled again.
        """
        return self._state["learning_rate"]

    @learning_rate.setter
    def learning_rate(self, learning_rate: Rate) -> None:
        self.set_rate(check_rate("learning_rate", learning_rate, self.step))
        self.warn_if_small(learning_rate)

    def expect_rate(self, usual: float) -> None:
        """Say which rate is usual for these weights, for the warning of a small one."""
        self._usual_rate = usual if self._usual_rate else None

    def warn_if_small(self, rate: Any) -> None:
        """Warn once if a rate suits AdamW but this optimizer's rate is relative to the weights.

        An array is not checked: reading it would wait for its value.
        """
        rate = getattr(rate, "peak", rate)
        usual = None if self._has_warned else self._usual_rate
        if usual and isinstance(rate, (int, float)) and 0 < rate <= usual / 20:
            self._has_warned = True
            warn(
                f"learning_rate {rate:g} is small for {type(self).__name__}, whose rate is "
                f"relative to the weights: a usual one is {usual:g}, or what total_steps picks "
                "in create_optimizer"
            )

    def set_rate(self, learning_rate: Rate) -> None:
        """Set a checked rate. Unlike the property, this never waits for an array's value."""
        if callable(learning_rate):
            self._schedulers["learning_rate"] = learning_rate
            self.state["learning_rate"] = _as_rate(learning_rate(self.step))
            self.state["scheduled"] = mx.array(True)
            self.built_rate = None
            return
        self.state["learning_rate"] = _as_rate(learning_rate)
        if self.step is self._first_step:  # no update, load or trace has replaced it
            self.built_rate = self.state["learning_rate"]
        if "scheduled" in self.state:
            # Kept in the state, so that a compiled step sees it without a new trace.
            self.state["scheduled"] = mx.array(False)

    def _next_rate(self) -> mx.array:
        state, schedule = self._state, self._schedulers.get("learning_rate")
        if schedule is None:
            return state["learning_rate"]
        # Below 0 an update would ascend, and a compiled step cannot raise.
        scheduled = mx.maximum(_as_rate(schedule(state["step"])), 0.0)
        return mx.where(state["scheduled"], scheduled, state["learning_rate"])

    def step_size(self, p: mx.array, t: mx.array, rate: mx.array) -> mx.array:
        """The factor on the step of update ``t``, one for each of the parameters ``(k, ...)``."""
        return rate

    def effective_learning_rates(self, model: dict) -> dict[str, float]:
        """Return each parameter's step size at the next update, by path, for logging.

        Args:
            model: The model, or any tree of parameters.

        Returns:
            Rates by path. A stack of experts has the mean over its matrices.
        """
        t, rate = self.step + 1, self._next_rate()
        sizes = {}
        for path, p in flatten(trainable(model)).items():
            if _is_updatable(p) and self.owns(path):
                layout = self.layout_of(path)
                items = f.as_items(p.astype(mx.float32), layout)
                sizes[path] = mx.mean(self.step_size(items, t, rate))
        mx.eval(sizes)
        return {path: float(size) for path, size in sizes.items()}

    # Arrays

    def owns(self, path: str) -> bool:
        """Whether this optimizer updates the parameter at ``path``."""
        return self.paths is None or self.paths(path)

    def layout_of(self, path: str) -> str:
        """The layout of the parameter at ``path``."""
        return self.layouts.get(path, self.layout)

    def set_layout(self, path: str, layout: str) -> None:
        """Set the layout of the parameter at ``path``."""
        self.layouts[path] = layout

    # The update of arrays

    def new_state(self, shape: tuple[int, ...]) -> dict[str, mx.array]:
        """The state of new arrays, by name. Default: none.

        Args:
            shape: ``(k, ...)``: k arrays of one shape, each updated by itself. Every array of the
                state has this first axis, too.
        """
        return {}

    def rule(
        self, g: mx.array, p: mx.array, state: dict[str, mx.array]
    ) -> tuple[mx.array, dict[str, mx.array]]:
        """One update. A subclass defines it; ``self.step`` and ``self.learning_rate`` are current.

        Args:
            g: Gradients of k arrays, ``(k, ...)``, float32, at most 1e15 in magnitude (with
                ``casts``, as they are). The last two axes are a matrix, if there are matrices.
            p: Parameters, likewise.
            state: Their state, from :meth:`new_state` or the update before.

        Returns:
            The new parameters, and the new state.
        """
        raise NotImplementedError

    def init_single(self, parameter: mx.array, state: dict, layout: str | None = None) -> None:
        """Make the state of one parameter, from its shape alone."""
        layout = self._own_layout(layout)
        new = self.new_state(f.items_shape(parameter.shape, layout))
        kept = f.packed(new, self.state_dtype)
        state.update(f.of_one(kept, f.is_stack(parameter.shape, layout)))
        if self.rounding == "stochastic" and "key" not in state:
            state["key"] = mx.random.key(self.seed << 32 | self._keys_made)
            self._keys_made += 1

    def apply_single(
        self, gradient: mx.array, parameter: mx.array, state: dict, layout: str | None = None
    ) -> mx.array:
        """Return the updated parameter. Its state changes in place."""
        return self.apply_batch([gradient], [parameter], [state], layout)[0]

    def apply_batch(
        self,
        gradients: Sequence[mx.array],
        parameters: Sequence[mx.array],
        states: Sequence[dict],
        layout: str | None = None,
    ) -> list[mx.array]:
        """Return updated parameters of one shape. Their states change in place."""
        layout, count, first = self._own_layout(layout), len(gradients), parameters[0]
        flat = self.elementwise and count == 1 and self.state_dtype not in f.BITS
        stack = flat or f.is_stack(first.shape, layout)
        join = itemgetter(0) if count == 1 else mx.concatenate
        in_rows = count == 1 and not self.casts
        p, g = (join(_items(x, layout, flat, in_rows)) for x in (parameters, gradients))
        keys = [key for key in states[0] if key != "key"]
        old = {k: join([s[k] if stack else s[k][None] for s in states]) for k in keys}
        if not self.casts:
            p, g = p.astype(mx.float32), f.as_gradient(g)
            old = f.unpacked(old, g)
        new, state = self.rule(g, p, old)
        state = f.packed(state, self.state_dtype)
        parts = {key: _parts(x, count) for key, x in state.items()}
        for i, own in enumerate(states):
            own.update(f.of_one({k: xs[i] for k, xs in parts.items()}, stack))
        new = self._rounded(new, first.dtype, states[0])
        if flat:
            return [new]
        each = _parts(f.from_items(new, first.shape, layout), count)
        return [x.reshape(first.shape) for x in each]

    def _own_layout(self, layout: str | None) -> str:
        # Elementwise updates need no layout, and so the state has the same shapes as in MLX.
        return "batched" if self.elementwise else layout or self.layout

    def _rounded(self, x: mx.array, dtype: mx.Dtype, state: dict) -> mx.array:
        """An updated array in the parameter's dtype."""
        if dtype == mx.float16:
            x = f.clamp(x, mx.finfo(mx.float16).max)
        if self.rounding == "nearest" or dtype == mx.float32:
            return x.astype(dtype)
        if "key" not in state:
            raise ValueError(
                "stochastic rounding needs a random key: init_single must call "
                "super().init_single(parameter, state)"
            )
        state["key"], key = mx.random.split(state["key"])
        return f.stochastic_round(x, dtype, key)

    # The tree

    def init(self, parameters: dict) -> None:
        """Make the state of every parameter that has none yet.

        Raises:
            ValueError: Some parameters cannot be taken. The message names each. No state changes.
        """
        parameters = parameters or {}  # MLX 0.32.1 gives a member without parameters an empty list
        problems = [
            f"{key!r} is reserved by the optimizer: rename that top-level part of the model"
            for key in RESERVED & parameters.keys()
            if flatten(parameters[key])
        ]
        parameters = {key: tree for key, tree in parameters.items() if key not in RESERVED}
        state = self._grown(parameters, self.state, "", problems)
        if problems:
            raise ValueError("\n".join(problems))
        self.state.update(state)
        self._initialized = True

    def _grown(self, tree: Any, state: Any, path: str, problems: list[str]) -> Any:
        """Copy the containers of ``state``, and add state for the new leaves of ``tree``."""
        if isinstance(tree, (dict, list, tuple)):
            grown = {
                key: self._grown(child, at(state, [key]), below, problems)
                for key, below, child in children(tree, path)
            }
            if isinstance(tree, dict):
                return {**(state or {}), **grown}
            return [*grown.values(), *(state or [])[len(grown) :]]
        if state is None:
            state = {}
            # In a lazy call, `tree` holds gradients: only shapes may be read here.
            if self.owns(path) and is_complex(tree):
                problems.append(f"{path}: {COMPLEX}")
            elif _is_updatable(tree) and self.owns(path):
                try:
                    self.init_single(tree, state, *self._given_layout(path))
                except ValueError as problem:
                    problems.append(f"{path}: {problem}")
        return state

    def update(self, model: nn.Module, gradients: dict) -> None:
        """Update the model's parameters in place."""
        check_update(model, gradients)
        super().update(model, gradients)

    def apply_gradients(self, gradients: dict, parameters: dict) -> dict:
        """Return the updated parameters, in the structure of the gradients."""
        slots = find_slots(gradients, parameters, [self], lambda _: 0, self.init)
        return in_order(gradients, slots, take_step(slots, [self], StepDecision()))

    def advance(self) -> None:
        """Count an update, and set its rate."""
        state = self._state
        state["learning_rate"], state["step"] = self._next_rate(), state["step"] + 1

    def group_of(self, path: str, parameter: mx.array) -> Hashable:
        """What parameters that are updated together have in common. None: update it alone."""
        small = SMALL_ELEMENTWISE if self.elementwise else SMALL
        if parameter.size > small or not self._is_batched or self.rounding == "stochastic":
            return None
        return id(self), self.layout_of(path), parameter.shape, parameter.dtype

    def apply(
        self,
        paths: Sequence[str],
        gradients: list[mx.array],
        parameters: list[mx.array],
        states: list[dict],
    ) -> list[mx.array]:
        """Return updated parameters of one shape and layout. Their states change in place."""
        if self._is_batched:
            return self.apply_batch(gradients, parameters, states, self.layout_of(paths[0]))
        given = self._given_layout(paths[0])
        return [self.apply_single(gradients[0], parameters[0], states[0], *given)]

    def _given_layout(self, path: str) -> tuple[str, ...]:
        # A subclass may define only MLX's methods, which take no layout.
        layout = self.layout_of(path)
        return () if layout == self.layout else (layout,)

    def flops(self, shape: tuple[int, ...], layout: str) -> float:
        """The cost of an update, as the number of matrix-product operations that take as long."""
        return ELEMENTWISE_FLOPS * math.prod(shape)

    @property
    def state(self) -> dict:
        """The live state. An assigned state is copied into it, so a compiled step sees it."""
        return self._state

    @state.setter
    def state(self, state: dict) -> None:
        given = state if isinstance(state, dict) else {}
        if missing := [key for key in ("step", "learning_rate") if key not in given]:
            raise ValueError(f"state must hold {' and '.join(missing)}")
        state = tree_map(lambda array: array, state)
        if "learning_rate" in self._schedulers:
            state.setdefault("scheduled", mx.array(True))
        self._state.clear()
        self._state.update(state)

    def __repr__(self) -> str:
        """The class, its rate, and the options that differ from their defaults."""
        options = [f"learning_rate={self._shown_rate()}"]
        for name, default in options_of(type(self)).items():
            value = vars(self).get(name, default)
            if value != default and (name != "seed" or self.rounding == "stochastic"):
                options.append(f"{name}={shown(value)}")
        return f"{type(self).__name__}({', '.join(options)})"

    def _shown_rate(self) -> str:
        schedule = self._schedulers.get("learning_rate")
        if schedule is not None and value_if_evaluated(self.state.get("scheduled")) is not False:
            return described(schedule)
        rate = value_if_evaluated(self.state["learning_rate"])
        return "..." if rate is None else f"{rate:g}"


def options_of(kind: type) -> dict[str, Any]:
    """Options of an optimizer with their defaults, including those passed on by ``**options``."""
    options: dict[str, Any] = {}
    for base in kind.__mro__:
        if "__init__" in vars(base):
            parameters = signature(vars(base)["__init__"]).parameters.values()
            named = [p for p in parameters if p.kind is not Parameter.VAR_KEYWORD]
            options |= {p.name: p.default for p in named if p.name not in options}
            if len(named) == len(parameters):
                break
    return {k: v for k, v in options.items() if k not in ("self", "learning_rate")}


def _as_rate(rate: Any) -> mx.array:
    rate = mx.array(rate).astype(mx.float32)
    return rate.reshape(()) if rate.ndim else rate  # no operation: another thread may evaluate it


def refuse_vector(optimizer: Float32Optimizer, shape: tuple[int, ...]) -> None:
    """Raise if arrays hold no matrices, for an optimizer that orthogonalizes them."""
    if len(shape) < 3:
        raise ValueError(
            f"{type(optimizer).__name__} orthogonalizes matrices and cannot take shape "
            f"{shape[1:]}; route it to another optimizer, as create_optimizer(model) does"
        )


def refuse_complex(arrays: Mapping[str, mx.array]) -> None:
    """Raise if any parameters are complex. The message names each."""
    if odd := [f"{path}: {COMPLEX}" for path, x in arrays.items() if is_complex(x)]:
        raise ValueError("\n".join(odd))


def is_complex(x: mx.array) -> bool:
    """Whether an array is complex."""
    return mx.issubdtype(x.dtype, mx.complexfloating)


def _check_state_dtype(state_dtype: Any) -> str:
    """Return the dtype's name. Raise if a buffer cannot have it."""
    if isinstance(state_dtype, mx.Dtype):
        state_dtype = str(state_dtype).rpartition(".")[2]
    return check_choice("state_dtype", state_dtype, f.STATE_DTYPES)


def _items(arrays: Sequence[mx.array], layout: str, flat: bool, in_rows: bool) -> list[mx.array]:
    """Arrays as a rule takes them: k arrays of one shape along the first axis.

    Views come before any cast: MLX fuses a cast with the formula, but nothing through a view.
    """
    if flat:
        return list(arrays)
    # A Linear's gradient is a transposed view, over which every pass is slow.
    return [f.as_items(mx.contiguous(x) if in_rows else x, layout) for x in arrays]


def _parts(x: mx.array, count: int) -> list[mx.array]:
    """Equal parts. Slices: MLX cannot compile a split of which not all parts are used."""
    if count == 1:
        return [x]
    size = x.shape[0] // count
    return [x[i * size : (i + 1) * size] for i in range(count)]


def _is_updatable(x: mx.array) -> bool:
    return mx.issubdtype(x.dtype, mx.floating) and x.size > 0
