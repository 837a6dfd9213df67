"""Measure how orthogonal the results of each method are, by condition number and steps.

    python examples/orthogonality.py
    python examples/orthogonality.py --rows 64 --columns 256

The singular values of a test matrix fall from 1 to the inverse of the condition number, in equal
ratios. A step of either method has the same number of matrix products. The table has the root mean
square of |σ - 1| over the singular values σ of the float32 result, from a float64 SVD.
"""

import argparse

import mlx.core as mx
import numpy as np
from training import integer

from mlx_maxfactor import newton_schulz, polar_express

METHODS = {"Newton–Schulz": newton_schulz, "Polar Express": polar_express}
CONDITIONS = [10**k for k in range(7)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Print the orthogonality error by condition number."
    )
    parser.add_argument(
        "--rows", type=integer, default=256, help="rows of the matrix (default 256)"
    )
    parser.add_argument("--columns", type=integer, default=256, help="columns (default 256)")
    arguments = parser.parse_args()
    shape = (arguments.rows, arguments.columns)
    print("| method | steps |", *(f"{condition:.0e} |" for condition in CONDITIONS))
    print("|---|---|" + "---|" * len(CONDITIONS))
    matrices = [conditioned(*shape, condition) for condition in CONDITIONS]
    for name, method in METHODS.items():
        for steps in range(2, 9):
            errors = (error(method(x, steps, mx.float32)) for x in matrices)
            print(f"| {name} | {steps} |", *(f"{each:.3f} |" for each in errors))


def conditioned(rows: int, columns: int, condition: float) -> mx.array:
    """A matrix with random singular vectors, the same at every call."""
    random, rank = np.random.default_rng(0), min(rows, columns)
    left, _ = np.linalg.qr(random.normal(size=(rows, rank)))
    right, _ = np.linalg.qr(random.normal(size=(columns, rank)))
    values = np.logspace(0, -np.log10(condition), rank)
    return mx.array(((left * values) @ right.T).astype(np.float32))


def error(x: mx.array) -> float:
    """Root mean square of |σ - 1|."""
    values = np.linalg.svd(np.float64(np.array(x)), compute_uv=False)
    return float(np.sqrt(np.mean((values - 1) ** 2)))


if __name__ == "__main__":
    main()
