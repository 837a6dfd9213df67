"""The engine updates one group at a time: memory during and after a step, its result."""

import gc

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as mlx_optimizers
import pytest
from mlx.utils import tree_flatten

from mlx_maxfactor import OPTIMIZERS, AdamW, GuardedOptimizer, MaxFactor, create_optimizer
from mlx_maxfactor.engine.step import find_slots

COUNT, SIDE = 64, 400  # too large for groups
MATRIX = 4 * SIDE * SIDE  # bytes of one in float32


def trees(dtype):
    parameters = {str(i): mx.ones((SIDE, SIDE), dtype) for i in range(COUNT)}
    return parameters, {key: mx.full((SIDE, SIDE), 0.01, dtype) for key in parameters}


def extra_memory_of_a_step(optimizer, dtype, compiled):
    """The peak memory of an update beyond the memory before it, in float32 matrices."""
    parameters, before = trees(dtype)[0], 0
    optimizer.init(parameters)
    update = optimizer.apply_gradients
    if compiled:
        update = mx.compile(update, inputs=optimizer.state, outputs=optimizer.state)
    for _ in range(2):  # the first one traces
        given = [trees(dtype)[1], parameters]
        del parameters
        mx.eval(given, optimizer.state)
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        parameters = update(given.pop(0), given.pop(0))
        mx.eval(parameters, optimizer.state)
    return (mx.get_peak_memory() - before) / MATRIX


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.compiled)])
def test_few_float32_copies_exist_at_once(compiled):
    # Measured: 3 to 9 of 64 matrices, because MLX's CPU backend allocates a hundred kernels ahead;
    # 20 to 29 when updates did not wait for each other.
    assert extra_memory_of_a_step(MaxFactor(), mx.bfloat16, compiled) < COUNT / 4


@pytest.mark.parametrize("make", [AdamW, lambda: GuardedOptimizer(AdamW(), max_grad_norm=1.0)])
def test_steps_do_not_leak_memory(make):
    gc.collect()
    gc.disable()  # memory must not wait for the collector
    try:
        parameters, gradients = trees(mx.float32)
        optimizer = make()
        optimizer.init(parameters)
        mx.eval(parameters, gradients, optimizer.state)
        before = mx.get_active_memory()
        for _ in range(3):
            parameters = optimizer.apply_gradients(gradients, parameters)
            mx.eval(parameters, optimizer.state)
            assert mx.get_active_memory() < before + MATRIX
    finally:
        gc.enable()


def test_old_weights_are_released_without_garbage_collection():
    gc.disable()
    try:
        model = nn.Sequential(*[nn.Linear(SIDE, SIDE, bias=False) for _ in range(8)])
        optimizer = create_optimizer(model, "maxfactor")
        mx.eval(model.parameters(), optimizer.state)
        before = mx.get_active_memory()
        optimizer.update(model, model.trainable_parameters())
        mx.eval(model.parameters(), optimizer.state)
        assert mx.get_active_memory() < before + MATRIX
    finally:
        gc.enable()


def test_find_slots_returns_the_states_of_each_optimizer():
    x, y, z = mx.zeros(1), mx.zeros(2), mx.zeros(3)
    gradients = {"a": [{"w": x}, {"w": y}], "b": {"c": (z,)}}
    states = [{"a": [{"w": {"m": x}}]}, {"step": x, "b": {"c": [{}]}}]
    members = [AdamW(), AdamW()]
    for member, state in zip(members, states, strict=True):
        member.state.update(state)
    slots = find_slots(gradients, gradients, members, lambda path: int(path.startswith("b")))
    assert [slot.path for slot in slots] == ["a.0.w", "a.1.w", "b.c.0"]
    assert [slot.state for slot in slots] == [{"m": x}, None, {}]
    assert [slot.member for slot in slots] == [members[0], members[0], members[1]]


def test_result_has_the_structure_of_the_gradients():
    gradients = {"a": [{"w": mx.ones(2)}, {}], "b": (mx.ones(3), mx.ones(1))}
    updated = AdamW().apply_gradients(gradients, gradients | {"frozen": mx.ones(4)})
    assert updated.keys() == gradients.keys()
    assert [list(child) for child in updated["a"]] == [["w"], []]
    assert isinstance(updated["b"], tuple)
    assert [x.size for x in updated["b"]] == [3, 1]


def test_multi_optimizer_can_be_guarded():
    def split():
        members = [mlx_optimizers.SGD(0.1), mlx_optimizers.Lion(0.01)]
        return mlx_optimizers.MultiOptimizer(members, [lambda path, _: path == "a"])

    p = {"a": mx.array([1.0, 2.0]), "b": mx.array([1.0, 2.0])}
    g = {"a": mx.array([3.0, 4.0]), "b": mx.array([0.0, 12.0])}
    clipped = {"a": g["a"] / 13, "b": g["b"] / 13}
    ours, theirs = GuardedOptimizer(split(), max_grad_norm=1.0), split()
    for _ in range(2):
        moved, twin = ours.apply_gradients(g, p), theirs.apply_gradients(clipped, p)
        assert all(mx.allclose(moved[key], twin[key]).item() for key in p)
    bad = ours.apply_gradients({"a": mx.array([float("inf"), 0.0]), "b": g["b"]}, p)
    assert all(mx.array_equal(bad[key], p[key]).item() for key in p)
    assert (ours.skipped.item(), ours.optimizers[0].optimizers[1].step.item()) == (1, 2)


def test_each_member_counts_a_step_once():
    from models import Table

    model = Table()
    optimizer = create_optimizer(model, rules={"head": mlx_optimizers.Adam(1e-3)})
    for _ in range(3):
        optimizer.update(model, model.trainable_parameters())
    assert [member.step.item() for member in optimizer.optimizers] == [3] * 4


@pytest.mark.compiled
@pytest.mark.examples
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_guards_keep_the_memory_that_checkpointing_saves(kind):
    # A norm that reads the first gradients first keeps the activations of all layers: 1.6 times as
    # much memory.
    from compare_step_memory import METHODS, MODEL, peak

    from mlx_maxfactor.finetuning.memory_estimate import Request

    sizes = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 6}
    request = Request({**MODEL, **sizes}, fine_tune_type=kind, num_layers=-1, dtype="float32")
    methods = METHODS["default"], METHODS["default, guards"]
    free, guarded = (peak(request, 512, True, method) for method in methods)
    assert guarded < 1.1 * free


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("layout", ["batched", "transposed", "conv", "experts"])
@pytest.mark.parametrize("count", [1, 3])
def test_arrays_stay_in_rows(name, layout, count):
    # A checkpoint loads rows. With other strides, products round differently after a resume.
    optimizer = OPTIMIZERS[name].kind(0.02)
    optimizer.layout = layout
    parameters = {str(i): mx.random.normal((6, 4, 8)) for i in range(count)}
    gradients = {key: mx.random.normal((8, 4, 6)).swapaxes(0, 2) for key in parameters}
    for _ in range(2):
        parameters = optimizer.apply_gradients(gradients, parameters)
    arrays = [x for _, x in tree_flatten([parameters, optimizer.state])]
    mx.eval(arrays)
    assert all(memoryview(x).c_contiguous for x in arrays)
