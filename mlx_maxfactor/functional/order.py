"""The order in which MLX evaluates what does not depend on one another."""

import io
from typing import Any

import mlx.core as mx


def can_wait() -> bool:
    """Whether arrays can wait for others here: not in a function that is compiled shapeless.

    MLX infers no shapes for what waits, and does not say when it traces shapelessly. What says so
    is that it then makes a broadcast of all arrays, to learn their shapes anew, not of one.
    """
    graph: Any = io.StringIO()
    mx.export_to_dot(graph, mx.broadcast_arrays(mx.zeros(1), mx.zeros(1))[0])
    return graph.getvalue().count("Full") < 2
