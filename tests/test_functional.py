"""Formulas against their twins, and cases with a known exact answer."""

import mlx.core as mx
import numpy as np
import pytest
from trajectories import parameter
from twins import polar_express_coefficients

from mlx_maxfactor import functional as f
from mlx_maxfactor import newton_schulz, polar_express, reference
from mlx_maxfactor.published.maxfactor import agreement, cautious_scale

ORTHOGONALIZERS = {
    "newton_schulz": (newton_schulz, reference.newton_schulz),
    "polar_express": (polar_express, reference.polar_express),
}


@pytest.mark.parametrize("steps", [1, 5, 9])
@pytest.mark.parametrize("shape", [(16, 16), (24, 7), (7, 24), (2, 3, 6, 5), (1, 4)], ids=str)
@pytest.mark.parametrize("name", ORTHOGONALIZERS)
def test_orthogonalizers_equal_their_twins(name, shape, steps):
    ours, twin = ORTHOGONALIZERS[name]
    x = parameter(shape)
    # Each step squares a Gram matrix of up to 24 terms in float32 and can amplify by 3.4 to 8.
    assert np.allclose(np.array(ours(mx.array(x), steps)), twin(np.float64(x), steps), atol=2e-4)


@pytest.mark.parametrize("name", ORTHOGONALIZERS)
@pytest.mark.parametrize("magnitude", [1e-30, 1e-12, 1.0, 1e12, 1e30])
def test_orthogonalizers_do_not_depend_on_the_scale(name, magnitude):
    # The square of 1e30 or 1e-30 is not a float32: a plain Frobenius norm gives 0 or NaN.
    orthogonalize, x = ORTHOGONALIZERS[name][0], parameter((6, 4))
    scaled = orthogonalize(mx.array(x * np.float32(magnitude)))
    assert np.allclose(np.array(scaled), np.array(orthogonalize(mx.array(x))), atol=1e-4)


@pytest.mark.parametrize("name", ORTHOGONALIZERS)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
def test_orthogonalizers_keep_the_dtype_and_zeros(name, dtype):
    x = mx.stack([mx.zeros((3, 4)), mx.ones((3, 4))]).astype(dtype)
    result = ORTHOGONALIZERS[name][0](x)
    assert result.dtype == dtype
    assert mx.all(result[0] == 0).item()
    assert mx.all(result[1] > 0).item()


def matrix_with_singular_values(values, shape, seed=0):
    """A matrix with these singular values and random singular vectors."""
    left, _ = np.linalg.qr(parameter((shape[0], len(values)), seed))
    right, _ = np.linalg.qr(parameter((shape[1], len(values)), seed + 1))
    return ((left * values) @ right.T).astype(np.float32)


SPECTRA = {f"condition {k:g}": np.logspace(0, -np.log10(k), 64) for k in np.logspace(0, 6, 7)}
SPECTRA["one large"] = np.r_[1.0, np.full(63, 1e-3)]
SPECTRA["decay"] = 1.0 / np.arange(1, 65)


def relative_rounding_error(name, x, steps):
    """The spectral norm of the error, relative to the amplified float32 rounding of X.

    A step multiplies small singular values by its coefficient a: 485 to 1025 in five steps, 2e4 in
    eight.
    """
    table = [(3.4445,)] * steps if name == "newton_schulz" else f.POLAR_EXPRESS
    slope = np.prod([row[0] for row in table[:steps]])
    ours = np.array(f.orthogonalize(mx.array(x), name, steps)[0])
    exact = ORTHOGONALIZERS[name][1](np.float64(x), steps)
    return np.linalg.norm(ours - exact, 2) / (slope * 2**-24)


@pytest.mark.parametrize("steps", [3, 5, 8])
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("name", ORTHOGONALIZERS)
def test_long_matrices_round_like_square_ones(name, spectrum, steps):
    # Long matrices are iterated on their Gram matrix, square ones on the matrix itself.
    for shape in ((64, 256), (256, 64), (64, 64)):
        x = matrix_with_singular_values(SPECTRA[spectrum], shape)
        # Measured: 3 on the matrix; 9 on its Gram matrix, 16 with a BLAS that sums one by one; 100
        # to 1000 in eight steps if the Gram matrix is never recomputed.
        assert relative_rounding_error(name, x, steps) < 24


@pytest.mark.parametrize("name", ORTHOGONALIZERS)
def test_gram_matrix_must_be_recomputed(name, monkeypatch):
    monkeypatch.setattr(f.orthogonalization, "_groups", lambda table: [table])
    for spectrum in ("condition 10000", "one large"):
        x = matrix_with_singular_values(SPECTRA[spectrum], (64, 256))
        assert relative_rounding_error(name, x, 8) > 40


@pytest.mark.parametrize("shape", [(64, 64), (96, 64), (64, 256)], ids=str)
@pytest.mark.parametrize("name", ORTHOGONALIZERS)
def test_products_can_be_computed_in_bf16(name, shape):
    orthogonalize, twin = ORTHOGONALIZERS[name]
    x = parameter(shape)
    ours, exact = np.array(orthogonalize(mx.array(x), dtype=mx.bfloat16)), twin(np.float64(x))
    assert ours.dtype == np.float32
    # Each of five steps rounds the elements of X by a relative 2^-9.
    error = np.linalg.norm(ours - exact) / np.linalg.norm(exact)
    assert 2**-12 < error < 5 * 2**-8


def test_polar_express_table_is_minimax():
    derived = polar_express_coefficients(len(f.POLAR_EXPRESS))
    # The seventh system is ill-conditioned: on [1 - 1e-3, 1 + 1e-3] all quintics look alike.
    for ours, twin, tolerance in zip(f.POLAR_EXPRESS, derived, [1e-12] * 6 + [1e-9] * 2):  # noqa: B905
        assert np.allclose(ours, twin, rtol=tolerance)


@pytest.mark.parametrize("name", ORTHOGONALIZERS)
@pytest.mark.parametrize("shape", [(2, 4000), (4000, 2)], ids=str)
def test_gram_matrix_is_computed_on_the_shorter_side(name, shape):
    x = mx.array(parameter(shape))
    mx.eval(x)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(ORTHOGONALIZERS[name][0](x))
    assert mx.get_peak_memory() - before < 100 * x.nbytes


def test_second_moment_of_a_rank_one_square_is_exact():
    # g² = r cᵀ: after one update with weight 1, V = R Cᵀ / mean(R) is g² itself.
    r, c = np.array([1.0, 4.0, 9.0]), np.array([0.25, 1.0])
    g = mx.array(np.sqrt(np.outer(r, c)).astype(np.float32))
    row, column, _ = f.factored_second_moment(g, mx.zeros((3, 1)), mx.zeros((1, 2)), mx.array(1.0))
    root = f.factored_root(row, column, mx.mean(row), 1e-10)
    assert np.allclose(np.array(root), np.array(g), rtol=1e-6)


def test_statistics_move_towards_the_means_of_the_squares():
    g = parameter((3, 5))
    *statistics, largest = f.factored_second_moment(
        mx.array(g), mx.ones((3, 1)), mx.ones((1, 5)), mx.array(0.25), eps=2.0
    )
    assert largest.item() == pytest.approx(np.square(g).sum(axis=1).max(), rel=1e-6)
    for ours, axis in zip(statistics, (1, 0), strict=True):
        mean = np.mean(np.square(g), axis, keepdims=True) + 2.0
        assert np.allclose(ours, 0.75 + 0.25 * mean, rtol=1e-6)


@pytest.mark.parametrize("axes", [None, (-2, -1)])
@pytest.mark.parametrize("shape", [(), (7,), (5, 6), (3, 5, 6)], ids=str)
def test_rms_equals_its_twin(shape, axes):
    if axes and len(shape) < 2:
        pytest.skip("not a matrix")
    x = parameter(shape)
    assert np.allclose(np.array(f.rms(mx.array(x), axes)), reference.rms(x, axes), rtol=1e-6)


def test_factored_root_is_at_least_its_floor():
    row, column = mx.array([[0.0], [4.0], [1e-30]]), mx.array([[9.0, 0.0]])
    root = np.array(f.factored_root(row, column, mx.array(1.0), 1e-3))
    assert np.allclose(root, [[1e-3, 1e-3], [6.0, 1e-3], [1e-3, 1e-3]], rtol=1e-6)


@pytest.mark.parametrize("divisor", [0.0, 1e-45, 1e-38])
def test_factored_root_of_underflowing_squares_is_its_floor(divisor):
    row, column = mx.array([[0.0], [1.4e-45]]), mx.array([[1.4e-45, 0.0]])
    root = f.factored_root(row, column, mx.array(divisor), 1e-8)
    assert np.allclose(np.array(root), 1e-8, rtol=1e-6)


def test_cautious_step_divides_agreeing_elements_by_their_share():
    def cautious(step, g):
        agrees = agreement(step, g)
        return step * agrees * cautious_scale(agrees)

    step, g = mx.array([1.0, -2.0, 3.0, 0.0]), mx.array([5.0, 5.0, 1e-30, 5.0])
    assert cautious(step, g).tolist() == [2.0, 0.0, 6.0, 0.0]
    lone = mx.concatenate([mx.array([1.0]), -mx.ones(9999)])  # a share of 1e-4 counts as 1e-3
    assert cautious(lone, mx.ones(10_000))[0].item() == pytest.approx(1000)
    assert cautious(-mx.abs(step), mx.abs(g)).tolist() == [0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("layout", ["batched", "experts", "conv", "transposed"])
@pytest.mark.parametrize("shape", [(), (3,), (3, 4), (2, 3, 4), (2, 3, 4, 5)], ids=str)
def test_from_items_inverts_as_items(shape, layout):
    x = mx.array(parameter(shape))
    back = f.from_items(f.as_items(x, layout), x.shape, layout).squeeze(0)
    assert back.shape == x.shape
    assert mx.array_equal(back, x).item()


def test_muon_scale():
    assert f.muon_scale(64, 16, None) == 1
    assert f.muon_scale(64, 16, "spectral") == 2
    assert f.muon_scale(16, 64, "spectral") == 1
    assert f.muon_scale(16, 64, "rms") == pytest.approx(1.6)


def test_bias_correction_is_exact_for_betas_near_one():
    # In float32, 1 - 0.999 has a relative error of 5e-5.
    assert f.bias_correction(0.999, mx.array(1.0)).item() == pytest.approx(1e-3, rel=1e-6)
    assert f.bias_correction(0.0, mx.array(3.0)).item() == 1.0


INVALID_ARGUMENTS = [
    (mx.ones(3), 5, "x must hold float matrices"),
    (mx.ones((2, 2), mx.int32), 5, "x must hold float matrices"),
    (mx.ones((0, 3)), 5, "x must hold float matrices"),
    (np.eye(3), 5, "x must be an array of MLX, got ndarray"),
    (mx.ones((2, 2)), 0, "steps must be at least 1, got 0"),
]


@pytest.mark.parametrize("orthogonalize", [newton_schulz, polar_express])
@pytest.mark.parametrize(("x", "steps", "message"), INVALID_ARGUMENTS)
def test_orthogonalizers_refuse_invalid_arguments(orthogonalize, x, steps, message):
    with pytest.raises(ValueError, match=message):
        orthogonalize(x, steps)


def test_product_dtype_must_be_floating_point():
    with pytest.raises(ValueError, match=r"dtype must be a floating-point dtype, got .*int32"):
        newton_schulz(mx.ones((2, 2)), dtype=mx.int32)
