"""An average of the weights over the steps of a run, for evaluation and export."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path

from .. import functional as f
from .._validate import check_integer, check_number, shown
from .trees import flatten

DTYPES = (mx.float32, mx.bfloat16)


class WeightAverage:
    r"""A running average of a model's trainable weights.

    With :math:`t` counted from ``start``, after each step

    .. math::

        \bar p \leftarrow \bar p + w_t (p - \bar p), \qquad
        w_t = \frac{1-\beta}{1-\beta^t} \ \text{or, for}\ \beta = 1,\ \frac{1}{t}

    This is the exponential average without a bias toward the first weights, or the plain mean.
    Until ``start`` the average is the current weights.

    Call :meth:`update` after each step. In a compiled step, capture ``average.state`` with the
    states of model and optimizer. ``save_checkpoint(..., average=average)`` saves it.

    Args:
        model: The model. Frozen weights are not averaged, and take no memory.
        decay: β, in (0, 1]. 0.999 averages over about the last 1,000 steps; 1 is the plain mean
            of all steps since ``start``. Default 0.999.
        start: Steps before the average begins. Default 0.
        dtype: ``mx.float32``, or ``mx.bfloat16``, which takes half of the memory and is rounded
            stochastically, so that small changes count on average. Default float32.

    Raises:
        ValueError: An argument out of range.

    Example:
        >>> import mlx.core as mx
        >>> import mlx.nn as nn
        >>> from mlx_maxfactor import WeightAverage
        >>> model = nn.Linear(2, 1, bias=False)
        >>> average = WeightAverage(model, decay=1)
        >>> for value in (1.0, 2.0, 6.0):
        ...     model.weight = mx.full((1, 2), value)
        ...     average.update(model)
        >>> with average.applied(model):
        ...     print(model.weight)
        array([[3, 3]], dtype=float32)
        >>> print(model.weight)
        array([[6, 6]], dtype=float32)

    Reference:
        Polyak and Juditsky, 1992; Izmailov et al., 2018, arXiv 1803.05407, for the plain mean of
        the end of a run.
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float = 0.999,
        *,
        start: int = 0,
        dtype: mx.Dtype = mx.float32,
    ):
        self.decay = check_number("decay", decay, 0.0, 1.0, "(]")
        self.start = check_integer("start", start, 0)
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be mx.float32 or mx.bfloat16, got {shown(dtype)}")
        self.dtype = dtype
        weights = {path: mx.array(p, dtype=dtype) for path, p in self._averaged(model).items()}
        self.state: dict[str, Any] = {"step": mx.array(0, mx.uint32), "weights": weights}
        mx.eval(self.state)

    def update(self, model: nn.Module) -> None:
        """Add the current weights to the average. Weights that were unfrozen late join it."""
        step = self.state["step"] + 1
        count = mx.maximum(step.astype(mx.float32) - self.start, 1.0)
        weight = 1 / count if self.decay == 1 else (1 - self.decay) / (1 - self.decay**count)
        weight = mx.where(count > 1, weight, 1.0)
        averages = self.state["weights"]
        for i, (path, p) in enumerate(self._averaged(model).items()):
            new = p.astype(mx.float32)
            if path in averages:
                old = averages[path].astype(mx.float32)
                new = (1 - weight) * old + weight * new
            if self.dtype == mx.bfloat16:
                key = mx.random.split(mx.array([i, 0], mx.uint32) + step, 2)[0]
                new = f.stochastic_round(new, mx.bfloat16, key)
            averages[path] = new
        self.state["step"] = step

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """The model with the averaged weights, in its dtypes. Its own weights come back after.

        Evaluate, or save with ``model.save_weights``, inside.
        """
        own = flatten(model.trainable_parameters())
        averages = {path: x for path, x in self.state["weights"].items() if path in own}
        self._put(model, {path: x.astype(own[path].dtype) for path, x in averages.items()})
        try:
            yield model
        finally:
            self._put(model, {path: own[path] for path in averages})

    @staticmethod
    def _averaged(model: nn.Module) -> dict[str, mx.array]:
        arrays = flatten(model.trainable_parameters())
        return {path: p for path, p in arrays.items() if mx.issubdtype(p.dtype, mx.floating)}

    @staticmethod
    def _put(model: nn.Module, weights: dict[str, mx.array]) -> None:
        own = model.trainable_parameters()
        model.update(tree_map_with_path(lambda path, p: weights.get(path, p), own))
