"""Bad batches: clipping by the global norm, and steps that are skipped, inside a compiled step."""

from typing import Any

import mlx.core as mx
from mlx.optimizers import MultiOptimizer, Optimizer
from mlx.utils import tree_map

from . import functional as f
from ._validate import Rate, check_flags, check_number
from .optimizers._base import Float32Optimizer, flatten


class GuardedOptimizer(MultiOptimizer):
    """Any MLX optimizer, with clipping by the global norm and a way past bad batches.

    A step whose gradients hold an inf or a NaN leaves parameters and state bit for bit as they
    were, the step count and the schedule among them, and is counted. All of it happens in arrays:
    no value is read back, and a compiled step stays one graph. The gradients must all be there
    before the first parameter moves, which costs memory where they were freed one by one.

    What the forward pass did to BatchNorm's running statistics is not undone.

    Args:
        optimizer: The optimizer to guard. :func:`mlx_maxfactor.create_optimizer` takes both options
            itself.
        max_grad_norm: Largest global norm of the gradients, computed in float32 whatever their
            dtype; larger ones are scaled to it. None: no limit. Default None.
        skip_nonfinite: Skip steps whose gradients are not all finite. Default True.

    Raises:
        ValueError: ``max_grad_norm`` is not above 0.

    Example:
        >>> import mlx.core as mx
        >>> from mlx_maxfactor import GuardedOptimizer, SignSGD
        >>> optimizer = GuardedOptimizer(SignSGD())
        >>> p = {"b": mx.ones(2)}
        >>> optimizer.apply_gradients({"b": mx.array([1.0, float("nan")])}, p)["b"].tolist()
        [1.0, 1.0]
        >>> optimizer.skipped.item()
        1
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = True,
    ):
        super().__init__([optimizer])
        self._set_guard(max_grad_norm, skip_nonfinite)

    def _set_guard(self, max_grad_norm: float | None, skip_nonfinite: bool) -> None:
        check_flags(skip_nonfinite=skip_nonfinite)
        if max_grad_norm is not None:
            check_number("max_grad_norm", max_grad_norm, 0.0, ends="()")
        self.max_grad_norm = max_grad_norm
        self.skip_nonfinite = skip_nonfinite
        self._restored = False
        self._guard = {"skipped": mx.array(0, mx.uint32)} if skip_nonfinite else {}

    @property
    def skipped(self) -> mx.array:
        """Number of steps that were skipped."""
        return self._guard.get("skipped", mx.array(0, mx.uint32))

    @property
    def step(self) -> mx.array:
        """Number of updates made; a skipped step is none."""
        return self.optimizers[0].step

    @property
    def learning_rate(self) -> mx.array:
        """The rate of the first member."""
        return self.optimizers[0].learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate: Rate) -> None:
        self.optimizers[0].learning_rate = learning_rate

    def init(self, parameters: dict) -> None:
        """Make the state of every parameter that has none yet."""
        for index, optimizer in enumerate(self.optimizers):
            optimizer.init(self._part(parameters, index))

    def apply_gradients(self, gradients: dict, parameters: dict) -> dict:
        """Return the updated parameters, in the structure of the gradients."""
        # A member's init gets parameters here, never gradients, as MLX's lazy one would.
        self.init(tree_map(lambda _, p: p, gradients, parameters))
        if self.max_grad_norm is None and not self.skip_nonfinite:
            return self._updated(gradients, parameters)

        peak, norm = f.scaled_global_norm(list(flatten(gradients).values()))
        if self.max_grad_norm is not None:
            # An inf is not scaled: times 0 it would be a NaN, and all else 0.
            factor = mx.minimum(1.0, self.max_grad_norm / peak / norm)
            factor = f.hoist(mx.where(mx.isfinite(norm), factor, 1.0))
            gradients = tree_map(
                lambda g: (g.astype(mx.float32) * factor).astype(g.dtype), gradients
            )
        if not self.skip_nonfinite:
            return self._updated(gradients, parameters)

        finite = f.hoist(mx.isfinite(norm))
        before = tree_map(lambda array: array, self.state)
        updated = self._updated(gradients, parameters)
        _keep(before, self.state, finite)
        self._guard["skipped"] = self._guard["skipped"] + mx.where(finite, 0, 1).astype(mx.uint32)
        return tree_map(lambda new, old: mx.where(finite, new, old), updated, parameters)

    def _updated(self, gradients: dict, parameters: dict) -> dict:
        return self.optimizers[0].apply_gradients(gradients, parameters)

    def _part(self, tree: Any, index: int) -> Any:
        return tree

    @property
    def state(self) -> dict:
        """The members' live states and the guard's own. Assigning copies into them."""
        states = [optimizer.state for optimizer in self.optimizers]
        return {"states": states, "guard": self._guard} if self._guard else {"states": states}

    @state.setter
    def state(self, state: dict) -> None:
        states = state.get("states", ())
        if len(states) != len(self.optimizers):
            raise ValueError(
                f"state must hold {len(self.optimizers)} states, one a member, got {len(states)}"
            )
        for optimizer, new in zip(self.optimizers, states, strict=True):
            if isinstance(optimizer, Float32Optimizer):
                optimizer.state = new
            else:
                new = tree_map(lambda array: array, new)
                optimizer.state.clear()
                optimizer.state.update(new)
        self._guard.update(state.get("guard", {}))
        self._restored = True  # flattening may have lost empty containers: init puts them back


def _keep(before: Any, live: Any, finite: mx.array) -> None:
    """Where the gradients were not finite, put the arrays from before back into a live state."""
    for key, old in before.items() if isinstance(before, dict) else enumerate(before):
        if isinstance(old, mx.array):
            live[key] = mx.where(finite, live[key], old)
        else:
            _keep(old, live[key], finite)
