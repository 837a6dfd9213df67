"""Frequency-adaptive momentum: its twin, closed forms, its state."""

import mlx.core as mx
import numpy as np
import pytest
import twins
from trajectories import BOUND, distance, hard_gradients, parameter, trajectory, twin_trajectory

from mlx_maxfactor import FrequencyAdaptiveMomentum, MaxFactor
from mlx_maxfactor import functional as f

ARRAYS = [
    *(((32, 17), "batched"), ((17, 32), "batched"), ((8, 5), "batched"), ((4, 9), "batched")),
    *(((3, 6, 7), "batched"), ((3, 6, 7), "experts"), ((2, 3, 6, 5), "experts")),
    *(((6, 3, 8), "conv"), ((5, 3, 3, 9), "conv"), ((9, 6), "transposed"), ((3, 9, 6), "batched")),
    *(((7,), "batched"), ((), "batched"), ((1,), "batched"), ((1, 1), "batched")),
]
# 40 bands are more than any of these spectra has bins.
VARIANTS = [({}, {}), ({"bands": 1}, {}), ({"bands": 3}, {}), ({"bands": 40}, {})]
VARIANTS += [({"blend": 0.8, "blend_steps": 20}, {}), ({}, {"cautious": True})]
VARIANTS += [({}, {"nesterov": True}), ({"alpha": 0.5, "beta": 0.9}, {"max_norm": False})]
VARIANTS += [
    ({"blend": 0.5, "beta": 0.0}, {"nesterov": True, "cautious": True, "full_matrix": True})
]


def coloured_gradients(shape, steps=30, seed=8):
    """White noise plus noise shared by rows and by columns; shares and scale change each step.

    ``hard_gradients`` does not fit here. Its magnitudes fall by up to 1e18 from one step to the
    next, and a spectrum rounds each element by 1e-7 of its row. The sign of a smaller m then
    depends on rounding: 8 of 240 trajectories end 1e-3 apart. Here the scale changes at most
    100-fold, and with this seed no element that moves is below 6e-6 of the largest in its row.
    """
    rng = np.random.default_rng(seed)
    gradients = []
    for t in range(steps):
        g = rng.normal(size=shape)
        for axis in range(len(shape))[-2:]:
            g = g + rng.uniform(0, 3) * rng.normal(size=(*shape[:axis], 1, *shape[axis + 1 :]))
        gradients.append((g * 10 ** rng.uniform(-1, 1) * (t % 13 != 12)).astype(np.float32))
    return gradients


@pytest.mark.parametrize(("shape", "layout"), ARRAYS, ids=str)
@pytest.mark.parametrize(("fam", "options"), VARIANTS, ids=str)
def test_optimizer_follows_the_twin(fam, options, shape, layout):
    twin = twins.BandMaxFactor(momentum=twins.FrequencyAdaptiveMomentum(**fam), **options)
    ours = MaxFactor(momentum=FrequencyAdaptiveMomentum(**fam), **options)
    start, gradients = parameter(shape), coloured_gradients(shape)
    exact = twin_trajectory(twin, start, gradients, layout)
    assert distance(trajectory(ours, start, gradients, layout), exact) < BOUND
    # The step hardly depends on more than the sign of m, so m is compared too: it may differ by a
    # few roundings of its largest element.
    m = np.array(ours.state["p"]["m"], np.float64).ravel()
    assert np.max(np.abs(m - twin.m.ravel())) < 1e-6 * np.max(np.abs(twin.m))
    assert ("power" in ours.state["p"]) == (np.ndim(twin.h) > 0 and fam.get("bands") != 1)
    if "power" in ours.state["p"]:
        assert ours.state["p"]["power"].shape == twin.h.shape
        assert np.allclose(np.array(ours.state["p"]["power"]), twin.h, rtol=1e-5, atol=0)


# Formulas


def spectra(n, scale=1.0):
    g = parameter((2, 6, n), seed=n) * np.linspace(1, 3, 6, dtype=np.float32)[:, None]
    return g, mx.fft.rfft(mx.array(g) * scale)


@pytest.mark.parametrize("bands", [1, 3, 10, 40])
@pytest.mark.parametrize("n", [5, 8, 16, 33])
def test_formulas_equal_their_twins(n, bands):
    fam = twins.FrequencyAdaptiveMomentum(alpha=0.8, beta=0.7, bands=bands)
    g, F = spectra(n)
    band, rfft, _ = fam.bins(n)
    shares = f.band_shares(F, bands)
    assert shares.shape == (2, 1, bands)
    assert np.allclose(np.array(shares), fam.shares(g @ rfft, band), rtol=1e-5, atol=0)
    h = np.random.default_rng(0).uniform(0, 0.3, size=(2, 1, bands))
    h[..., -1] = 0.0  # with 40 bands, the damping reaches its maximum of 0.9
    damp = f.band_damping(mx.array(h.astype(np.float32)))
    assert np.allclose(np.array(damp), fam.damping(h), rtol=0, atol=1e-6)

    m, h = parameter((2, 6, n), seed=1), h * (1 - 0.7**4)
    exact, h = fam.filter(np.float64(g), np.float64(m), h, t=5)
    damp = mx.array(fam.damping(h / (1 - 0.7**5)).astype(np.float32))
    ours = f.band_momentum(F, mx.array(m), 0.8 * (1 - damp), 0.2 * (1 + damp))
    assert np.max(np.abs(np.array(ours) - exact)) < 1e-6 * np.max(np.abs(exact))


@pytest.mark.parametrize("scale", [1e-30, 1e-25, 1e-20, 1e10, 1e15])
def test_band_shares_do_not_depend_on_the_scale(scale):
    # In float32, the squares of these gradients and of complex magnitudes over- or underflow.
    exact = f.band_shares(spectra(16)[1], 4)
    assert np.allclose(f.band_shares(spectra(16, scale)[1], 4), exact, rtol=1e-5, atol=0)


def test_band_shares_of_the_largest_gradient_are_finite():
    # Gradients are clamped to 1e15. This row sums to 2e19, whose square overflows.
    assert np.allclose(f.band_shares(mx.fft.rfft(mx.full((5, 20000), 1e15)), 2), [[1, 0]])


@pytest.mark.parametrize(("shape", "layout"), ARRAYS, ids=str)
def test_one_band_equals_plain_momentum_bit_for_bit(shape, layout):
    # The gradients have magnitudes from 1e-12 to 1e6.
    plain, fam = (
        trajectory(MaxFactor(momentum=m), parameter(shape), hard_gradients(shape), layout)
        for m in (0.9, FrequencyAdaptiveMomentum(bands=1))
    )
    assert np.array_equal(plain, fam)


@pytest.mark.parametrize("n", [40, 41])
@pytest.mark.parametrize(
    ("bands", "k", "a"),  # of 21 bins: bin k lies in band k * bands // 21
    [(10, 19, 0.1), (10, 19, 0.4), (10, 12, 0.4), (4, 6, 0.2), (10, 19, 1e3), (21, 19, 0.01)],
)
def test_damping_of_a_tone_equals_the_closed_form(n, bands, k, a):
    # A cosine at bin 1 (band 0) plus a times a cosine at bin k: shares 1 : a^2 at every step.
    alpha, T, b, share = 0.9, 25, k * bands // 21, a**2 / (1 + a**2)
    rows = np.array([[1.0], [-2.0], [0.5], [3.0], [1.0]])
    low, tone = (np.cos(2 * np.pi * i * np.arange(n) / n) for i in (1, k))
    optimizer = MaxFactor(momentum=FrequencyAdaptiveMomentum(bands=bands))
    tree, g = {"w": mx.ones((5, n))}, {"w": mx.array(rows * (low + a * tone))}
    for _ in range(T):
        tree = optimizer.apply_gradients(g, tree)
    damp = min(max(b / bands * (1 - 5 * share), 0.0), 0.9)
    assert (damp > 0) == (a < 0.5)
    mu = alpha * (1 - damp)
    amplitude = (1 - alpha) * (1 + damp) / (1 - mu) * (1 - mu**T)
    expected = rows * ((1 - alpha**T) * low + a * amplitude * tone)
    assert np.allclose(optimizer.state["w"]["m"], expected, rtol=0, atol=1e-6 * expected.max())
    response = [x[0, b].item() for x in optimizer.momentum.response(optimizer.state["w"])]
    assert np.allclose(response, [share, mu, (1 - alpha) * (1 + damp)], rtol=1e-5)


# State


def test_late_parameter_counts_its_own_updates():
    optimizer, g = MaxFactor(momentum=FrequencyAdaptiveMomentum()), mx.array(parameter((6, 8)))
    for tree in ({"a": g}, {"a": g}, {"a": g, "b": g}):
        optimizer.apply_gradients(tree, tree)
    early, late = (optimizer.momentum.response(optimizer.state[key]) for key in "ab")
    for a, b in zip(early, late, strict=True):
        assert np.allclose(a, b, rtol=1e-5)


@pytest.mark.parametrize("cautious", [False, True])
def test_cautious_steps_do_not_move_inputs_without_gradient(cautious):
    # The filter spreads along the axis, and a sign step would move these inputs like the others.
    fam = FrequencyAdaptiveMomentum()
    optimizer = MaxFactor(momentum=fam, cautious=cautious, weight_decay=0.0)
    start = {"w": mx.array(parameter((16, 32)))}
    tree = start
    for seed in range(10):
        g = parameter((16, 32), seed) * (np.arange(32) > 3)
        tree = optimizer.apply_gradients({"w": mx.array(g)}, tree)
    moved = mx.any(tree["w"] != start["w"], axis=0).tolist()
    assert all(moved[4:])
    assert any(moved[:4]) is not cautious


def test_numbers_of_any_type_are_stored_as_floats():
    assert type(MaxFactor(momentum=np.float32(0.5)).momentum) is float
    assert FrequencyAdaptiveMomentum(alpha=0, blend=1) == FrequencyAdaptiveMomentum(alpha=0.0)
    assert str(FrequencyAdaptiveMomentum(blend=1)) == str(FrequencyAdaptiveMomentum())
