"""The command ``mlx-maxfactor lora``: equal to mlx_lm.lora, interrupted, killed, resumed, fused."""

import io
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import command_line
import mlx.core as mx
import numpy as np
import pytest
import small_llama
import tiny_model
import yaml
from arrays import same as equal
from mlx.utils import tree_map
from mlx_lm import fuse, load
from mlx_lm import lora as mlx_lm_lora
from mlx_lm.convert import convert
from mlx_lm.lora import CONFIG_DEFAULTS
from mlx_lm.models.llama import TransformerBlock
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm.tuner.datasets import CacheDataset, create_dataset, load_dataset
from mlx_lm.tuner.trainer import evaluate, iterate_batches
from mlx_lm.tuner.utils import build_schedule

from mlx_maxfactor.commands import lora, main
from mlx_maxfactor.commands.lora_arguments import parse_arguments
from mlx_maxfactor.commands.terminal import catching_interrupts, plain_output
from mlx_maxfactor.finetuning import data as data_module
from mlx_maxfactor.finetuning import tuning
from mlx_maxfactor.finetuning.data import describe_lengths, load_data, name_of_data
from mlx_maxfactor.finetuning.models import add_adapters
from mlx_maxfactor.finetuning.optimizer_names import make_mlx_optimizer

KILLS = int(os.environ.get("KILLS", "6"))
MAIN = "from mlx_maxfactor.commands import main; raise SystemExit(main())"
COMMAND = (sys.executable, "-c", MAIN)
QUICK = {"batch_size": 2, "num_layers": -1, "max_seq_length": 64, "val_batches": 1}
QUICK |= {"steps_per_report": 2, "save_every": 2, "grad_accumulation_steps": 2}
QUICK |= {"grad_checkpoint": True, "lora_parameters": {"rank": 4, "scale": 20.0, "dropout": 0.1}}

# Forked from a process that has imported mlx-lm: a start takes a moment. A Mac cannot fork so.
processes = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
processes.set_forkserver_preload(["mlx_maxfactor.commands.lora"])


@pytest.fixture(autouse=True)
def _layers_restored(monkeypatch):
    """mlx-lm's gradient checkpointing changes the class of the layers, also for other tests."""
    monkeypatch.setattr(TransformerBlock, "__call__", TransformerBlock.__call__)


def folder_of(home, name, *lines, **parts):
    """A data set of these lines in all three files, or of other lines in some of them."""
    (home / name).mkdir(exist_ok=True)
    for part in ("train", "valid", "test"):
        chosen = parts.get(part, lines)
        encoded = [x if isinstance(x, bytes) else json.dumps(x).encode() for x in chosen]
        (home / name / f"{part}.jsonl").write_bytes(b"\n".join(encoded))
    return home / name


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a model, a data set, and the configuration of a short run."""
    folder = tmp_path_factory.mktemp("finetuning")
    tiny_model.write(folder / "model")
    pairs = [{"prompt": f"def f{i}(x)", "completion": "x" * (i % 7)} for i in range(11)]
    folder_of(folder, "data", *pairs)
    texts = [f"{pair['prompt']}: return {pair['completion']}" for pair in pairs]
    folder_of(folder, "text", *({"text": text} for text in texts))
    configuration = {"model": str(folder / "model"), "data": str(folder / "data"), **QUICK}
    (folder / "short.yaml").write_text(yaml.safe_dump(configuration))
    return folder


SIGNALS = {signal.SIGINT: signal.default_int_handler}
SIGNALS |= dict.fromkeys((signal.SIGTERM, signal.SIGHUP), signal.SIG_DFL)


def program(arguments, output):
    for number, handler in SIGNALS.items():  # tests that run in the background ignore some
        signal.signal(number, handler)
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(main(arguments))


def start(home, name, *arguments):
    """The command in a process of its own."""
    output = home / f"{name}.txt"
    output.write_text("")
    child = processes.Process(target=program, args=(given(home, name, *arguments), str(output)))
    child.start()
    return child, output


def given(home, name, *arguments):
    """The command line of a short run whose adapters go to the folder of that name."""
    folder = home / name if name else ""
    arguments = ("-c", home / "short.yaml", "--adapter-path", folder, *arguments)
    return ["lora", *map(str, arguments)]


def changed(home, name, text):
    """The arguments for the short run with these lines of YAML in its file."""
    path = home / f"{name}.yaml"
    settings = yaml.safe_load((home / "short.yaml").read_text()) | yaml.safe_load(text)
    path.write_text(yaml.safe_dump(settings))
    return "-c", path


def losses_of(home, name):
    return json.loads((home / name / "losses.json").read_text())


def error_of(home, name, *arguments, capsys, code=2):
    """The error of a run, which must be one line."""
    return command_line.error_of(given(home, name, *arguments), capsys, code, alone=False)


def run(home, name, *arguments):
    child, output = start(home, name, *arguments)
    child.join()
    text = output.read_text()
    assert child.exitcode == 0, text
    return text


def arrays(file):
    loaded = mx.load(str(file))
    return {name: np.array(array.flatten().view(mx.uint8)) for name, array in loaded.items()}


def same(home, *names):
    """Whether runs ended with the same weights, optimizer state and random state, bit for bit."""
    files = ("adapters.safetensors", "checkpoint.safetensors")
    return all(equal(*(arrays(home / name / file) for name in names)) for file in files)


LORA = ("--optimizer", "adamw", "--learning-rate", "0.01")
FULL = ("--fine-tune-type", "full", "--optimizer", "muon", "--num-layers", "1")


@pytest.mark.parametrize("kind", [LORA, FULL], ids=["lora", "full"])
def test_a_resumed_run_ends_as_the_uninterrupted_one(home, kind):
    whole, parts = f"whole{len(kind)}", f"parts{len(kind)}"
    run(home, whole, *kind, "--iters", "12")
    run(home, parts, *kind, "--iters", "8")  # five batches an epoch: in the midst of the second
    assert not same(home, whole, parts)
    text = run(home, parts, *kind, "--iters", "12", "--resume")
    assert "8 of 12 iterations are done" in text
    assert "nothing is left to train" not in text
    assert same(home, whole, parts)
    one, other = (losses_of(home, name) for name in (whole, parts))
    losses = [[info["train_loss"] for info in kept["training"]] for kept in (one, other)]
    assert losses[0] == losses[1]
    assert one["final validation loss"] == other["final validation loss"]


def wait_for(condition, child):
    while not condition() and child.is_alive():
        time.sleep(0.005)


@pytest.mark.processes
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_leaves_a_checkpoint_and_says_how_to_resume(name, home):
    number = getattr(signal, name)
    child, output = start(home, name, "--iters", "100000", "--save-every", "50000")
    wait_for(lambda: ", loss " in output.read_text(), child)  # of the first steps
    os.kill(child.pid, number)
    child.join()
    last = output.read_text().strip().splitlines()[-1]
    assert child.exitcode == 128 + number
    assert "--resume" in last
    done = int(last.split(" has ")[1].split()[0])
    assert done > 0
    assert done % 2 == 0, "the trainer held half of a step's gradients"
    if name == "SIGINT":
        run(home, "unstopped", "--iters", str(done))
        assert same(home, name, "unstopped")


@pytest.mark.processes
def test_a_closed_terminal_leaves_a_checkpoint(home):
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    terminal, side = os.openpty()
    checkpoint = home / "closed" / "checkpoint.safetensors"
    command = [*COMMAND, *given(home, "closed", "--iters", "100000")]
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), side)
    child = subprocess.Popen(command, start_new_session=True, **streams)
    signal.signal(signal.SIGHUP, before)
    os.close(side)
    while not checkpoint.exists():
        os.read(terminal, 4096)
    os.close(terminal)  # what is written from now on fails
    child.send_signal(signal.SIGHUP)
    assert child.wait(60) == 128 + signal.SIGHUP
    mx.load(str(checkpoint))


@pytest.mark.processes
def test_run_killed_at_random_moments_resumes_bit_for_bit(home):
    dice, checkpoint = random.Random(0), home / "killed" / "checkpoint.safetensors"
    stamp = lambda: checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0  # noqa: E731
    for i in range(KILLS):
        child, output = start(home, "killed", "--iters", "100000", "--resume")
        before = stamp()
        if i % 2:
            wait_for(lambda before=before: stamp() != before, child)
        time.sleep(dice.uniform(0, 0.1 if i % 2 else 2))
        assert child.is_alive(), output.read_text()
        child.kill()
        child.join()
    start_at = run(home, "killed", "--iters", "2", "--resume")
    done = int(start_at.split(" of 2 iterations are done")[0].split()[-1])
    assert done > KILLS // 2
    run(home, "killed", "--iters", str(done + 2), "--resume")
    run(home, "spared", "--iters", str(done + 2))
    assert same(home, "killed", "spared")


# What it leaves behind


def loss_of(model, tokenizer, data):
    """mlx-lm's own loss on the validation set."""
    settings = SimpleNamespace(data=data, train=True, test=False)
    _, data, _ = load_dataset(settings, tokenizer)
    return evaluate(model, CacheDataset(data), 2, -1, 64)


KINDS = {
    "lora": ("--optimizer", "orthomaxfactor", "--option", "min_rms=0.01"),
    "dora": ("--fine-tune-type", "dora", "--optimizer", "adafactor"),
    "full": ("--fine-tune-type", "full", "--optimizer", "adam", "--learning-rate", "1e-3"),
    "qlora": ("--optimizer", "signsgd", "--learning-rate", "1e-3"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_mlx_lm_loads_and_fuses_what_was_trained(home, kind, monkeypatch):
    data = home / ("text" if kind == "full" else "data")
    every = ("--val-batches", "-1", "--data", data, "--train", "--test")
    base = str(home / "model")
    if kind == "qlora":
        convert(base, base := f"{base}-4bit", quantize=True, q_bits=4)
    printed = run(home, kind, "--model", base, *KINDS[kind], "--iters", "4", *every)
    kept = losses_of(home, kind)
    loss, before = kept["final validation loss"], kept["validation"][0]["val_loss"]
    assert f"before{before:30.3f}" in printed
    assert f"{loss:.3f}" in printed
    assert loss != before
    assert "Test loss" in printed

    model, tokenizer = load(base, adapter_path=str(home / kind))[:2]
    # The order of the batches differs, and with it the rounding of their mean.
    assert loss_of(model, tokenizer, data) == pytest.approx(loss, abs=1e-5)
    fused = str(home / f"{kind}-fused")
    folders = ("--model", base, "--adapter-path", str(home / kind), "--save-path", fused)
    whole = ("--dequantize",) if kind == "qlora" else ()  # in 4 bits again, some of it is lost
    monkeypatch.setattr(sys, "argv", ["mlx_lm.fuse", *folders, *whole])
    fuse.main()
    assert loss_of(load(fused)[0], tokenizer, data) == pytest.approx(loss, abs=1e-4)


# The command line


MLX_LM_FILE = """
# As in mlx-lm's own example.
model: "mlx_model"
train: true
optimizer: adamw
optimizer_config: {adamw: {weight_decay: 0.01, betas: [0.9, 0.98]}}
data: "/path/to/training/data"
seed: 3
num_layers: 2
iters: 1000
learning_rate: 1e-5
resume_adapter_file: null
adapter_path: "adapters"
lora_parameters: {keys: [self_attn.q_proj, self_attn.v_proj], rank: 8, scale: 20.0}
lr_schedule: {name: cosine_decay, warmup: 100, warmup_init: 1e-7, arguments: [1e-5, 1000, 1e-7]}
"""


FEW = ("--model", "x", "--data", "y", "--num-layers", "-1")


def parsed(*arguments):
    return parse_arguments(list(map(str, arguments)))[1]


def adapted(home, arguments):
    """The optimizer that the arguments ask for."""
    model = load(str(home / "model"))[0]
    add_adapters(model, "lora", arguments.num_layers, arguments.lora_parameters)
    return lora.optimizer_of(model, arguments)


def test_yaml_file_of_mlx_lm_is_read_as_it_is(home, capsys):
    path = home / "mlx_lm.yaml"
    path.write_text(MLX_LM_FILE + "speed: 9\n")
    arguments = parsed("-c", path, "--model", home / "model", "--iters", "7")
    assert capsys.readouterr().out.splitlines() == [
        f"{path}: nothing reads speed (did you mean 'seed'?)",
        f"{path}: learning_rate is not used, because lr_schedule is given",
    ]
    assert (arguments.iters, arguments.seed, arguments.adapter_path) == (7, 3, "adapters")
    optimizer = adapted(home, arguments)
    assert {entry.optimizer for entry in optimizer.plan} == {"adamw"}
    assert sum("q_proj" in entry.path for entry in optimizer.plan) == 4
    member = optimizer.optimizers[0]
    assert (list(member.betas), member.weight_decay) == ([0.9, 0.98], 0.01)
    schedule = build_schedule(arguments.lr_schedule)
    for step in (0, 50, 101, 500):
        rate = member._schedulers["learning_rate"](mx.array(step)).item()
        assert rate == pytest.approx(schedule(mx.array(step)).item())


def test_file_with_a_data_set_of_the_hub_needs_no_data_folder(home):
    path = home / "hub.yaml"
    path.write_text("hf_dataset: {path: someone/something, prompt_feature: question}\n")
    arguments = parsed("-c", path, "--model", "x")
    assert (arguments.data, arguments.hf_dataset["path"]) == (None, "someone/something")
    assert name_of_data(arguments) == "hf_dataset"
    with pytest.raises(ValueError, match=r"model is missing.*examples/small_llama\.py"):
        parsed("-c", path)
    path.write_text("hf_dataset: []\n")
    with pytest.raises(ValueError, match="data is missing"):
        parsed("-c", path, "--model", "x")


def test_yaml_file_takes_our_names_and_schedules(home):
    path = home / "ours.yaml"
    path.write_text(
        "optimizer: OrthoMaxFactor\n"
        "optimizer_config: {orthomaxfactor: {momentum: 0.8, state_dtype: int8, rest: adafactor}}\n"
        "lr_schedule: {name: warmup_cosine, arguments: [0.02, 100, 10]}\n"
    )
    optimizer = adapted(home, parsed("-c", path, "--option", "nesterov=true", *FEW))
    member = optimizer.optimizers[0]
    assert (member.momentum, member.nesterov, member.state_dtype) == (0.8, True, "int8")
    assert member._schedulers["learning_rate"](mx.array(10)).item() == pytest.approx(0.02)


ADAM = ("--optimizer", "adam", "--option")
BAD_ARGUMENTS = [
    (["--optimizer", "mouon"], "'mouon'"),
    (["--iters", "5", "--grad-accumulation-steps", "2"], "multiple"),
    (["-c", "{home}/keys.yaml"], "keys.yaml: lr_schedule: a key of warmup_cosine must be one"),
    (["--model", "nowhere/at/all"], "model nowhere/at/all: "),
    (["--model", "{home}/data"], "config.json"),
    (["--data", "{home}/model"], "the training set, train.jsonl, is missing"),
    (["--data", "nowhere/at/all"], "data nowhere/at/all: there is no such folder"),
    (["--data", "{home}/broken"], "line 1: each line must be a JSON object; column 2"),
    (["--data", "{home}/empty"], "the training set, train.jsonl, is missing or empty"),
    (["--data", "{home}/keys"], "line 1, with the names ['question']: Unsupported data format"),
    (["--data", "{home}/numbers"], "train.jsonl, line 1: text must be a string, got nan"),
    (["--model", "{home}/unknown"], "Model type nonesuch not supported"),
    (["--resume-adapter-file", "{home}/old.safetensors"], "lora_a is (64, 3) in the file and"),
    (["--batch-size", "12"], "batch_size is 12, but the training set has 11 lines"),
    (["--num-layers", "3"], "num_layers is 3, but the model has 2 layers"),
    (["--option", "speed=9"], "speed"),
    (["--option", "momentum=fast"], "momentum=fast"),
    (["--option", "momentum=2.0"], "momentum must be in [0, 1), got 2.0"),
    ([*ADAM, "betas=[0.9]"], "adam: betas must be a pair of numbers, got [0.9]"),
    ([*ADAM, "epsilon=1"], "an option of adam must be one of 'betas', 'eps', 'bias_correction'"),
    (["--resume-adapter-file", ""], "resume_adapter_file is empty: name a file"),
    (["--resume-adapter-file", "{home}/data"], "data: there is no such file: give an adapters"),
    (["--adapter-path", "{home}/keys.yaml"], "keys.yaml: no folder can be made there"),
    (["--model", "{home}/cut model"], "cut model: model.safetensors is damaged: download it"),
    (["--model", "{home}/cut tokenizer"], "tokenizer_config.json is damaged: download it"),
    (["--model", "{home}/bits"], "bits/config.json: quantization: bits must be one of"),
    (["-c", "{home}/rank.yaml"], "lora_parameters: rank must be at most 64 here, got 65"),
    (["--adapter-path", "/dev/null"], "/dev/null"),
    (["--resume-adapter-file", "{home}/keys.yaml"], "keys.yaml: "),
    (["--train", "--test", "--data", "{home}/untested"], "test.jsonl, is missing"),
    (["--data", "{home}/data/train.jsonl"], "is a file: give the folder that has"),
    (["--data", "{home}/odd"], "Is a directory"),
    (["--data", "{home}/untested", "--keep-best"], "keep_best and patience need a validation set"),
    (["--data", "{home}/untested", "--patience", "1"], "need a validation set"),
    (["--test", "--resume"], "resume continues a training"),
    (["--test", "--adapter-path", "{home}/nothing"], "nothing: "),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS, ids=str)
def test_bad_arguments_get_one_line_and_status_2(arguments, message, home, monkeypatch, capsys):
    folder_of(home, "broken", b"{prompt: 1}")
    folder_of(home, "empty")
    folder_of(home, "keys", *[{"question": "x"}] * 8)
    folder_of(home, "numbers", *[{"text": float("nan")}] * 8)
    (home / "unknown").mkdir(exist_ok=True)
    config = {**tiny_model.SHAPE, "model_type": "nonesuch"}
    small_llama.write_json(home / "unknown" / "config.json", config)
    mx.save_safetensors(str(home / "unknown" / "model.safetensors"), {"x": mx.zeros(1)})
    layer = "model.layers.0.self_attn.q_proj.lora_a"
    mx.save_safetensors(str(home / "old.safetensors"), {layer: mx.zeros((64, 3))})
    ours = "{name: warmup_cosine, arguments: [0.1, 9], warmup: 3}"
    (home / "keys.yaml").write_text(f"lr_schedule: {ours}")
    folder_of(home, "untested", train=[PAIR] * 8)
    shutil.rmtree(home / "odd", ignore_errors=True)
    (home / "odd" / "train.jsonl").mkdir(parents=True)
    (home / "rank.yaml").write_text("lora_parameters: {rank: 65}")
    for name, size in (("model.safetensors", 2000), ("tokenizer_config.json", 50)):
        folder = home / f"cut {name.partition('_')[0].partition('.')[0]}"
        shutil.copytree(home / "model", folder, dirs_exist_ok=True)
        (folder / name).write_bytes((home / "model" / name).read_bytes()[:size])
    (home / "bits").mkdir(exist_ok=True)
    small_llama.write_json(home / "bits" / "config.json", {**tiny_model.SHAPE, "quantization": {}})
    arguments = [argument.format(home=home) for argument in arguments]
    few = ["--model", str(home / "model"), "--data", str(home / "data"), "--batch-size", "2"]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    given = ["lora", *few, "--num-layers", "-1", *arguments]
    assert message in command_line.error_of(given, capsys)


@pytest.mark.compiled
@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_losses_equal_those_of_mlx_lm_to_the_printed_digit(home, name, kind, monkeypatch):
    # 50 iterations are ten epochs of five batches, with a validation of two batches at every 20th.
    settings = {key: QUICK[key] for key in ("batch_size", "lora_parameters")}
    settings |= {"model": str(home / "model"), "data": str(home / "data"), "fine_tune_type": kind}
    settings |= {"num_layers": 1, "iters": 50, "learning_rate": 1e-3, "seed": 7}
    settings |= {"steps_per_report": 5, "steps_per_eval": 20, "val_batches": 2}
    theirs = {"training": [], "validation": []}

    class Recorder(TrainingCallback):
        def on_train_loss_report(self, train_info):
            theirs["training"].append(train_info["train_loss"])

        def on_val_loss_report(self, val_info):
            theirs["validation"].append(val_info["val_loss"])

    monkeypatch.setattr(mlx_lm_lora, "get_reporting_callbacks", lambda *_, **__: Recorder())
    folder = str(home / f"theirs_{name}_{kind}")
    arguments = {**CONFIG_DEFAULTS, **settings, "optimizer": name, "train": True}
    mlx_lm_lora.run(SimpleNamespace(**{**arguments, "adapter_path": folder}))

    ours = {**settings, "optimizer": f"mlx_{name}" if name == "adamw" else name}
    path = home / f"{name}_{kind}.yaml"
    path.write_text(yaml.safe_dump({**ours, "adapter_path": str(home / f"ours_{name}_{kind}")}))
    assert main(["lora", "-c", str(path)]) == 0
    kept = json.loads((home / f"ours_{name}_{kind}" / "losses.json").read_text())
    for key, field in (("training", "train_loss"), ("validation", "val_loss")):
        printed = [f"{info[field]:.3f}" for info in kept[key]]
        assert printed == [f"{loss:.3f}" for loss in theirs[key]]
    assert len(theirs["training"]) == 10
    assert len(theirs["validation"]) == 4


def test_run_reports_what_it_replaces_or_that_it_is_done(home):
    assert "replaced" not in run(home, "twice", "--iters", "4")
    done = run(home, "twice", "--iters", "4", "--resume")
    assert "nothing is left to train: iters is 4, 4 are done" in done
    assert "is replaced by this run; --resume" in run(home, "twice", "--iters", "2")


def test_adapters_that_a_killed_run_left_behind_are_written_again(home):
    run(home, "behind", *LORA, "--iters", "4")
    file = home / "behind" / "adapters.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-9])  # as if it was killed after the checkpoint was written
    assert "nothing is left to train" in run(home, "behind", *LORA, "--iters", "4", "--resume")
    assert file.read_bytes() == whole


def test_adapters_are_replaced_at_once(home, monkeypatch):
    assert main(given(home, "at_once", *LORA, "--iters", "2")) == 0
    file = home / "at_once" / "adapters.safetensors"
    before, write, written = file.read_bytes(), mx.save_safetensors, []

    def watched(path, *arguments):
        write(path, *arguments)
        written.append(Path(path).name)
        if len(written) == 2:  # the first one is the checkpoint
            assert file.read_bytes() == before

    monkeypatch.setattr(mx, "save_safetensors", watched)
    assert main(given(home, "at_once", *LORA, "--iters", "4")) == 0
    assert "adapters.safetensors" not in written
    assert file.read_bytes() != before
    assert not [path for path in file.parent.iterdir() if "partial" in path.name]


OTHER_CONFIGURATIONS = [
    (("--batch-size", "3"), "batch_size is 2 in"),
    (("--seed", "1"), "seed is 0 in"),
    (("--optimizer", "adamw"), "MaxFactor in the file, AdamW here"),
    (("--model", "{home}/other"), "the frozen weights are not those"),
]


@pytest.mark.parametrize(("other", "message"), OTHER_CONFIGURATIONS)
def test_resume_refuses_another_configuration(other, message, home, capsys):
    if not (home / "first").exists():
        run(home, "first", "--iters", "2")
        tiny_model.write(home / "other", seed=5)
    other = [argument.format(home=home) for argument in other]
    assert message in error_of(home, "first", "--resume", "--iters", "4", *other, capsys=capsys)


@pytest.mark.parametrize(("again", "rate"), [((), 0.001), (("--learning-rate", "0.002"), 0.002)])
def test_given_rate_is_used_on_resume_with_mlx_optimizers_too(again, rate, home):
    name, adamw = f"rate {rate}", ("--optimizer", "mlx_adamw")
    run(home, name, *adamw, "--iters", "2", "--learning-rate", "0.001")
    run(home, name, *adamw, "--iters", "4", "--resume", *again)
    assert losses_of(home, name)["training"][-1]["learning_rate"] == pytest.approx(rate)


SCHEDULED = "lr_schedule: {name: cosine_decay, arguments: [0.001, 10]}\n"


def test_a_rate_that_is_given_replaces_the_schedule_of_the_file(home, capsys):
    arguments = parsed(*changed(home, "both", SCHEDULED), *FEW, "--learning-rate", "0.01")
    assert (arguments.learning_rate, arguments.lr_schedule) == (0.01, None)
    assert "lr_schedule is not used, because --learning-rate is" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["adamw", "mlx_adamw"])
@pytest.mark.parametrize("other", ["optimizer", "schedule", "weights alone"])
def test_resume_proposes_what_the_command_can_do(name, other, home, capsys):
    run_name, more = f"remedy {name} {other}", ()
    assert main(given(home, run_name, "--optimizer", name, "--iters", "2")) == 0
    if other == "schedule":
        more = changed(home, "scheduled", SCHEDULED)
    elif other == "weights alone":
        folder = home / run_name
        (folder / "adapters.safetensors").rename(folder / "checkpoint.safetensors")
    name = "muon" if other == "optimizer" else name
    more = (*more, "--optimizer", name, "--iters", "4", "--resume")
    message = error_of(home, run_name, *more, capsys=capsys)
    assert "start a new run from adapters.safetensors" in message
    assert not re.search("rates=|strict=|cast=|load_weights", message)


@pytest.mark.parametrize("name", ["orthomaxfactor", "mlx_adamw"])
def test_guard_is_turned_off_by_an_option(home, name):
    few = (*FEW, "--optimizer", name)
    assert hasattr(adapted(home, parsed(*few)), "skipped")
    optimizer = adapted(home, parsed(*few, "--option", "skip_nonfinite=false"))
    assert not (hasattr(optimizer, "guard") and optimizer.guard.is_active)
    clipped = ("--option", "skip_nonfinite=false", "--option", "max_grad_norm=1.0")
    assert adapted(home, parsed(*few, *clipped)).guard.max_grad_norm == 1.0


def test_several_ranks_are_refused(home, monkeypatch, capsys):
    class Group:
        def size(self):
            return 2

    monkeypatch.setattr(mx.distributed, "init", Group)
    assert "was started on 2 ranks" in error_of(home, "ranks", capsys=capsys)


def test_adapters_are_tested_without_an_optimizer(home, monkeypatch, capsys):
    run(home, "tested", *LORA, "--iters", "2")
    monkeypatch.setattr(lora, "optimizer_of", lambda *_: pytest.fail("an optimizer was built"))
    before = (home / "tested" / "adapter_config.json").read_text()
    assert main(given(home, "tested", *LORA, "--test")) == 0
    assert "Test loss" in capsys.readouterr().out
    assert (home / "tested" / "adapter_config.json").read_text() == before


def test_checkpoints_are_written_between_reports(home, monkeypatch):
    saved = []
    save = tuning.Tuning.save
    monkeypatch.setattr(
        tuning.Tuning, "save", lambda self: (saved.append(self.iteration), save(self))[1]
    )
    often = ("--steps-per-report", "10", "--save-every", "2", "--iters", "8")
    assert main(given(home, "often", *often)) == 0
    assert saved == [2, 4, 6, 8]


def prompts(*lengths):
    """Prompts of so many words, each with a short completion."""
    return [{"prompt": "def " * n, "completion": "x"} for n in lengths]


def test_batches_without_a_token_to_learn_are_left_out(home):
    data = folder_of(home, "some long", *prompts(*[3] * 6, *[500] * 4))
    masked = ("--mask-prompt", "--data", data, "--iters", "12", "--train", "--test")
    text = run(home, "some_long", *LORA, *masked)
    assert "nan" not in text
    weights = mx.load(str(home / "some_long" / "adapters.safetensors"))
    assert all(mx.all(mx.isfinite(array)).item() for array in weights.values())
    assert all(info["train_loss"] > 0 for info in losses_of(home, "some_long")["training"])


def test_data_set_without_tokens_to_learn_is_one_error(home, capsys):
    data = folder_of(home, "all long", *prompts(*[500] * 4))
    error = error_of(home, "all_long", *LORA, "--mask-prompt", "--data", data, capsys=capsys)
    only = "no token to learn: within max_seq_length=64 there are only prompts, which mask_prompt"
    assert f"the training set has {only} leaves out; raise max_seq_length" in error


def test_weights_that_are_not_finite_are_never_saved(home, monkeypatch, capsys):
    run(home, "overflow", *LORA, "--iters", "4")
    checkpoint = home / "overflow" / "checkpoint.safetensors"
    good = arrays(checkpoint)

    def broken(model, *_, training_callback, **others):
        model.update(tree_map(lambda p: p / 0, model.trainable_parameters()))
        training_callback.iteration = 6
        training_callback.save()

    monkeypatch.setattr(tuning, "train", broken)
    arguments = (*LORA, "--resume", "--iters", "12")
    message = error_of(home, "overflow", *arguments, capsys=capsys, code=1)
    assert re.search("after iteration 6 .*lora_[ab] holds an inf or a NaN: .*overflow/", message)
    assert "checkpoint.safetensors keeps 4 iterations" in message
    assert equal(arrays(checkpoint), good)


def test_iterations_with_nan_gradients_are_skipped_and_counted(home, monkeypatch, capsys):
    train = tuning.train

    def spoiled(model, optimizer, *arguments, **others):
        update = type(optimizer).update

        def poisoned(self, model, gradients):
            update(self, model, tree_map(lambda g: g * float("nan"), gradients))

        monkeypatch.setattr(type(optimizer), "update", poisoned)
        return train(model, optimizer, *arguments, **others)

    monkeypatch.setattr(tuning, "train", spoiled)
    assert main(given(home, "bad", *LORA, "--iters", "8")) == 0
    assert "4 iterations were skipped: their gradients were not finite" in capsys.readouterr().out
    message = error_of(home, "bad", *LORA, "--iters", "80", capsys=capsys, code=1)
    assert "steps in a row were skipped" in message


def test_ctrl_c_while_the_progress_bar_is_written_still_ends_after_the_step():
    def note():  # as Python raises it when a signal interrupts a write to the same stream
        raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stderr>'>")

    with catching_interrupts(note) as caught:
        signal.raise_signal(signal.SIGINT)
    assert len(caught) == 1


# Other people's data


TEXT, PAIR = {"text": "def f(x)"}, {"prompt": "def f(x)", "completion": "x"}
ASKED, ANSWER = {"role": "user", "content": "f"}, {"role": "assistant", "content": "x"}
CHAT = {"messages": [ASKED, ANSWER]}
WRONG_LINES = {
    "no text": (TEXT, {"text": ""}, "text is empty: remove the line"),
    "null": (TEXT, {"text": None}, "text is null"),
    "number": (TEXT, {"text": 3}, "text must be a string, got 3"),
    "no key": (TEXT, {"txt": "x"}, "text is missing"),
    "list": (TEXT, ["x"], "each line must be a JSON object, got ['x']"),
    "latin": (TEXT, b'{"text": "caf\xe9"}', "it is not UTF-8"),
    "cut": (TEXT, b'{"text": "a', "column 10: Unterminated string"),
    "deep": (TEXT, b'{"text": ' + b"[" * 100_000, "maximum recursion depth"),
    "surrogate": (TEXT, {"text": "\ud800"}, r"'\ud800' is half of a character: remove it"),
    "no completion": (PAIR, {"prompt": "x"}, "completion is missing"),
    "prompts": (PAIR, {**PAIR, "prompt": ["a"]}, "prompt must be a string"),
    "content": (CHAT, {"messages": [{**ASKED, "content": 5}]}, "content must be a string"),
    "no messages": (CHAT, {"messages": []}, "messages must be a list of messages, got []"),
    "message": (CHAT, {"messages": ["x"]}, "messages[0] must have a role, got 'x'"),
    "no content": (CHAT, {"messages": [{"role": "user"}]}, "messages[0] has no content"),
    "no role": (CHAT, {"messages": [{"role": None, "content": ""}]}, "must have a role"),
}


@pytest.mark.parametrize("part", ["train", "valid", "test"])
@pytest.mark.parametrize("kind", WRONG_LINES)
def test_a_wrong_line_is_named_before_the_first_step(kind, part, home, capsys):
    right, wrong, message = WRONG_LINES[kind]
    lines = {part: [*[right] * 6, b"", b"  ", wrong, right]}
    data = folder_of(home, f"wrong {kind}", *[right] * 8, **lines)
    error = error_of(home, "wrong", "--data", data, "--train", "--test", capsys=capsys)
    assert f"{part}.jsonl, line 9: " in error
    assert message in error
    assert str(data) in error


def test_blank_lines_and_byte_order_marks_are_read_over(home):
    marked = b"\xef\xbb\xbf" + json.dumps(TEXT).encode()
    data = folder_of(home, "blank", marked, b"", TEXT, b"\r", TEXT, marked, b"")
    tokenizer = load(str(home / "model"))[1]
    arguments = SimpleNamespace(data=str(data), train=True, test=False, batch_size=2)
    assert len(load_data(arguments, tokenizer)["training"]) == 4


def with_template(home, name, template):
    """The model with another chat template."""
    shutil.copytree(home / "model", home / name)
    path = home / name / "tokenizer_config.json"
    small_llama.write_json(path, json.loads(path.read_text()) | {"chat_template": template})
    return home / name


RAISING = "{% if 'f5' in messages[0]['content'] %}{{ raise_exception('no tools') }}{% endif %}"
TEMPLATES = {
    RAISING + small_llama.TEMPLATE: "train.jsonl, line 6: the chat template of the model: no tools",
    **dict.fromkeys(("{% if %}", "{{ 1 / 0 }}", "{{ messages.x.y }}"), "the model: "),
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_chat_template_that_refuses_a_line_or_is_wrong_is_named(template, home, capsys):
    model = with_template(home, f"wrong {len(template)}", template)
    error = error_of(home, "wrong", "--model", model, capsys=capsys)
    assert TEMPLATES[template] in error
    assert "train.jsonl, line " in error
    assert "the chat template of the model: " in error


def test_chats_of_one_message_are_trained_as_by_mlx_lm(home, capsys):
    data = folder_of(home, "single", *[{"messages": [ANSWER]}] * 6)
    assert main(given(home, "singles", "--data", data, "--iters", "2")) == 0
    error = error_of(home, "singles", "--data", data, "--mask-prompt", capsys=capsys)
    assert "train.jsonl, line 1: mask_prompt needs a chat of at least two messages" in error


def test_repaired_data_are_resumed_on_purpose_alone(home, capsys):
    lines = [{"text": f"def f{i}(x)"} for i in range(9)]
    data = folder_of(home, "repaired", *lines)
    assert main(given(home, "repair", "--data", data, "--iters", "2")) == 0
    folder_of(home, "repaired", *lines, train=[TEXT, *lines])
    error = error_of(home, "repair", "--data", data, "--resume", capsys=capsys)
    assert "the training set is not that of" in error
    assert "continue with it by --allow-changed-data" in error
    allowed = ("--iters", "4", "--resume", "--allow-changed-data")
    assert main(given(home, "repair", "--data", data, *allowed)) == 0
    assert "2 of 4 iterations are done" in capsys.readouterr().out


@pytest.mark.parametrize("changed", ["template", "valid"])
def test_what_changed_between_run_and_resume_is_noticed(changed, home, capsys):
    model = with_template(home, f"before {changed}", small_llama.TEMPLATE)
    data = folder_of(home, f"same {changed}", *[PAIR] * 6)
    chosen = ("--model", model, "--data", data)
    assert main(given(home, changed, *chosen, "--iters", "2")) == 0
    if changed == "template":
        path = model / "tokenizer_config.json"
        path.write_text(path.read_text().replace("<|end|>{% else", "!<|end|>{% else"))
    else:
        folder_of(home, f"same {changed}", *[PAIR] * 6, valid=[PAIR] * 5)
    error = error_of(home, changed, *chosen, "--resume", capsys=capsys)
    assert "validation set is not that of" in error
    assert ("training set is not that of" in error) == (changed == "template")


def test_cut_samples_are_told_before_training(home, capsys):
    lines = [TEXT, {"text": "def f " * 500}] * 6
    data = folder_of(home, "mixed", *lines)
    arguments = ("--data", data, "--iters", "2", "--max-seq-length", "512")
    assert main(given(home, "mixed run", *arguments)) == 0
    told = capsys.readouterr().err.partition("it/s]")[0]
    assert "6 of 12 training samples are longer than max_seq_length=512 and are cut" in told
    assert "6 of 12 validation samples are longer" in told


def test_padding_is_that_of_the_batches_of_mlx_lm():
    sizes = [3, 90, 5, 70, 2, 71, 4, 60]
    data = CacheDataset([{"x": n} for n in sizes])
    data._proc_data = [([1] * n, 0) for n in sizes]
    batches = [tokens for tokens, _ in iterate_batches(data, 2, 80)]
    padded = sum(int(mx.sum(tokens == 0).item()) for tokens in batches)
    share = padded / sum(tokens.size for tokens in batches)
    notes = describe_lengths("training", data, 2, 80)
    assert notes[0].startswith("1 of 8 training samples are longer than max_seq_length=80")
    assert notes[1].startswith(f"{share:.0%} of a batch is padding")
    even = [([1] * 30, 0)] * 8
    assert not describe_lengths("training", even, 2, 80)


# Settings that meet the model


WRONG_RANGES = {
    "adam": ({"eps": -1}, {"betas": [0.9, 1]}),
    "sgd": ({"momentum": 5}, {"momentum": -1}, {"dampening": 7}, {"weight_decay": -3}),
    "mlx_muon": ({"momentum": 1},),
    "mlx_adafactor": ({"decay_rate": 9}, {"beta_1": 5}, {"clip_threshold": 0}, {"eps": [-1, 2]}),
}


@pytest.mark.parametrize("name", WRONG_RANGES)
def test_options_of_mlx_optimizers_have_ranges(name):
    for options in WRONG_RANGES[name]:
        with pytest.raises(ValueError, match=rf"^{name}: {next(iter(options))}.* must be in "):
            make_mlx_optimizer(name, 1e-3, options)
    with pytest.raises(ValueError, match=r"^sgd: Nesterov momentum requires"):
        make_mlx_optimizer("sgd", 1e-3, {"nesterov": True})


def test_small_rate_is_named_as_it_was_given(home):
    with pytest.warns(UserWarning, match="1e-05 is small for LoRA") as told:
        adapted(home, parsed(*FEW, "--learning-rate", "1e-5"))
    assert len(told) == 1
    assert "the default is 0.0002" in str(told[0].message)


def test_schedule_says_that_it_counts_updates(home, capsys):
    more = changed(home, "counted", SCHEDULED)
    assert main(given(home, "counted", *more, "--iters", "4")) == 0
    assert "lr_schedule counts updates: 4 iterations are 2" in capsys.readouterr().err


def test_sizes_reach_mlx_and_the_trainer(home, monkeypatch):
    limits, settings = [], []
    monkeypatch.setattr(mx, "set_cache_limit", limits.append)
    monkeypatch.setattr(tuning, "train", lambda *_, args, **__: settings.append(args))
    sizes = ("--cache-limit", "2GB", "--clear-cache-threshold", "7GB")
    assert main(given(home, "sizes", "--iters", "2", *sizes)) == 0
    assert limits == [2 * 10**9]
    assert settings[0].clear_cache_threshold == 7 * 10**9


def test_empty_adapter_path_tests_the_base_model(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    before = sorted(home.iterdir())
    assert main(given(home, "", "--test")) == 0
    assert re.search(r"Test loss \d", capsys.readouterr().out)
    assert sorted(home.iterdir()) == before


# Disks and terminals


@pytest.mark.parametrize("nth", [1, 2, 3])
def test_full_disk_is_one_line_and_leaves_no_part(nth, home, monkeypatch, capsys):
    write, written = mx.save_safetensors, []

    def full(path, *arguments):
        written.append(path)
        if len(written) == nth:
            Path(path).write_bytes(b"half")
            raise RuntimeError("[write] Unable to write 1024 bytes to file.")
        write(path, *arguments)

    monkeypatch.setattr(mx, "save_safetensors", full)
    error = error_of(home, f"full{nth}", capsys=capsys, code=1)
    assert "safetensors was not written: [write] Unable to write" in error
    left = [path.name for path in (home / f"full{nth}").iterdir()]
    assert not [name for name in left if "partial" in name]


def test_adapters_and_checkpoint_are_written_through_their_links(home):
    folder, other = home / "linked", home / "elsewhere"
    folder.mkdir()
    other.mkdir()
    names = ("adapters.safetensors", "checkpoint.safetensors")
    for name in names:
        (folder / name).symlink_to(other / name)
    run(home, "linked", "--iters", "2", *LORA)
    assert all((folder / name).is_symlink() and (other / name).is_file() for name in names)


def test_terminal_that_lacks_a_character_does_not_end_the_run(home, monkeypatch):
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", output)
    data = folder_of(home, "accents", *[{"text": "é" * 40}] * 6)
    assert main(given(home, "a 10 é", "--data", data, "--iters", "2")) == 0
    printed = output.buffer.getvalue().decode("ascii")
    assert re.search(r"--adapter-path '.*/a 10 \\xe9' --prompt ...\n", printed)
    assert (home / "a 10 é" / "losses.json").exists()


@pytest.mark.processes
def test_output_that_cannot_be_written_is_one_line(home):
    command = [*COMMAND, *given(home, "", "--test")]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].endswith("No space left on device")


def test_progress_that_cannot_be_written_does_not_end_the_run(home, monkeypatch):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stderr", Full())
    assert main(given(home, "unseen", "--iters", "4")) == 0


@pytest.mark.parametrize("kind", ["full", "folder"])
def test_log_that_cannot_be_written_does_not_end_the_run(kind, home):
    log = home / f"log {kind}" / "mlx_lm.log"
    log.parent.mkdir()
    log.mkdir() if kind == "folder" else log.symlink_to("/dev/full")
    assert main(given(home, f"log {kind}", "--iters", "2")) == 0


def test_warnings_are_one_line_without_source():
    with plain_output():
        text = warnings.formatwarning("rates differ", UserWarning, "bin/mlx-maxfactor", 8)
    assert text == "warning: rates differ\n"


def test_signals_that_are_ignored_stay_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as by nohup
    try:
        with catching_interrupts(lambda: None) as caught:
            signal.raise_signal(signal.SIGHUP)
        assert caught == []
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


# The best adapters


def test_best_adapters_are_kept_and_a_run_that_no_longer_improves_stops(home, monkeypatch):
    losses = iter([5.0, 4.0, 3.0, 3.5, 3.25, 9.0])
    monkeypatch.setattr(tuning, "evaluate", lambda *_, **__: next(losses))
    often = ("--iters", "40", "--steps-per-eval", "3", "--save-every", "3")
    arguments = given(home, "best run", *LORA, *often, "--keep-best", "--patience", "2")
    assert main(arguments) == 0
    kept = losses_of(home, "best run")["validation"]
    validated = [(info["iteration"], info["val_loss"]) for info in kept]
    assert validated == [(0, 5.0), (2, 4.0), (5, 3.0), (8, 3.5), (11, 3.25)]
    run(home, "five", "--iters", "4", *LORA)  # two batches an update: 5 iterations make 2 updates
    best = home / "best run" / "best"
    kept, five = (arrays(x / "adapters.safetensors") for x in (best, home / "five"))
    assert equal(kept, five)
    load(str(home / "model"), adapter_path=str(best))
    monkeypatch.setattr(tuning, "train", lambda *_, **__: pytest.fail("it was trained"))
    before = (best / "adapters.safetensors").read_bytes()
    losses = iter([9.0])
    assert main([*arguments, "--resume"]) == 0
    assert (best / "adapters.safetensors").read_bytes() == before


def test_a_run_without_a_validation_set_is_saved_and_resumed(home, capsys):
    data = folder_of(home, "no validation", *[TEXT] * 6)
    (data / "valid.jsonl").unlink()
    arguments = given(home, "not validated", "--data", data)
    assert main([*arguments, "--iters", "2"]) == 0
    assert main([*arguments, "--iters", "4", "--resume"]) == 0
    assert "2 of 4 iterations are done" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_is_an_error(home, capsys):
    rate = ("--optimizer", "mlx_adamw", "--learning-rate", "1e30", "--iters", "4")
    assert "the run has diverged" in error_of(home, "diverged", *rate, capsys=capsys, code=1)


LOST = [
    ("lr_schedule: {name: linear_schedule, arguments: [0, 0, 10]}", "is 0 or grows without bound"),
    ("optimizer_config: {orthomaxfactor: {group: 1}}", r"group must be what mx\.distributed"),
    ("lora_parameters: {keys: [q_proj]}", r"keys \['q_proj'\] match no layer.*self_attn\.q_proj"),
    ("lora_parameters: {keys: [q_prj, self_attn.q_proj]}", "keys 'q_prj' match no layer"),
]


@pytest.mark.parametrize(("text", "message"), LOST)
def test_settings_that_would_be_lost_are_refused(text, message, home, capsys):
    for name in ("orthomaxfactor", "mlx_adamw") if "keys" in text else ("orthomaxfactor",):
        more = (*changed(home, "lost", text), "--optimizer", name)
        assert re.search(message, error_of(home, "lost", *more, capsys=capsys))


@pytest.mark.parametrize("name", tuning.WRITTEN)
def test_a_folder_in_the_place_of_a_file_is_found_before_training(name, home, capsys):
    (home / f"taken {name}" / name).mkdir(parents=True)
    assert f"{name} is a folder" in error_of(home, f"taken {name}", capsys=capsys)


def test_closed_streams_are_no_traceback(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(SystemExit) as end:
        main(["lora", "--iters", "none"])
    assert end.value.code == 2


def test_a_damaged_checkpoint_has_a_remedy_that_exists(home, capsys):
    assert main(given(home, "damaged", "--iters", "2")) == 0
    (home / "damaged" / "checkpoint.safetensors").write_bytes(b"")
    error = error_of(home, "damaged", "--iters", "2", "--resume", capsys=capsys)
    assert "remove it, and start a new run from adapters.safetensors" in error


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no full device")
@pytest.mark.parametrize("name", ["losses.json", "adapter_config.json"])
def test_a_full_disk_names_the_file(name, home, capsys):
    folder = home / f"full {name}"
    folder.mkdir()
    (folder / name).symlink_to("/dev/full")
    assert name in error_of(home, folder.name, "--iters", "2", capsys=capsys, code=1)


def test_sets_of_the_hub_that_are_not_used_are_left_out(home, monkeypatch):
    tokenizer = load(str(home / "model"))[1]
    rows = create_dataset([TEXT] * 4, tokenizer, SimpleNamespace(mask_prompt=False))
    monkeypatch.setattr(data_module, "load_dataset", lambda *_: (rows, rows, rows))
    settings = SimpleNamespace(data="someone/something", train=True, test=False, batch_size=2)
    found = load_data(settings, tokenizer)
    assert [len(found[key]) for key in ("training", "validation", "test")] == [4, 4, 0]
