"""The command ``mlx-maxfactor fits``: estimates against real peaks, its table, wrong input."""

import json
from dataclasses import replace
from typing import Any, cast

import compare_memory
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from command_line import error_of

from mlx_maxfactor import estimate_training_memory
from mlx_maxfactor.commands import fits, main
from mlx_maxfactor.finetuning import memory_estimate, model_config
from mlx_maxfactor.finetuning.layer_kinds import kinds_of, plan_of
from mlx_maxfactor.finetuning.memory_estimate import Request, bytes_of, estimate, main_dtype

CONFIG = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 192, "vocab_size": 512}
CONFIG |= {"num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2}
CONFIG |= {"rms_norm_eps": 1e-5, "tie_word_embeddings": True, "torch_dtype": "float32"}
QUICK = {"batch_size": 2, "max_seq_length": 128}


def choose_halvings(monkeypatch, halvings):
    def chosen(request, _):
        base = request.base(halvings)
        return halvings, plan_of(base, request.trained_layers, request.grad_checkpoint, True)

    monkeypatch.setattr(memory_estimate, "_halvings", chosen)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


@pytest.mark.compiled
@pytest.mark.examples
@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        ("mlx_adamw", {}),
        ("mlx_adamw", {"dtype": "bfloat16"}),  # adapters are float32
        ("orthomaxfactor", {"fine_tune_type": "full", "grad_checkpoint": True}),
        ("muon", {"fine_tune_type": "full", "grad_accumulation_steps": 2}),
    ],
)
def test_estimate_is_near_a_real_run(optimizer, options):
    config = CONFIG | {"hidden_size": 384, "intermediate_size": 1056}
    sizes = {"num_layers": -1, "batch_size": 2, "max_seq_length": 256, "dtype": "float32"}
    request = Request(config, optimizer, **sizes | options)
    real = compare_memory.real_peak(request)
    # Muon 1.2, the default 1.12: the update of the largest matrix weighs more with few layers.
    highest = 1.1 if optimizer == "mlx_adamw" else 1.25
    assert 0.9 * real < estimate(request).peak < highest * real


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


DENSE_FIRST = compare_memory.SHARED | compare_memory.MODELS["deepseek_v3"]
DENSE_FIRST |= {"hidden_size": 128, "num_hidden_layers": 8, "intermediate_size": 320}
DENSE_FIRST |= {"model_type": "deepseek_v3"}


DENSE_LAYERS = [
    ({"first_k_dense_replace": 1}, -1),
    ({"first_k_dense_replace": 3}, -1),
    ({"first_k_dense_replace": 3, "intermediate_size": 2048}, -1),
    ({"first_k_dense_replace": 3, "intermediate_size": 2048}, 4),
]


@pytest.mark.compiled
@pytest.mark.examples
@pytest.mark.parametrize(("change", "trained"), DENSE_LAYERS)
def test_layers_that_differ_are_measured_by_kind(change, trained):
    request = Request(
        DENSE_FIRST | change, num_layers=trained, batch_size=2, max_seq_length=128, dtype="float32"
    )
    dense = change["first_k_dense_replace"]
    assert kinds_of(request.base()) == [list(range(dense)), list(range(dense, 8))]
    real = compare_memory.real_peak(request)
    # Peaks on a CPU vary by a few percent, because MLX allocates ahead.
    assert estimate(request).peak == pytest.approx(real, rel=0.1)


UNLIKE_LLAMA = ["gpt2", "openelm", "mamba2", "gpt_oss", "gemma4_text", "granitemoehybrid"]


@pytest.mark.parametrize("name", [*UNLIKE_LLAMA, "nemotron_h", "lfm2", "hunyuan"])
def test_configs_that_mlx_lm_reads_are_read(name, tmp_path):
    request = next(r for r, model in compare_memory.requests() if model == name)
    small = dict.fromkeys(("hidden_size", "n_embd", "model_dim", "block_dim"), 64)
    small["intermediate_size"] = 96
    small = {key: x for key, x in small.items() if name != "mamba2" or key != "intermediate_size"}
    config = request.config | small | {"time_step_limit": [0.0, {"__float__": "Infinity"}]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    read, folder = model_config.read_config(tmp_path)
    sizes = {"batch_size": 1, "max_seq_length": 8, "folder": folder}
    found = estimate(Request(read, "mlx_adamw", **sizes), (1,))
    assert found.request.layers == 8
    assert " 8 layers" not in found.measured  # a few of each kind ran without the others


def test_model_that_needs_all_its_layers_is_measured_whole(monkeypatch):
    def reach_into_layers(model, inputs, *_):
        h = model.embed_tokens(inputs)
        for layer in model.layers:
            h = h + layer.self_attn(layer.input_layernorm(h))
        return model.norm(h)

    monkeypatch.setattr("mlx_lm.models.llama.LlamaModel.__call__", reach_into_layers)
    found = estimate_training_memory(CONFIG, batch_size=1, max_seq_length=16)
    assert found.measured.startswith("6 layers")


def save(model, config, folder):
    folder.mkdir(exist_ok=True)
    model.save_weights(str(folder / "model.safetensors"))
    (folder / "config.json").write_text(json.dumps(config))
    return Request(config, folder=folder)


@pytest.mark.parametrize(("said", "dtype"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_weights_beside_the_config_say_their_dtype(said, dtype, tmp_path):
    model = Request(CONFIG, dtype=dtype).base()
    request = save(model, CONFIG | {"torch_dtype": said}, tmp_path)
    assert bytes_of(request.base().parameters()) == bytes_of(model)
    assert main_dtype(request.base(1)) == model_config.DTYPES[dtype]
    # mlx_lm.convert casts to what the config says before it quantizes.
    converted = replace(request, bits=4).base()
    assert main_dtype(converted) == model_config.DTYPES[said]


def test_weights_beside_the_config_say_what_is_quantized(tmp_path):
    model = Request(CONFIG).base()
    modes = {"self_attn": {"group_size": 32, "bits": 4}, "mlp": {"group_size": 32, "bits": 8}}

    def some(path, module):
        found = [modes[name] for name in modes if name in path]
        return found[0] if found and hasattr(module, "to_quantized") else False

    nn.quantize(model, class_predicate=some)
    request = save(model, CONFIG | {"quantization": {"group_size": 64, "bits": 4}}, tmp_path)
    for halvings in (0, 1):
        layer: Any = cast(Any, request.base(halvings)).layers[0]
        assert (layer.self_attn.q_proj.bits, layer.mlp.up_proj.bits) == (4, 8)
    assert bytes_of(request.base().parameters()) == bytes_of(model)
    index = json.dumps({"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}})
    (tmp_path / "model.safetensors.index.json").write_text(index)
    alone = Request(request.config)
    incomplete = replace(request)  # an interrupted download: the config decides
    assert bytes_of(incomplete.base()) == bytes_of(alone.base())


GPT_OSS = next(r for r, name in compare_memory.requests() if name == "gpt_oss").config
OTHERS = "model.layers.*.self_attn", "model.layers.*.mlp.router"


OTHER_PROGRAMS = [
    (GPT_OSS, {"quant_method": "mxfp4", "modules_to_not_convert": OTHERS}, ".experts."),
    (CONFIG, {"quant_method": "fp8", "weight_block_size": [128, 128]}, "nothing"),
    (GPT_OSS, {"quant_method": "mxfp8"}, "layers"),
]


@pytest.mark.parametrize(("config", "theirs", "quantized"), OTHER_PROGRAMS)
def test_other_programs_leave_embeddings_and_named_modules_alone(config, theirs, quantized):
    config = config | {"tie_word_embeddings": False, "quantization_config": theirs}
    model = Request(config).base()
    found = [path for path, module in model.named_modules() if hasattr(module, "bits")]
    assert bool(found) == (quantized != "nothing")
    assert all(quantized in path for path in found)
    assert not any("embed" in path or "lm_head" in path for path in found)


def test_guard_and_accumulated_gradients_need_memory():
    # Matrices that are too large to be updated in groups.
    sizes = {"hidden_size": 512, "intermediate_size": 1408}

    def step(**options):
        return estimate_training_memory(
            CONFIG | sizes, fine_tune_type="full", batch_size=1, max_seq_length=32, **options
        ).step

    # Few tokens: most of a step are gradients, which a guard or a sum keeps until the update.
    released = step(skip_nonfinite=False)
    assert step() > 1.5 * released
    assert step(skip_nonfinite=False, grad_accumulation_steps=2) > 1.5 * released


QUANTIZATIONS = [
    ({"quantization": {"group_size": 32, "bits": 4, "mode": "mxfp4"}}, 0.160),
    ({"quantization_config": {"quant_method": "mxfp4"}}, 0.246),
    ({"quantization": {"group_size": 64, "bits": 4}}, 0.183),
    ({"quantization": {"group_size": 64, "bits": 4, "model.embed_tokens": False}}, 0.267),
]


@pytest.mark.parametrize(("quantization", "share"), QUANTIZATIONS)
def test_quantized_weights_follow_the_config(quantization, share):
    full = Request(CONFIG, fine_tune_type="lora", num_layers=1)
    less = replace(full, config=CONFIG | quantization)
    sizes = [bytes_of(request.build().parameters()) for request in (full, less)]
    # 4.25 bits of 32 (mxfp4) or 5 (with float32 scales), and 0.027 for adapters and norms.
    assert sizes[1] / sizes[0] == pytest.approx(share, rel=0.02)
    assert not any("--quantize" in name for name, _ in fits.changes(less))


def test_model_with_fewer_layers_than_the_default_is_trained_whole():
    assert Request(CONFIG).trained_layers == 6
    assert Request(CONFIG | {"num_hidden_layers": 20}).trained_layers == 16


def test_length_that_might_not_fit_is_not_measured(monkeypatch):
    request = Request(CONFIG, batch_size=2, max_seq_length=512)
    choose_halvings(monkeypatch, 0)
    plan = plan_of(request.base(), request.trained_layers, False, True)
    shortest = max(memory_estimate.measure_steps(request, plan, x, [128])[0] for x in plan.kept)
    monkeypatch.setattr(memory_estimate, "available_bytes", lambda: 3 * shortest)
    found = estimate(request)
    assert list(found.lengths) == [128]
    assert found.step > 3.9 * found.steps[0]  # in proportion to the length


def test_slow_device_measures_one_length(monkeypatch):
    monkeypatch.setattr(memory_estimate, "LONGEST", 1e-9)
    config = CONFIG | {"torch_dtype": "bfloat16"}  # a few tokens are measured in it first
    found = estimate_training_memory(config, batch_size=2, max_seq_length=64)
    assert len(found.lengths) == 1
    assert found.step > 0


def test_longest_sequence_fits_and_the_next_one_does_not():
    found = estimate_training_memory(CONFIG, batch_size=2, max_seq_length=512)
    limit = found.peak * 2
    longest = found.longest_sequence(limit)
    request = replace(found.request, max_seq_length=longest)
    assert estimate(request, (1,)).peak <= 1.1 * limit
    request = replace(request, max_seq_length=round(1.3 * longest))
    assert estimate(request, (1,)).peak > limit


def test_estimate_from_half_the_width_is_close(monkeypatch):
    exact = estimate_training_memory(CONFIG, num_layers=-1, **QUICK)
    choose_halvings(monkeypatch, 1)
    scaled = estimate_training_memory(CONFIG, num_layers=-1, **QUICK)
    assert "1/2 of width" in scaled.measured
    assert scaled.weights == exact.weights
    # Halving the width halves the rows of the embedding but not LoRA's rank.
    assert scaled.step == pytest.approx(exact.step, rel=0.2)


GEMMA = CONFIG | {"model_type": "gemma3_text", "head_dim": 16, "sliding_window_pattern": 3}
IN_PARTS = {"model_type": "gemma3", "text_config": GEMMA, "vocab_size": CONFIG["vocab_size"]}
"""A model with images keeps what describes its text model in a part of its config."""


@pytest.mark.parametrize("halvings", [0, 1])
def test_model_with_a_text_config_needs_as_much_as_its_text_model(halvings, monkeypatch):
    choose_halvings(monkeypatch, halvings)
    configs = (GEMMA, IN_PARTS)
    alone, in_parts = (estimate_training_memory(x, num_layers=-1, **QUICK) for x in configs)
    assert main_dtype(in_parts.request.base()) == mx.float32
    assert in_parts.measured == alone.measured
    assert in_parts.weights == alone.weights
    # Equal models: a peak varies a little from run to run.
    assert in_parts.step == pytest.approx(alone.step, rel=0.15)
    assert IN_PARTS["text_config"] == GEMMA


def test_layers_are_those_that_mlx_lm_builds():
    text = {name: x for name, x in GEMMA.items() if name != "num_hidden_layers"}
    beside = IN_PARTS | {"text_config": text, "num_hidden_layers": 8}
    assert Request(beside).layers == 26  # mlx-lm's default for the text model


def test_optimizer_asked_for_is_in_the_table_whatever_it_is(folder, capsys):
    arguments = ["--batch-size", "1", "--max-seq-length", "32", "--grad-accumulation-steps", "2"]
    assert main(["fits", str(folder), "--optimizer", "ADAM", *arguments]) == 0
    out = capsys.readouterr().out
    assert "\nadam " in out
    assert "2 batches an update" in out


def test_answer_parts_macs_and_suggestions_are_printed(folder, capsys):
    arguments = ["fits", str(folder), "--max-seq-length", "128"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    first, *_, last = out.splitlines()
    assert first.startswith(f"{folder.name}, float32, LoRA, 4 x 128 tokens: 0.")
    assert first.endswith(" GB, fits an 8 GB Mac")
    assert f"for {memory_estimate.device_name()}: measured there with" in last
    for text in ("weights", "optimizer state", "mlx_adamw", "8 GB", "fits: ", "2 and 4 layers"):
        assert text in out
    assert main([*arguments, "--quantize", "8", "--memory", "0.01"]) == 1
    out = capsys.readouterr().out
    assert out.startswith(f"{folder.name}, 8 bits, LoRA, 4 x 128 tokens: 0.")
    assert out.splitlines()[0].endswith(" GB, does not fit a 0.01 GB Mac")
    assert "--batch-size 1 --grad-accumulation-steps 4: " in out


def test_mlx_lm_yaml_file_is_read(folder, tmp_path):
    path = tmp_path / "lora.yaml"
    path.write_text(f"model: {folder}\nfine_tune_type: full\nnum_layers: 2\noptimizer: muon\n")
    request, _ = fits.request_of({"config": str(path), "batch_size": 1})
    assert (request.fine_tune_type, request.optimizer, request.batch_size) == ("full", "muon", 1)
    assert fits.training(request) == "llama: 2 of 6 layers trained with muon"


@pytest.mark.parametrize(("quantize", "bits"), [("true", 4), ("false", None), ("8", 8)])
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


WRONG_INPUT = [
    ([], "give a model"),
    (["nowhere"], "there is no nowhere/config.json"),
    (["{folder}/broken"], "Expecting property name"),
    (["{folder}/empty"], "must map names to values, with model_type among them"),
    (["{folder}/unknown"], "Model type nonesuch not supported"),
    (["{folder}/short"], "short/config.json: ModelArgs.__init__() missing"),
    (["{folder}/huge"], "do not fit on this device"),
    (["{folder}/bits", "--quantize", "4"], "it is quantized already (bits: 8): leave out"),
    (["{folder}", "--batch-size", "99999999"], "do not fit on this device"),
    (["{folder}", "--optimizer", "mouon"], "got 'mouon'"),
    (["{folder}", "--option", "speed=9"], "speed"),
    (["{folder}", "--batch-size", "0"], "must be at least 1, got 0"),
    (["{folder}", "--memory", "-1"], "memory must be a number above 0, got -1"),
    (["{folder}", "--quantize", "1"], "quantize must be one of"),
    (["{folder}", "--num-layers", "7"], "num_layers is 7, but the model has 6 layers"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG_INPUT, ids=str)
def test_wrong_input_gives_one_line_and_status_2(arguments, message, folder, capsys):
    contents = {"broken": "{model: 1}", "empty": "{}", "short": '{"model_type": "llama"}'}
    changed = {
        "unknown": {"model_type": "nonesuch"},
        "huge": {"hidden_size": 1 << 22},
        "bits": {"quantization": {"group_size": 32, "bits": 8}},
    }
    contents |= {name: json.dumps(CONFIG | values) for name, values in changed.items()}
    for name, text in contents.items():
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "config.json").write_text(text)
    arguments = [argument.format(folder=folder) for argument in arguments]
    assert message in error_of(["fits", *arguments], capsys)


def mxfp4(**options):
    return {"quantization_config": {"quant_method": "mxfp4"} | options}


def quantized(**changes):
    return {"quantization": {"group_size": 32, "bits": 8} | changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a whole number of at least 1"),
        ({"num_attention_heads": "4"}, "num_attention_heads must be a whole number"),
        ({"quantization": True}, "quantization must map names to values"),
        ({"quantization": {"bits": "4"}}, "quantization: bits must be one of"),
        ({"quantization": {"bits": 4, "group_size": 16}}, "must be one of 32, 64, 128, got 16"),
        (quantized(mode="mxfp4"), "quantization: bits must be one of 4, got 8"),
        (quantized(mode="nvfp4", bits=4), "quantization: group_size must be one of 16, got 32"),
        (quantized(mode="int8"), "quantization: mode must be one of"),
        ({"quantization": {"bits": 4}}, "group_size must be one of 32, 64, 128, got None"),
        (quantized(**{"a.b": {"group_size": 7}}), "a.b: group_size must be one of"),
        (quantized(**{"a.b": 3}), "quantization: a.b must map names to values, got 3"),
        (mxfp4(modules_to_not_convert=3), "must be a list of names, got 3"),
        ({"quantization_config": {"load_in_4bit": True}}, "quantization_config needs quant_method"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "not read weights of bitsand"),
        ({"quantization_config": {"quant_method": "bitnet"}}, "with bitnet: download the weights"),
    ],
)
def test_a_wrong_size_in_a_config_is_named(changes, message, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | changes))
    assert message in error_of(["fits", tmp_path], capsys)
