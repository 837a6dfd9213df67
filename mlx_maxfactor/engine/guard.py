"""Bad batches: clipping by the global norm, and steps that are skipped, inside a compiled step."""

from collections.abc import Sequence

import mlx.core as mx

from .. import functional as f
from .._validate import check_flag, check_integer, check_number, value_if_evaluated
from .step import StepDecision


class Guard:
    """Decides from the gradients of each step how much to scale them, and whether to skip it.

    Args:
        max_grad_norm: Largest global norm of the gradients. None: no limit.
        skip_nonfinite: Skip steps whose gradients hold an inf or a NaN.
        max_skipped: Number of skipped steps in a row that is an error. None: no limit.

    Attributes:
        counts: Live arrays: how many steps were skipped, in all and in a row.

    Raises:
        ValueError: ``max_grad_norm`` is not above 0; ``max_skipped`` is below 1, or nothing is
            skipped.
    """

    def __init__(
        self,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        max_skipped: int | None = None,
    ):
        check_flag("skip_nonfinite", skip_nonfinite)
        if max_skipped is not None:
            max_skipped = check_integer("max_skipped", max_skipped, 1)
            if not skip_nonfinite:
                raise ValueError("max_skipped limits the skipped steps: set skip_nonfinite=True")
        if max_grad_norm is not None:
            max_grad_norm = check_number("max_grad_norm", max_grad_norm, 0.0, ends="()")
        self.max_grad_norm, self.skip_nonfinite = max_grad_norm, skip_nonfinite
        self.max_skipped = max_skipped
        names = ("skipped", "skipped_in_a_row") if skip_nonfinite else ()
        self.counts = {name: mx.array(0, mx.uint32) for name in names}

    @property
    def is_active(self) -> bool:
        """Whether it clips or skips anything."""
        return self.max_grad_norm is not None or self.skip_nonfinite

    @property
    def shown(self) -> list[str]:
        """The options that are set, as in a call."""
        options = {key: x for key, x in vars(self).items() if x and key != "counts"}
        return [f"{k}={x if x is True else f'{x:g}'}" for k, x in options.items()]

    def decide(self, gradients: Sequence[mx.array]) -> StepDecision:
        """Decide what happens to the gradients and to the step. Nothing is read back."""
        if not self.is_active:
            return StepDecision()
        factor, (peak, norm) = None, f.scaled_global_norm(gradients)
        finite = f.fusion_barrier(mx.isfinite(norm))
        if self.max_grad_norm is not None:
            # With an inf the factor is 1: times 0 the inf would be a NaN, and all else 0.
            factor = mx.minimum(1.0, self.max_grad_norm / peak / norm)
            factor = f.fusion_barrier(mx.where(finite, factor, 1.0))
        return StepDecision(factor, finite if self.skip_nonfinite else None)

    def count(self, decision: StepDecision) -> None:
        """Count the step if it is skipped."""
        if self.skip_nonfinite:
            skipped, in_a_row = self.counts["skipped"], self.counts["skipped_in_a_row"]
            self.counts["skipped"] = decision.kept(skipped, skipped + 1)
            self.counts["skipped_in_a_row"] = decision.kept(mx.zeros_like(in_a_row), in_a_row + 1)

    def check(self, step: mx.array) -> None:
        """Raise if too many steps in a row were skipped. With a limit, it waits for the device.

        Raises:
            FloatingPointError: There were ``max_skipped``.
        """
        if self.max_skipped is None:
            return
        count = value_if_evaluated(self.counts["skipped_in_a_row"])
        if count is not None and count >= self.max_skipped:
            raise FloatingPointError(
                f"{count} steps in a row were skipped: their gradients held an inf or a NaN; the "
                f"model is as it was after update {value_if_evaluated(step)}"
            )
