"""The command ``mlx-maxfactor fits``: estimates against real peaks, its table, wrong input."""

import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_maxfactor import estimate_training_memory
from mlx_maxfactor.commands import fits, main
from mlx_maxfactor.finetuning import memory_estimate

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 6,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 512,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}
QUICK = {"batch_size": 2, "max_seq_length": 128}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


@pytest.mark.compiled
@pytest.mark.examples
@pytest.mark.parametrize(
    ("kind", "checkpointed", "optimizer", "accumulated"),
    [
        ("lora", False, "mlx_adamw", 1),
        ("full", True, "orthomaxfactor", 1),
        ("full", False, "muon", 2),
    ],
)
def test_estimate_is_within_ten_percent_of_a_real_run(kind, checkpointed, optimizer, accumulated):
    import compare_memory  # draws with matplotlib

    request = memory_estimate.Request(
        CONFIG | {"hidden_size": 256, "intermediate_size": 704},
        optimizer,
        fine_tune_type=kind,
        num_layers=-1,
        batch_size=2,
        max_seq_length=256,
        grad_checkpoint=checkpointed,
        grad_accumulation_steps=accumulated,
    )
    real = compare_memory.real_peak(request)
    assert memory_estimate.estimate(request).peak == pytest.approx(real, rel=0.1)


def test_estimating_does_not_allocate_the_model():
    # 400 layers would need 75 MB of weights and 10 times as much for activations.
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    found = estimate_training_memory(CONFIG | {"num_hidden_layers": 400}, **QUICK)
    assert found.weights > 60e6
    assert mx.get_peak_memory() - before < 0.2 * found.weights


def test_memory_parts_depend_on_layers_optimizer_and_bits():
    small = estimate_training_memory(CONFIG, "mlx_adamw", num_layers=2, **QUICK)
    more = estimate_training_memory(CONFIG, "mlx_adamw", num_layers=6, **QUICK)
    assert 2 < more.state / small.state < 3.1
    assert more.step > small.step
    assert small.weights < more.weights
    assert small.states["adamw"] > 1.9 * small.states["mlx_muon"]
    quantized = estimate_training_memory(CONFIG, bits=4, **QUICK)
    assert quantized.weights < 0.4 * small.weights


def test_guard_and_accumulated_gradients_need_memory():
    sizes = {"hidden_size": 256, "intermediate_size": 704}

    def step(**options):
        return estimate_training_memory(
            CONFIG | sizes, fine_tune_type="full", batch_size=1, max_seq_length=32, **options
        ).step

    # Few tokens: most of a step are gradients, which a guard or a sum keeps until the update.
    released = step(skip_nonfinite=False)
    assert step() > 1.5 * released
    assert step(skip_nonfinite=False, grad_accumulation_steps=2) > 1.5 * released


@pytest.mark.parametrize(
    ("quantization", "share"),
    [
        ({"quantization": {"group_size": 32, "bits": 4, "mode": "mxfp4"}}, 0.160),
        ({"quantization_config": {"quant_method": "mxfp4"}}, 0.160),
        ({"quantization": {"group_size": 64, "bits": 4}}, 0.183),
        ({"quantization": {"group_size": 64, "bits": 4, "model.embed_tokens": False}}, 0.267),
    ],
    ids=["mxfp4", "as on the hub", "affine", "embedding not quantized"],
)
def test_quantized_weights_follow_the_config(quantization, share):
    full = memory_estimate.Request(CONFIG, fine_tune_type="lora", num_layers=1)
    less = replace(full, config=CONFIG | quantization)
    sizes = [memory_estimate.bytes_of(request.build().parameters()) for request in (full, less)]
    # 4.25 bits of 32 (mxfp4) or 5 (with float32 scales), and 0.027 for adapters and norms.
    assert sizes[1] / sizes[0] == pytest.approx(share, rel=0.02)
    assert not any("--quantize" in name for name, _ in fits.changes(less))


def test_model_with_fewer_layers_than_the_default_is_trained_whole():
    assert memory_estimate.Request(CONFIG).trained_layers == 6
    assert memory_estimate.Request(CONFIG | {"num_hidden_layers": 20}).trained_layers == 16


def test_length_that_might_not_fit_is_not_measured(monkeypatch):
    request = memory_estimate.Request(CONFIG, batch_size=2, max_seq_length=512)
    monkeypatch.setattr(memory_estimate, "_halvings", lambda *_: 0)
    shortest = memory_estimate.measure_steps(request, 1, [128])[0]
    monkeypatch.setattr(memory_estimate, "available_bytes", lambda: 3 * shortest)
    found = memory_estimate.estimate(request)
    assert list(found.lengths) == [128]
    assert found.step > 3.9 * found.steps[0]  # in proportion to the length


def test_longest_sequence_fits_and_the_next_one_does_not():
    found = estimate_training_memory(CONFIG, batch_size=2, max_seq_length=512)
    limit = found.peak * 2
    longest = found.longest_sequence(limit)
    request = replace(found.request, max_seq_length=longest)
    assert memory_estimate.estimate(request, (1,)).peak <= 1.1 * limit
    request = replace(request, max_seq_length=round(1.3 * longest))
    assert memory_estimate.estimate(request, (1,)).peak > limit


def test_estimate_from_half_the_width_is_close(monkeypatch):
    exact = estimate_training_memory(CONFIG, num_layers=-1, **QUICK)
    monkeypatch.setattr(memory_estimate, "_halvings", lambda *_: 1)
    scaled = estimate_training_memory(CONFIG, num_layers=-1, **QUICK)
    assert "1/2 of width" in scaled.measured
    assert scaled.weights == exact.weights
    # Halving the width halves the rows of the embedding but not LoRA's rank.
    assert scaled.step == pytest.approx(exact.step, rel=0.2)


def test_models_that_need_more_than_two_layers_are_measured():
    # Gemma 3 reads the cache of its sixth layer.
    config = CONFIG | {"model_type": "gemma3_text", "head_dim": 16, "sliding_window_pattern": 3}
    found = estimate_training_memory(config, **QUICK)
    assert found.measured.startswith(("3 and 6 layers", "1 and 2 layers"))


GEMMA = CONFIG | {"model_type": "gemma3_text", "head_dim": 16, "sliding_window_pattern": 3}
IN_PARTS = {"model_type": "gemma3", "text_config": GEMMA, "vocab_size": CONFIG["vocab_size"]}
"""A model with images keeps what describes its text model in a part of its config."""


@pytest.mark.parametrize("halvings", [0, 1])
def test_model_with_a_text_config_needs_as_much_as_its_text_model(halvings, monkeypatch):
    monkeypatch.setattr(memory_estimate, "_halvings", lambda *_: halvings)
    alone, in_parts = (
        estimate_training_memory(config, num_layers=-1, **QUICK) for config in (GEMMA, IN_PARTS)
    )
    assert in_parts.request.weight_dtype == mx.float32
    assert in_parts.measured == alone.measured
    assert in_parts.weights == alone.weights
    # Equal models: a peak varies a little from run to run.
    assert in_parts.step == pytest.approx(alone.step, rel=0.15)
    assert IN_PARTS["text_config"] == GEMMA


def test_model_with_another_number_of_layers_is_refused():
    text = {name: x for name, x in GEMMA.items() if name != "num_hidden_layers"}
    request = memory_estimate.Request(IN_PARTS | {"text_config": text, "num_hidden_layers": 8})
    with pytest.raises(ValueError, match="num_hidden_layers is 1, but the model has 26 layers"):
        request.build(1)


def test_optimizer_asked_for_is_in_the_table_whatever_it_is(folder, capsys):
    arguments = ["--batch-size", "1", "--max-seq-length", "32", "--grad-accumulation-steps", "2"]
    assert main(["fits", str(folder), "--optimizer", "ADAM", *arguments]) == 0
    out = capsys.readouterr().out
    assert "\nadam " in out
    assert "2 batches an update" in out


def test_fits_command_prints_parts_macs_and_suggestions(folder, capsys):
    arguments = ["fits", str(folder), "--max-seq-length", "128"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    for text in ("weights", "optimizer state", "mlx_adamw", "8 GB", "fits: ", "1 and 2 layers"):
        assert text in out
    assert main([*arguments, "--memory", "0.01"]) == 1
    out = capsys.readouterr().out
    assert "does not fit" in out
    assert "--batch-size 1 --grad-accumulation-steps 4: " in out


def test_mlx_lm_yaml_file_is_read(folder, tmp_path):
    path = tmp_path / "lora.yaml"
    path.write_text(f"model: {folder}\nfine_tune_type: full\nnum_layers: 2\noptimizer: muon\n")
    request, title = fits.request_of({"config": str(path), "batch_size": 1})
    assert (request.fine_tune_type, request.optimizer, request.batch_size) == ("full", "muon", 1)
    assert "full in 2 of 6 layers" in title


@pytest.mark.parametrize(
    ("quantize", "bits"), [("true", 4), ("false", None), ("null", None), ("8", 8)]
)
def test_quantize_in_a_file_means_four_bits_as_in_lora(quantize, bits, folder, tmp_path):
    path = tmp_path / "lora.yaml"
    path.write_text(f"model: {folder}\nquantize: {quantize}\n")
    assert fits.request_of({"config": str(path)})[0].bits == bits


@pytest.mark.parametrize(("memory_gb", "share"), [(16, 2 / 3), (32, 2 / 3), (36, 3 / 4)])
def test_metal_may_use_a_share_of_the_memory(memory_gb, share):
    assert fits.usable_bytes(memory_gb) == pytest.approx(memory_gb * 2**30 * share)


def test_a_longer_sequence_never_needs_less():
    # Peaks vary a little, and a quadratic through these three would fall from 400 on.
    lengths, steps = [64, 128, 256], [100, 160, 200]
    longer = memory_estimate._at_lengths(lengths, steps, np.arange(256, 4096, 32))
    assert np.all(np.diff(longer) > 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a model"),
        (["nowhere"], "there is no nowhere/config.json"),
        (["{folder}/broken"], "Expecting property name"),
        (["{folder}/empty"], "must map names to values, with model_type among them"),
        (["{folder}/unknown"], "Model type nonesuch not supported"),
        (["{folder}/short"], "num_hidden_layers is missing"),
        (["{folder}", "--optimizer", "mouon"], "got 'mouon'"),
        (["{folder}", "--option", "speed=9"], "speed"),
        (["{folder}", "--batch-size", "0"], "must be at least 1, got 0"),
        (["{folder}", "--memory", "-1"], "memory must be a number above 0, got -1"),
        (["{folder}", "--memory", "nan"], "memory must be a number above 0, got nan"),
        (["{folder}", "--quantize", "1"], "quantize must be"),
        (["{folder}", "--num-layers", "7"], "num_layers is 7, but the model has 6 layers"),
        (["{folder}", "--optimizer", "sgd", "--option", "speed=9"], "speed"),
    ],
    ids=str,
)
def test_wrong_input_gives_one_line_and_status_2(arguments, message, folder, capsys):
    contents = {"broken": "{model: 1}", "empty": "{}", "short": '{"model_type": "llama"}'}
    contents["unknown"] = json.dumps({**CONFIG, "model_type": "nonesuch"})
    for name, text in contents.items():
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "config.json").write_text(text)
    with pytest.raises(SystemExit) as stopped:
        main(["fits", *(argument.format(folder=folder) for argument in arguments)])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
