"""The command line of `finetune_mlx_lm.py`: that of mlx_lm.lora with its YAML files, and ours.

The command line beats the file, and the file the defaults. In a file ``optimizer``,
``optimizer_config`` and ``lr_schedule`` take our names too:

    optimizer: orthomaxfactor
    optimizer_config:
      orthomaxfactor: {momentum: 0.9, state_dtype: int8}
    lr_schedule: {name: warmup_cosine, arguments: [0.001, 300, 30]}

adamw, muon and adafactor are names of both libraries: here they are ours, and mlx's own are called
mlx_adamw, mlx_muon and mlx_adafactor. adam and sgd are mlx's.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.optimizers as mlx_optimizers
import yaml
from mlx.optimizers import Optimizer
from mlx_lm.lora import CONFIG_DEFAULTS, build_parser, yaml_loader
from training import OneLineParser

from mlx_maxfactor import OPTIMIZERS, CheckpointError

# Of mlx_lm.lora's defaults, what differs here. A rate of None is the optimizer's own.
DEFAULTS = {
    **CONFIG_DEFAULTS,
    "model": None,
    "data": None,
    "optimizer": "orthomaxfactor",
    "learning_rate": None,
    "num_layers": -1,
    "iters": 300,
    "save_every": 50,
    "steps_per_eval": 50,
    "adapter_path": None,
    "option": [],
    "quantize": False,
    "resume": False,
}
MLX_OPTIMIZERS: dict[str, type[Optimizer]] = {
    "adam": mlx_optimizers.Adam,
    "sgd": mlx_optimizers.SGD,
    "mlx_adamw": mlx_optimizers.AdamW,
    "mlx_muon": mlx_optimizers.Muon,
    "mlx_adafactor": mlx_optimizers.Adafactor,
}
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
EXAMPLE = "lr_schedule: {name: warmup_cosine, arguments: [0.001, 300, 30]}"
BAD_INPUT = (argparse.ArgumentTypeError, ImportError, KeyError, OSError, RuntimeError, TypeError)
BAD_INPUT += (ValueError, yaml.YAMLError)


def parse_arguments(description: str) -> tuple[OneLineParser, argparse.Namespace]:
    """Every argument, checked; and the parser, which reports what is found wrong later."""
    parser = OneLineParser(
        description=description,
        parents=[build_parser()],
        conflict_handler="resolve",
        add_help=False,
    )
    parser.set_defaults(clear_cache_threshold=None, trust_remote_code=None)
    add = parser.add_argument
    known = ", ".join([*OPTIMIZERS, *MLX_OPTIMIZERS])
    add("--optimizer", metavar="NAME", help=f"one of {known}; default orthomaxfactor")
    add("--option", action="append", metavar="NAME=VALUE", help="of the optimizer; JSON")
    add("--quantize", action="store_true", default=None, help="train on a copy in 4 bits")
    add("--resume", action="store_true", default=None, help="go on from the checkpoint")
    given = {k: v for k, v in vars(parser.parse_args()).items() if v is not None}
    try:
        file = read_config(given["config"]) if "config" in given else {}
        arguments = argparse.Namespace(**{**DEFAULTS, **file, **given})
        check(arguments)
    except BAD_INPUT as problem:
        parser.error(one_line(problem))
    if arguments.adapter_path is None:
        kind = ("q" if arguments.quantize else "") + arguments.fine_tune_type
        arguments.adapter_path = f"runs/finetune/{kind}"
    return parser, arguments


def read_config(path: str) -> dict[str, Any]:
    """A YAML file of mlx_lm.lora. Like it, a key that nothing reads is passed over; it is named."""
    file = yaml.load(Path(path).read_text(encoding="utf-8"), yaml_loader) or {}
    if not isinstance(file, Mapping):
        raise ValueError(f"{path} must map names to values")
    if unread := file.keys() - DEFAULTS.keys() - READ_ELSEWHERE:
        print(f"{path}: nothing reads {', '.join(sorted(map(str, unread)))}")
    return {name: value for name, value in file.items() if value is not None}


def check(arguments: argparse.Namespace) -> None:
    """Raise ValueError for what would fail late or pass for something else."""
    given = vars(arguments)
    for name in COUNTS:
        if type(given[name]) is not int or given[name] < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {given[name]!r}")
    for name, least in (("seed", 0), ("num_layers", -1), ("val_batches", -1)):
        if type(given[name]) is not int or not least <= given[name] < 2**31:
            raise ValueError(f"{name} must be an integer of at least {least}, got {given[name]!r}")
    if arguments.fine_tune_type not in ("lora", "dora", "full"):
        raise ValueError(f"fine_tune_type is lora, dora or full, got {arguments.fine_tune_type!r}")
    if arguments.quantize and arguments.fine_tune_type == "full":
        raise ValueError("quantize goes with lora or dora: quantized weights have no gradient")
    arguments.optimizer = str(arguments.optimizer).lower()
    if arguments.optimizer not in (*OPTIMIZERS, *MLX_OPTIMIZERS):
        known = ", ".join([*OPTIMIZERS, *MLX_OPTIMIZERS])
        raise ValueError(f"optimizer must be one of {known}, got {arguments.optimizer!r}")
    for name in ("optimizer_config", "lora_parameters", "lr_schedule"):
        if not isinstance(given[name], Mapping | None):
            raise ValueError(f"{name} must map names to values, got {given[name]!r}")
    if arguments.lr_schedule and not {"name", "arguments"} <= arguments.lr_schedule.keys():
        raise ValueError(f"lr_schedule takes a name and arguments, as in {EXAMPLE}")
    if arguments.iters % arguments.grad_accumulation_steps:
        raise ValueError(
            f"iters must be a multiple of grad_accumulation_steps, for mlx-lm drops what is left, "
            f"got {arguments.iters} and {arguments.grad_accumulation_steps}"
        )


def one_line(problem: Exception) -> str:
    text = str(problem.args[0] if isinstance(problem, KeyError) else problem)
    return text if isinstance(problem, CheckpointError) else " ".join(text.split())
