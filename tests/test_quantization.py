"""Momentum in 4 and 8 bits: levels, groups, momentum that fades, bounded steps, size."""

import mlx.core as mx
import numpy as np
import pytest
from trajectories import hard_gradients, parameter

from mlx_maxfactor import AdamW, MaxFactor, Muon, OrthoMaxFactor, reference
from mlx_maxfactor import functional as f

BITS = [4, 8]
DECAYS = [0.0, 0.5, 0.8, 0.9, 0.95]
KINDS = [
    OrthoMaxFactor,
    Muon,
    lambda **options: MaxFactor(**{"momentum": 0.8, **options}),
    AdamW,
]


def round_trip(x, bits, decay=0.0):
    codes, scale = f.quantize(mx.array(x), bits, decay)
    return np.array(f.dequantize(codes, scale, x.shape)), np.array(scale.astype(mx.float32))


def test_levels_are_the_lloyd_max_levels_of_a_unit_normal():
    level, error = reference.lloyd_max(15)
    assert np.allclose(level, f.LEVELS, atol=6e-5)  # four decimals
    assert error == pytest.approx(0.0107, abs=5e-5)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (64,), (65,), (40, 33), (3, 5, 60)], ids=str)
@pytest.mark.parametrize("size", [1e-15, 1.0, 1e15])
def test_quantization_equals_its_twin(shape, size, bits, decay):
    x = np.asarray(parameter(shape) * np.float32(size))
    codes, scale = f.quantize(mx.array(x), bits, decay)
    groups = -(-x.size // 64)
    assert (codes.dtype, codes.shape) == {
        4: (mx.uint8, (groups, 32)),
        8: (mx.int8, (groups, 64)),
    }[bits]
    assert (scale.dtype, scale.shape) == (mx.bfloat16, (groups,))
    back, scales = round_trip(x, bits, decay)
    exact = reference.quantized(x, bits, decay, scales)
    # Decoding rounds to float32 a few times.
    assert np.allclose(back, exact, rtol=1e-6, atol=0)
    flat = np.pad(np.float64(x).reshape(-1), (0, -x.size % 64)).reshape(-1, 64)
    measured = np.sqrt(np.mean(flat**2, axis=1)) if bits == 4 else np.max(np.abs(flat), axis=1)
    assert np.allclose(scales, measured, rtol=2**-8)  # bf16 has 8 bits


def test_quantization_error_of_a_normal_is_as_expected():
    x = np.random.default_rng(0).normal(size=(64, 1024)).astype(np.float32)
    errors = [np.mean((round_trip(x, bits)[0] - x) ** 2) for bits in BITS]
    # The RMS of 64 elements differs from that of the normal; the error with 8 bits is a few 1e-5.
    assert errors[0] == pytest.approx(0.0107, rel=0.1)
    assert errors[1] < 1e-4


@pytest.mark.parametrize("bits", BITS)
def test_halfway_values_round_away_from_zero(bits):
    x = np.zeros(64, np.float32)
    low, high = f.LEVELS[1:3] if bits == 4 else np.array([3, 4]) ** 2 / 127**2
    x[0] = (low + high) / 2 if bits == 4 else 3.5**2 / 127**2
    x[1] = np.sqrt(64 - x[0] ** 2) if bits == 4 else 1.0  # the scale is 1
    for sign in (1, -1):
        assert round_trip(sign * x, bits)[0][0] == pytest.approx(sign * high, rel=1e-5)


@pytest.mark.parametrize("bits", BITS)
def test_zeros_stay_zero_next_to_other_values(bits):
    x = parameter((8, 64))
    x[:, 5] = 0
    x[3] = 0
    back, _ = round_trip(x, bits)
    assert not back[:, 5].any()
    assert not back[3].any()
    assert back.any()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("decay", DECAYS[1:])
def test_momentum_without_gradients_falls_to_zero(decay, bits):
    # With rounding to nearest alone, 0.8 times the second level is rounded back to it forever.
    rng, moment = np.random.default_rng(0), parameter((16, 64)) * 3
    dead = np.arange(64) % 3 == 0
    for _ in range(10):
        moment = round_trip(
            decay * moment + (1 - decay) * rng.normal(size=moment.shape), bits, decay
        )[0]
    assert np.abs(moment[:, dead]).max() > 0
    for _ in range(300):
        g = np.where(dead, 0.0, rng.normal(size=moment.shape))
        moment = round_trip(np.float32(decay * moment + (1 - decay) * g), bits, decay)[0]
    assert not moment[:, dead].any()
    assert moment[:, ~dead].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("state_dtype", ["int4", "int8"])
def test_column_without_gradient_slows_down_and_stays_finite(kind, state_dtype):
    optimizer = kind(state_dtype=state_dtype, weight_decay=0.0)
    tree = {"w": mx.array(parameter((32, 64)))}
    live = mx.array((np.arange(64) != 5).astype(np.float32))
    for t in range(200):
        g = mx.array(parameter((32, 64), t)) * (live if t > 5 else 1.0)
        new = optimizer.apply_gradients({"w": g}, tree)["w"]
        if t > 190:
            moved = mx.abs(new - tree["w"])
            rms = mx.sqrt(mx.mean(mx.square(moved), axis=0))
            assert rms[5].item() < 0.1 * mx.mean(rms).item()
        tree = {"w": new}
    assert mx.all(mx.isfinite(tree["w"])).item()


# The bound on AdamW's step


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999), (0.8, 0.8), (0.95, 0.9), (0.0, 0.5)])
@pytest.mark.parametrize("t", [1, 2, 7, 60])
def test_largest_moment_equals_its_twin(betas, t):
    bound = f.largest_moment(*betas, mx.array(float(t))).item()
    assert bound == pytest.approx(reference.largest_moment(*betas, t), rel=1e-4)


@pytest.mark.parametrize("bias_correction", [True, False])
@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999)])
@pytest.mark.parametrize("state_dtype", ["int4", "int8"])
def test_adamw_with_few_bits_respects_the_float32_bound(state_dtype, betas, bias_correction):
    # Every group has gradients of six decades, so small elements share a scale with large ones.
    rng = np.random.default_rng(0)
    sizes = np.logspace(-6, 0, 64, dtype=np.float32)
    options = {
        "betas": betas,
        "weight_decay": 0.0,
        "bias_correction": bias_correction,
        "eps": 1e-30,
    }
    optimizer = AdamW(1.0, state_dtype=state_dtype, **options)
    tree = {"w": mx.zeros((16, 64))}
    for t in range(1, 40):
        g = (rng.normal(size=(16, 64)) * sizes * (t % 7 != 3)).astype(np.float32)
        new = optimizer.apply_gradients({"w": mx.array(g)}, tree)["w"]
        bound = reference.largest_moment(*betas, t)
        if bias_correction:
            bound *= np.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t)
        assert np.abs(np.array(new - tree["w"])).max() <= bound * (1 + 1e-4)
        tree = {"w": new}


# In the optimizers


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("state_dtype", ["bfloat16", "int8", "int4"])
def test_step_uses_momentum_before_rounding(kind, state_dtype):
    p, g = {"w": mx.array(parameter((20, 20)))}, {"w": mx.array(parameter((20, 20), 1))}
    moved = [
        kind(state_dtype=dtype).apply_gradients(g, p)["w"] for dtype in ("float32", state_dtype)
    ]
    assert mx.allclose(*moved, rtol=0, atol=1e-7).item()  # AdamW's bound may round once


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("state_dtype", ["int8", "int4"])
def test_state_equals_the_quantized_momentum_of_the_twin(kind, state_dtype):
    optimizer, tree = kind(state_dtype=state_dtype), {"w": mx.array(parameter((20, 33)))}
    bits = {"int8": 8, "int4": 4}[state_dtype]
    beta = getattr(optimizer, "momentum", None) or optimizer.betas[0]
    weight = 1.0 if kind is Muon else 1 - beta
    before = np.zeros((20, 33))
    for t in range(20):
        g = parameter((20, 33), t)
        tree = optimizer.apply_gradients({"w": mx.array(g)}, tree)
        state = optimizer.state["w"]
        scale = np.array(state["m_scale"].astype(mx.float32))
        after = np.array(f.dequantize(state["m"], state["m_scale"], (20, 33)))
        exact = reference.quantized(beta * before + weight * g, bits, beta, scale)
        # Rarely, float32 and float64 fall on different sides of a rounding threshold.
        assert np.mean(~np.isclose(after, exact, rtol=1e-5)) < 0.01
        before = after


def test_state_size_of_hidden_matrices():
    def bytes_of(optimizer, shape):
        state = {}
        optimizer.init_single(mx.zeros(shape), state)
        return sum(x.nbytes for x in state.values())

    for shape in [(896, 896), (896, 4864), (4864, 896)]:
        adamw = bytes_of(AdamW(), shape)
        assert bytes_of(OrthoMaxFactor(), shape) <= 0.070 * adamw
        assert bytes_of(OrthoMaxFactor(momentum=0), shape) == 4 * sum(shape)
        assert bytes_of(Muon(state_dtype="int4"), shape) <= 0.067 * adamw
    assert bytes_of(OrthoMaxFactor(), (128, 128)) <= 0.075 * bytes_of(AdamW(), (128, 128))


def test_only_momentum_is_quantized_and_no_key_is_kept():
    for state_dtype, dtype in (("int4", "uint8"), ("int8", "int8")):
        state = {}
        OrthoMaxFactor(state_dtype=state_dtype).init_single(mx.zeros((6, 5)), state)
        dtypes = {key: str(x.dtype).removeprefix("mlx.core.") for key, x in state.items()}
        expected = {"row": "float32", "column": "float32", "m": dtype, "m_scale": "bfloat16"}
        assert dtypes == expected


@pytest.mark.parametrize("kind", [OrthoMaxFactor, Muon, MaxFactor])
def test_no_momentum_buffer_without_momentum(kind):
    for state_dtype in ("float32", "bfloat16", "int8", "int4"):
        state = {}
        kind(
            momentum=0,
            state_dtype=state_dtype,
            **({"nesterov": False} if kind is MaxFactor else {}),
        ).init_single(mx.zeros((6, 5)), state)
        assert "m" not in state


@pytest.mark.parametrize("kind", [OrthoMaxFactor, Muon, MaxFactor, AdamW])
def test_state_dtype_can_be_a_dtype_or_its_name(kind):
    assert kind(state_dtype=mx.int8).state_dtype == kind(state_dtype="int8").state_dtype == "int8"
    names = "'float32', 'bfloat16', 'int8', 'int4'"
    with pytest.raises(ValueError, match=f"^state_dtype must be one of {names}, got 'uint8'"):
        kind(state_dtype=mx.uint8)
    with pytest.raises(ValueError, match=f"{names}, got 'int3' .did you mean 'int"):
        kind(state_dtype="int3")


@pytest.mark.parametrize("shape", [(12, 64), (12, 32), (12, 5), (130, 1)], ids=str)
def test_arrays_can_be_divided_between_groups(shape):
    rows = f.rows_of_groups(shape)
    assert rows * np.prod(shape[1:]) % 64 == 0
    x = mx.array(parameter(shape))
    for bits in BITS:
        whole = f.dequantize(*f.quantize(x, bits), shape)
        cut = [x[i : i + rows] for i in range(0, shape[0], rows)]
        parts = [f.dequantize(*f.quantize(part, bits), part.shape) for part in cut]
        assert mx.array_equal(mx.concatenate(parts), whole).item()


def test_few_bits_stay_close_to_float32_on_hard_gradients():
    gradients = hard_gradients((32, 17))
    ends = []
    for state_dtype in ("float32", "int8", "int4"):
        optimizer, tree = (
            OrthoMaxFactor(state_dtype=state_dtype),
            {"w": mx.array(parameter((32, 17)))},
        )
        for g in gradients:
            tree = optimizer.apply_gradients({"w": mx.array(g)}, tree)
        ends.append(np.array(tree["w"]))
    moved = np.linalg.norm(ends[0] - parameter((32, 17)))
    assert np.linalg.norm(ends[1] - ends[0]) < 0.1 * moved
    assert np.linalg.norm(ends[2] - ends[0]) < 0.5 * moved
