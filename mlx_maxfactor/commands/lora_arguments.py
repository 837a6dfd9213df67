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

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import Any

from mlx_lm.lora import CONFIG_DEFAULTS, build_parser

from ..finetuning.optimizer_names import optimizer_names
from .settings import check_settings, read_config
from .terminal import OneLineParser

DEFAULTS = {
    **CONFIG_DEFAULTS,
    "model": None,
    "data": None,
    "num_layers": None,  # 16, or all of fewer
    "optimizer": "orthomaxfactor",
    "learning_rate": None,
    "option": None,
    "quantize": None,
    "resume": False,
    "allow_changed_data": False,
    "keep_best": False,
    "patience": None,
    "cache_limit": None,
    "trust_remote_code": False,  # mlx-lm 0.31, the last for Python 3.10, does not have it
}
"""mlx-lm's defaults, except for the optimizer. A rate of None is the optimizer's own."""

USAGE = """examples:
  mlx-maxfactor lora --model ./my_model --data ./my_data --iters 600
  mlx-maxfactor lora --config lora.yaml --optimizer muon --resume"""


def parse_arguments(argv: Sequence[str]) -> tuple[OneLineParser, Namespace]:
    """Every argument, checked, and the parser, which reports what is found wrong later."""
    parser = OneLineParser(
        prog="mlx-maxfactor lora",
        usage="mlx-maxfactor lora --model FOLDER --data FOLDER [options]",
        description="Fine-tune with mlx-lm: LoRA, DoRA, QLoRA, or all weights.",
        epilog=USAGE,
        parents=[build_parser()],
        conflict_handler="resolve",
        add_help=False,
    )
    parser.set_defaults(trust_remote_code=None)
    add_optimizer_arguments(parser)
    add = parser.add_argument
    # Sizes are strings here: the table of settings reads them, as in a file.
    add("--clear-cache-threshold", metavar="SIZE", help="empty MLX's cache after a step above it")
    add("--cache-limit", metavar="SIZE", help="the most that MLX's cache may hold, such as 2GB")
    flag = {"action": "store_true", "default": None}
    add("--resume", **flag, help="continue from the checkpoint")
    add("--allow-changed-data", **flag, help="let --resume continue with changed data")
    add("--keep-best", **flag, help="keep the adapters with the lowest validation loss in best/")
    add("--patience", type=int, metavar="N", help="stop after N validations without a lower loss")
    given = check_settings(vars(parser.parse_args(argv)))
    file = read_config(given["config"]) if "config" in given else {}
    if "learning_rate" in given and file.pop("lr_schedule", None):
        print(f"{given['config']}: lr_schedule is not used, because --learning-rate is given")
    elif file.get("lr_schedule") and file.get("learning_rate") is not None:
        print(f"{given['config']}: learning_rate is not used, because lr_schedule is given")
    arguments = Namespace(**{**DEFAULTS, **file, **given})
    check(arguments)
    return parser, arguments


def add_optimizer_arguments(parser: ArgumentParser) -> None:
    """Add ``--optimizer`` and ``--option``."""
    add, known = parser.add_argument, ", ".join(optimizer_names())
    add("--optimizer", metavar="NAME", help=f"one of {known}; default orthomaxfactor")
    values = "option of the optimizer; JSON values"
    add("--option", action="append", metavar="NAME=VALUE", help=values)


def check(arguments: Namespace) -> None:
    """Raise ValueError for arguments that do not go together."""
    given = vars(arguments)
    for name in ("model", "data"):
        if given[name] is None and not (name == "data" and given.get("hf_dataset")):
            raise ValueError(
                f"{name} is missing: give --{name}, a folder or a name on the hub (python "
                "examples/small_llama.py makes a small model and a task to try)"
            )
    if arguments.quantize:
        raise ValueError(
            "quantize is an option of fits: quantize with mlx_lm.convert -q, and give --model what "
            "it wrote"
        )
    tests_only = arguments.test and not arguments.train
    if tests_only and arguments.resume:
        raise ValueError("resume continues a training; --test alone tests the saved adapters")
    if not (arguments.adapter_path or tests_only):
        raise ValueError("adapter_path is empty, which only --test alone takes: name a folder")
    arguments_of_their_own = {"model", "name", "hidden", "learning_rate", "lr_schedule"}
    if taken := arguments_of_their_own & optimizer_options(arguments).keys():
        raise ValueError(f"{taken.pop()} is an argument of its own, and not an option")
    if arguments.iters % arguments.grad_accumulation_steps:
        raise ValueError(
            "iters must be a multiple of grad_accumulation_steps, because mlx-lm drops the rest, "
            f"got {arguments.iters} and {arguments.grad_accumulation_steps}"
        )


def optimizer_options(arguments: Namespace) -> dict[str, Any]:
    """Options of the optimizer: those of ``--option``, and the others of the YAML file."""
    file = (arguments.optimizer_config or {}).get(arguments.optimizer) or {}
    return {**file, **(arguments.option or {})}
