"""The arguments of ``mlx-maxfactor lora``: those of ``mlx_lm.lora`` with its YAML files, and ours.

The command line has precedence over the file, and the file over the defaults. In a file,
``optimizer``, ``optimizer_config`` and ``lr_schedule`` take our names too:

    optimizer: orthomaxfactor
    optimizer_config:
      orthomaxfactor: {momentum: 0.9, state_dtype: int8}
    lr_schedule: {name: warmup_cosine, arguments: [0.001, 300, 30]}

Both libraries have adamw, muon and adafactor: these names mean ours, and mlx's own are called
mlx_adamw, mlx_muon and mlx_adafactor. adam and sgd are mlx's.
"""

import argparse
import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from mlx_lm.lora import CONFIG_DEFAULTS, build_parser, yaml_loader

from ..checkpoint import CheckpointError
from ..finetuning.models import FINE_TUNE_TYPES
from ..finetuning.optimizer_names import EXAMPLE, optimizer_name, optimizer_names
from .terminal import OneLineParser

DEFAULTS = {
    **CONFIG_DEFAULTS,
    "model": None,
    "data": None,
    "num_layers": None,  # 16, or all of fewer
    "optimizer": "orthomaxfactor",
    "learning_rate": None,
    "option": [],
    "quantize": False,
    "resume": False,
    "trust_remote_code": False,  # mlx-lm 0.31, the last for Python 3.10, does not have it
}
"""mlx-lm's defaults, except for the optimizer. A rate of None is the optimizer's own."""

DEMO = {
    "model": "runs/small_llama",
    "data": "runs/small_task",
    "adapter_path": "runs/small_adapters",
    "num_layers": -1,
    "iters": 300,
    "save_every": 50,
    "steps_per_eval": 50,
}
"""Defaults where neither a model nor data are given."""

COUNTS = (
    "batch_size",
    "iters",
    "steps_per_report",
    "steps_per_eval",
    "save_every",
    "max_seq_length",
    "grad_accumulation_steps",
)
READ_ELSEWHERE = {f"{kind}_feature" for kind in ("prompt", "completion", "text", "chat")} | {
    "hf_dataset"
}
BAD_INPUT = (argparse.ArgumentTypeError, ImportError, KeyError, OSError, RuntimeError, TypeError)
BAD_INPUT += (ValueError, yaml.YAMLError)
USAGE = """examples:
  mlx-maxfactor lora                                    a small model and task, made on the spot
  mlx-maxfactor lora --model ./my_model --data ./my_data --iters 600
  mlx-maxfactor lora --config lora.yaml --optimizer muon --resume"""


def parse_arguments(argv: Sequence[str]) -> tuple[OneLineParser, Namespace]:
    """Every argument, checked, and the parser, which reports what is found wrong later."""
    parser = OneLineParser(
        prog="mlx-maxfactor lora",
        usage="mlx-maxfactor lora [--model FOLDER] [--data FOLDER] [options]",
        description="Fine-tune with mlx-lm: LoRA, DoRA, QLoRA, or all weights.",
        epilog=USAGE,
        parents=[build_parser()],
        conflict_handler="resolve",
        add_help=False,
        raw=True,
    )
    parser.set_defaults(clear_cache_threshold=None, trust_remote_code=None)
    add_optimizer_arguments(parser)
    add = parser.add_argument
    add("--quantize", action="store_true", default=None, help="train on a copy in 4 bits")
    add("--resume", action="store_true", default=None, help="continue from the checkpoint")
    given = {k: v for k, v in vars(parser.parse_args(argv)).items() if v is not None}
    file = read_config(given["config"]) if "config" in given else {}
    known_values = {**file, **given}
    demo = DEMO if not {"model", "data", "hf_dataset"} & known_values.keys() else {}
    arguments = Namespace(**{**DEFAULTS, **demo, **known_values})
    check(arguments)
    return parser, arguments


def add_optimizer_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--optimizer`` and ``--option``."""
    add, known = parser.add_argument, ", ".join(optimizer_names())
    add("--optimizer", metavar="NAME", help=f"one of {known}; default orthomaxfactor")
    values = "option of the optimizer; JSON values"
    add("--option", action="append", metavar="NAME=VALUE", help=values)


def read_config(path: str) -> dict[str, Any]:
    """A YAML file of mlx_lm.lora. Keys that nothing reads are named, and ignored as by mlx-lm."""
    file = yaml.load(Path(path).read_text(encoding="utf-8"), yaml_loader) or {}
    if not isinstance(file, Mapping):
        raise ValueError(f"{path} must map names to values")
    if unread := file.keys() - DEFAULTS.keys() - READ_ELSEWHERE:
        print(f"{path}: nothing reads {', '.join(sorted(map(str, unread)))}")
    return {name: value for name, value in file.items() if value is not None}


def check(arguments: Namespace) -> None:
    """Raise ValueError for what would fail late or be taken for something else."""
    given = vars(arguments)
    for name in COUNTS:
        if type(given[name]) is not int or given[name] < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {given[name]!r}")
    for name, least in (("seed", 0), ("num_layers", -1), ("val_batches", -1)):
        value = given[name]
        if value is None and name == "num_layers":
            continue
        if type(value) is not int or not least <= value < 2**31:
            raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    for name in ("model", "data"):
        if given[name] is None and not (name == "data" and given.get("hf_dataset")):
            raise ValueError(f"{name} is missing: give --{name}, a folder or a name on the hub")
    if arguments.fine_tune_type not in FINE_TUNE_TYPES:
        raise ValueError(f"fine_tune_type is lora, dora or full, got {arguments.fine_tune_type!r}")
    if arguments.quantize and arguments.fine_tune_type == "full":
        raise ValueError("quantize needs lora or dora: quantized weights have no gradient")
    arguments.optimizer = optimizer_name(arguments.optimizer)
    if arguments.test and not arguments.train and arguments.resume:
        raise ValueError("resume continues a training; --test alone tests the saved adapters")
    for name in ("optimizer_config", "lora_parameters", "lr_schedule"):
        if not isinstance(given[name], Mapping | None):
            raise ValueError(f"{name} must map names to values, got {given[name]!r}")
    if arguments.lr_schedule and not {"name", "arguments"} <= arguments.lr_schedule.keys():
        raise ValueError(f"lr_schedule takes a name and arguments, as in {EXAMPLE}")
    arguments.option = dict(map(option, arguments.option))
    if arguments.iters % arguments.grad_accumulation_steps:
        raise ValueError(
            "iters must be a multiple of grad_accumulation_steps, because mlx-lm drops the rest, "
            f"got {arguments.iters} and {arguments.grad_accumulation_steps}"
        )


def option(argument: str) -> tuple[str, Any]:
    """An option of an optimizer: a name, and a value in JSON."""
    name, equals, text = argument.partition("=")
    try:
        return name, json.loads(text) if equals else True
    except ValueError as problem:
        raise argparse.ArgumentTypeError(
            f"--option takes NAME=VALUE with a JSON value (true, not True), got {argument!r} "
            f"({problem})"
        ) from None


def one_line(problem: BaseException) -> str:
    """The message of an exception, in one line."""
    text = str(problem.args[0] if isinstance(problem, KeyError) else problem)
    return text if isinstance(problem, CheckpointError) else " ".join(text.split())
