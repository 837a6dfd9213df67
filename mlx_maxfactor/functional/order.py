"""Order of evaluation."""

import mlx.core as mx


def read_after(x: mx.array, after: mx.array) -> mx.array:
    """The array ``x``, read once ``after`` has been computed. Nothing is copied.

    Two fused kernels that use one float32 copy of a bf16 array write that copy to memory. If the
    second kernel reads the original again, there is no copy.
    """
    return mx.depends(x, after)
