"""Momentum in 4 and 8 bits: levels, groups, momentum that fades, bounded steps, size."""

import mlx.core as mx
import numpy as np
import pytest
from trajectories import parameter
from twins import largest_moment

from mlx_maxfactor import AdamW, MaxFactor, Muon, OrthoMaxFactor, reference
from mlx_maxfactor import functional as f

BITS = [4, 8]
KINDS = [OrthoMaxFactor, Muon, lambda **options: MaxFactor(**{"momentum": 0.8, **options}), AdamW]


def round_trip(x, bits):
    x = mx.array(x)[None]
    return np.array(f.dequantize(*f.quantize(x, bits), x.shape)[0])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(), (7,), (64,), (40, 33), (3, 5, 60)], ids=str)
@pytest.mark.parametrize("size", [1e-15, 1.0, 1e15])
def test_quantization_equals_its_twin(shape, size, bits):
    x = np.asarray(parameter(shape) * np.float32(size))
    codes, scale = f.quantize(mx.array(x)[None], bits)
    assert scale.size == -(-x.size // f.GROUPS[bits])
    assert codes.nbytes == scale.size * f.GROUPS[bits] * bits // 8
    # Decoding rounds to float32 a few times.
    assert np.allclose(round_trip(x, bits), reference.quantized(x, bits), rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e15])
def test_four_bits_are_those_of_mlx(size):
    # On a GPU they are computed by MLX. Ties and zeros of both signs are among them.
    levels = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6], np.float32)
    x = np.concatenate([parameter((32, 32)), np.outer([0, 1, -1], np.tile(levels, 4))]) * size
    x = mx.array(x.astype(np.float32)).reshape(1, -1)
    codes, scale, *_ = mx.quantize(x, group_size=32, bits=4, mode="mxfp4")
    exact = mx.dequantize(codes, scale, group_size=32, bits=4, mode="mxfp4").astype(mx.float32)
    ours = f.quantize(x, 4)
    assert mx.array_equal(ours[1], scale).item()
    assert mx.array_equal(f.dequantize(*ours, x.shape), exact).item()
    assert mx.array_equal(f.dequantize(codes, scale, x.shape), exact).item()


@pytest.mark.parametrize("state_dtype", ["int4", "int8"])
@pytest.mark.parametrize("beta", [0.5, 0.8, 0.95])
def test_momentum_without_gradients_falls_to_zero(beta, state_dtype):
    # To nearest alone, 0.8 times a low level is rounded back to it forever.
    optimizer, dead = Muon(momentum=beta, state_dtype=state_dtype), np.arange(64) % 3 == 0
    tree = {"w": mx.array(parameter((16, 64)))}

    def moment():
        state = optimizer.state["w"]
        scales = state["m_scale"][None]
        return np.array(f.dequantize(state["m"][None], scales, (1, 16, 64))[0])

    for seed in range(60):
        g = parameter((16, 64), seed) * (~dead if seed >= 5 else 1.0)
        tree = optimizer.apply_gradients({"w": mx.array(g.astype(np.float32))}, tree)
        assert seed >= 5 or moment()[:, dead].any()
    assert not moment()[:, dead].any()
    assert moment()[:, ~dead].any()


# The bound on AdamW's step


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999), (0.8, 0.8), (0.95, 0.9), (0.0, 0.5)])
@pytest.mark.parametrize("t", [1, 2, 7, 60])
def test_largest_moment_equals_its_twin(betas, t):
    bound = f.largest_moment(*betas, mx.array(float(t))).item()
    assert bound == pytest.approx(largest_moment(*betas, t), rel=1e-4)


@pytest.mark.parametrize("bias_correction", [True, False])
@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999)])
@pytest.mark.parametrize("state_dtype", ["int4", "int8"])
def test_adamw_with_few_bits_respects_the_float32_bound(state_dtype, betas, bias_correction):
    # Every group has gradients of six decades, so small elements share a scale with large ones.
    rng = np.random.default_rng(0)
    sizes = np.logspace(-6, 0, 64, dtype=np.float32)
    options = {"betas": betas, "bias_correction": bias_correction, "state_dtype": state_dtype}
    optimizer = AdamW(1.0, weight_decay=0.0, eps=1e-30, **options)
    tree = {"w": mx.zeros((16, 64))}
    for t in range(1, 40):
        g = (rng.normal(size=(16, 64)) * sizes * (t % 7 != 3)).astype(np.float32)
        new = optimizer.apply_gradients({"w": mx.array(g)}, tree)["w"]
        bound = largest_moment(*betas, t)
        if bias_correction:
            bound *= np.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t)
        assert np.abs(np.array(new - tree["w"])).max() <= bound * (1 + 1e-4)
        tree = {"w": new}


# In the optimizers


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("state_dtype", ["bfloat16", "int8", "int4"])
def test_step_uses_momentum_before_rounding(kind, state_dtype):
    p, g = {"w": mx.array(parameter((20, 20)))}, {"w": mx.array(parameter((20, 20), 1))}
    moved = [kind(state_dtype=x).apply_gradients(g, p)["w"] for x in ("float32", state_dtype)]
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
        after = f.dequantize(state["m"][None], state["m_scale"][None], (1, 20, 33))[0]
        exact = reference.quantized(beta * before + weight * g, bits)
        # Rarely, float32 and float64 fall on different sides of a rounding threshold, or AdamW's
        # bound is below the moment.
        assert np.mean(~np.isclose(np.array(after), exact, rtol=1e-5)) < 0.02
        before = np.array(after)


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


@pytest.mark.parametrize("kind", [OrthoMaxFactor, Muon, MaxFactor])
def test_no_momentum_buffer_without_momentum(kind):
    for state_dtype in ("float32", "bfloat16", "int8", "int4"):
        state = {}
        kind(momentum=0, state_dtype=state_dtype).init_single(mx.zeros((6, 5)), state)
        assert "m" not in state


@pytest.mark.parametrize("kind", [OrthoMaxFactor, Muon, MaxFactor, AdamW])
def test_state_dtype_can_be_a_dtype_or_its_name(kind):
    assert kind(state_dtype=mx.int8).state_dtype == kind(state_dtype="int8").state_dtype == "int8"
    names = "'float32', 'bfloat16', 'int8', 'int4'"
    with pytest.raises(ValueError, match=f"^state_dtype must be one of {names}, got 'uint8'"):
        kind(state_dtype=mx.uint8)
    with pytest.raises(ValueError, match=f"{names}, got 'int3' .did you mean 'int"):
        kind(state_dtype="int3")
