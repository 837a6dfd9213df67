"""The table of settings of ``lora`` and ``fits``: what files and the command line may hold."""

import json

import pytest
from command_line import error_of

from mlx_maxfactor.commands.lora_arguments import DEFAULTS
from mlx_maxfactor.commands.settings import SETTINGS, check_settings, read_config

MODEL = ["--model", "x", "--data", "y"]


def test_every_setting_of_lora_is_in_the_table():
    assert not DEFAULTS.keys() - SETTINGS.keys()
    check_settings(DEFAULTS)


WRONG_VALUES = [
    ("mask_prompt: 'false'", "mask_prompt must be True or False, got 'false': leave out the"),
    ("learning_rate: '2e-5'", "learning_rate must be in (0, inf), got '2e-5': leave out"),
    ("learning_rate: .nan", "learning_rate must be in (0, inf), got nan"),
    (f"learning_rate: 1{'0' * 400}", "learning_rate must be in (0, inf), got 1000"),
    ("batch_size: '1'", "batch_size must be a whole number of at least 1, got '1': leave out"),
    ("max_seq_length: .inf", "max_seq_length must be a whole number of at least 2, got inf"),
    ("num_layers: 2.5", "num_layers must be a whole number of at least -1, got 2.5"),
    ("fine_tune_type: LoRA", "fine_tune_type must be one of"),
    ("quantize: 16", "quantize must be one of 2, 3, 4, 5, 6, 8, got 16"),
    ("max_seq_length: 1", "max_seq_length must be a whole number of at least 2, got 1"),
    ("data: ''", "data is empty: name a file or a folder, or leave it out"),
    ("grad_accumulation_steps: 0", "grad_accumulation_steps must be a whole number of at"),
    ("iters: 1e3", "iters must be a whole number of at least 1, got 1000.0"),
    ("iters: 1000000000000", "iters must be a whole number from 1 to 2147483647"),
    ("val_batches: 0", "val_batches must be -1, for all batches, or at least 1, got 0"),
    ("test_batches: -7", "test_batches must be a whole number of at least -1, got -7"),
    ("adapter_path: 10", "adapter_path must be a string, got 10: put it in quotes"),
    ('data: "a\\0b"', "data must not hold a null character"),
    ("clear_cache_threshold: 5 TB", "must be a size such as 7GB or 500MB, got '5 TB'"),
    ("cache_limit: -1", "cache_limit must be a whole number from 0 to"),
    ("optimizer_config: [adam]", "optimizer_config must map names to values, got ['adam']"),
    ("optimizer_config: {adma: {}}", "(did you mean 'adam'?)"),
    ("optimizer_config: {adam: 3}", "optimizer_config: adam must map names to values, got 3"),
    ("lora_parameters: {rank: 0}", "lora_parameters: rank must be a whole number of at least"),
    ("lora_parameters: {alpha: 16}", "alpha / rank: give scale: 16 / 8 for alpha"),
    ("lora_parameters: {lora_alpha: x, rank: 4}", "give scale: 'x' / 4 for lora_alpha"),
    ("lora_parameters: {keys: q_proj}", "keys must be a list of strings, got 'q_proj'"),
    ("lora_parameters: {dropout: 1}", "lora_parameters: dropout must be in [0, 1), got 1"),
    ("lr_schedule: {name: cosine_decay, arguments: [1, 9], warmup: '3'}", "warmup must be a"),
    ("lr_schedule: {name: cosine_decay, arguments: [1, 9], wramup: 3}", "'warmup'?"),
    ("lr_schedule: {name: cosine_decay, arguments: [1, x]}", "arguments[1] must be in [0"),
    ("lr_schedule: {name: linear_schedule, arguments: [1, -1, 9]}", "arguments[1] must be in [0"),
    ("lr_schedule: {name: cosine_decay, arguments: [1]}", "it takes (init"),
    ("lr_schedule: {name: join_schedules, arguments: [1]}", "lr_schedule: name must be one"),
    ("hf_dataset: {name: x}", "hf_dataset: path must be a string, got None"),
    ("option: momentum=0", "option must be a list of strings, got 'momentum=0'"),
    ("- lora", "must map names to values"),
    ("iters: [", "expected the node content"),
    ("iters: \x00", "special characters are not allowed"),
    ("{[1]: 2}", "unhashable key"),
    ("iters: 4\niters: 6\n", "iters is given twice in the mapping at line 1"),
    ("[" * 3000, "maximum recursion depth"),
]


@pytest.mark.parametrize(
    ("text", "message"), WRONG_VALUES, ids=lambda x: x[:40].replace("\x00", "null")
)
def test_wrong_value_in_a_file_is_one_line_with_file_and_name(text, message, tmp_path, capsys):
    path = tmp_path / "lora.yaml"
    path.write_text(text)
    for command in (["lora", *MODEL], ["fits", "x"]):
        error = error_of([*command, "-c", path], capsys)
        assert f"error: {path}" in error
        assert message in error


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "latin.yaml").write_bytes(b"data: caf\xe9")
    for name, message in (("latin.yaml", "utf-8"), ("nowhere", "No such file"), (".", "directory")):
        path = str(tmp_path / name)
        with pytest.raises(ValueError, match=message) as error:
            read_config(path)
        assert str(error.value).startswith(f"{path}: ")


WRONG_OPTIONS = [
    (["--clear-cache-threshold", "GB"], "clear_cache_threshold must be a size such as 7GB"),
    (["--patience", "0"], "patience must be a whole number of at least 1, got 0"),
    (["--adapter-path", ""], "adapter_path is empty, which only --test alone takes"),
    (["--option", "learning_rate=1"], "learning_rate is an argument of its own"),
    (["--option", "m=1", "--option", "m=2"], "--option m is given twice"),
    (["--option", 'hidden="muon"'], "hidden is an argument of its own"),
    (["--option", "momentum=" + "[" * 100_000], "--option takes NAME=VALUE"),
]


@pytest.mark.parametrize(("given", "message"), WRONG_OPTIONS, ids=lambda x: str(x)[:40])
def test_wrong_option_is_one_line(given, message, capsys):
    assert message in error_of(["lora", *MODEL, *given], capsys)


def test_values_get_their_final_form(tmp_path):
    path = tmp_path / "lora.yaml"
    given = {"clear_cache_threshold": "7GB", "cache_limit": "0.5 mb", "quantize": True}
    given |= {"lora_parameters": {"rank": 4}, "optimizer": "OrthoMaxFactor", "seed": None}
    path.write_text(json.dumps(given))
    found = read_config(str(path))
    assert (found["clear_cache_threshold"], found["cache_limit"]) == (7 * 10**9, 500_000)
    assert found["lora_parameters"] == {"rank": 4, "dropout": 0.0, "scale": 20.0}
    assert (found["quantize"], found["optimizer"]) == (4, "orthomaxfactor")
    assert "seed" not in found
