"""The settings of ``lora`` and ``fits``: one table of names, types and ranges.

The same table checks the command line and the YAML files of mlx_lm.lora:

    >>> check_settings({"iters": 0}, "lora.yaml")
    Traceback (most recent call last):
        ...
    ValueError: lora.yaml: iters must be a whole number of at least 1, got 0
"""

import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from mlx_lm.lora import CONFIG_DEFAULTS, yaml_loader

from .._validate import check_choice, check_flag, check_integer, check_number, hint, shown
from ..finetuning.model_config import BITS
from ..finetuning.models import FINE_TUNE_TYPES
from ..finetuning.optimizer_names import EXAMPLE, make_schedule, optimizer_name

Check = Callable[[str, Any], Any]
"""Takes a name and a value. Returns the value in its final form, or raises ValueError."""

LARGEST = 2**31 - 1


def whole(name: str, value: Any, low: int) -> int:
    """A whole number that is not below ``low``."""
    number = check_integer(name, value, low)
    return number if number <= LARGEST else check_integer(name, value, low, LARGEST)


def batches(name: str, value: Any) -> int:
    """A number of batches, or -1 for all of them."""
    if value == 0:  # their mean loss would be a NaN
        raise ValueError(f"{name} must be -1, for all batches, or at least 1, got {shown(value)}")
    return whole(name, value, -1)


def text(name: str, value: Any, least: int = 0) -> str:
    """A string. A path cannot hold a null character."""
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a string, got {shown(value)}: put it in quotes")
    if "\0" in value:
        raise ValueError(f"{name} must not hold a null character, got {shown(value)}")
    if len(value) < least:
        raise ValueError(f"{name} is empty: name a file or a folder, or leave it out")
    return value


def texts(name: str, value: Any) -> list[str]:
    """A list of strings."""
    if not isinstance(value, list | tuple):
        raise ValueError(f"{name} must be a list of strings, got {shown(value)}")
    return [text(f"{name}[{i}]", x) for i, x in enumerate(value)]


def options(name: str, value: Any) -> dict[str, Any]:
    """Options of an optimizer: a list of names, each with a value in JSON."""
    found: dict[str, Any] = {}
    for given in texts(name, value):
        key, equals, x = given.partition("=")
        if key in found:
            raise ValueError(f"--option {key} is given twice")
        try:
            found[key] = json.loads(x) if equals else True
        except (ValueError, RecursionError) as problem:
            raise ValueError(
                "--option takes NAME=VALUE with a JSON value (true, not True), got "
                f"{shown(given)} ({problem})"
            ) from None
    return found


def size(name: str, value: Any) -> int:
    """Bytes: a whole number, or a string such as "7GB" or "500 MB"."""
    if isinstance(value, str):
        if found := re.fullmatch(r"(\d{1,15}(?:\.\d{0,15})?)\s*([MG]?)B?", value.strip().upper()):
            return int(float(found[1]) * {"": 1, "M": 10**6, "G": 10**9}[found[2]])
        raise ValueError(f"{name} must be a size such as 7GB or 500MB, got {shown(value)}")
    return check_integer(name, value, 0, 2**62)


def bits(name: str, value: Any) -> int | None:
    """Bits of a quantized model. True means 4."""
    if isinstance(value, bool):
        return 4 if value else None
    return check_choice(name, value, BITS)


def mapping(name: str, value: Any) -> dict[str, Any]:
    """A mapping of strings to values, without those that are null."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{name} must map names to values, got {shown(value)}")
    return {key: x for key, x in value.items() if x is not None}


def lora_parameters(name: str, value: Any) -> dict[str, Any]:
    """mlx-lm's parameters of LoRA, those that are missing with its defaults."""
    given = mapping(name, value)
    for key, x in given.items():
        if key in ("alpha", "lora_alpha"):  # mlx-lm multiplies by scale alone
            rank = given.get("rank", CONFIG_DEFAULTS["lora_parameters"]["rank"])
            scale = f"scale: {shown(x)} / {shown(rank)}"
            raise ValueError(f"{name} takes scale, which is alpha / rank: give {scale} for {key}")
        check_choice(f"a key of {name}", key, tuple(LORA))
    checked = {key: LORA[key](f"{name}: {key}", x) for key, x in given.items()}
    return {**CONFIG_DEFAULTS["lora_parameters"], **checked}


def optimizer_config(name: str, value: Any) -> dict[str, dict[str, Any]]:
    """Options by optimizer."""
    return {
        optimizer_name(key, f"a key of {name}"): mapping(f"{name}: {key}", options)
        for key, options in mapping(name, value).items()
    }


def lr_schedule(name: str, value: Any) -> dict[str, Any]:
    """A schedule that `make_schedule` can make: a name and numbers."""
    given = mapping(name, value)
    if not {"name", "arguments"} <= given.keys():
        raise ValueError(f"{name} takes a name and arguments, as in {EXAMPLE}")
    arguments = given["arguments"]
    if not isinstance(arguments, list) or not arguments:
        raise ValueError(f"{name}: arguments must be a list of numbers, as in {EXAMPLE}")
    for i, x in enumerate(arguments):  # a rate below 0 would ascend
        check_number(f"{name}: arguments[{i}]", x, 0.0)
    checks = {"warmup": partial(whole, low=0), "warmup_init": partial(check_number, low=0.0)}
    checked = {key: checks[key](f"{name}: {key}", x) for key, x in given.items() if key in checks}
    checked = {**given, **checked, "name": text(f"{name}: name", given["name"])}
    make_schedule(**checked)
    return checked


def hf_dataset(name: str, value: Any) -> Any:
    """One data set of the hub, or a list of them."""
    for one in value if isinstance(value, list) else [value]:
        text(f"{name}: path", mapping(name, one).get("path"))
    return value


positive = partial(whole, low=1)
LORA: dict[str, Check] = {
    "rank": positive,
    "scale": partial(check_number, low=0.0, ends="()"),
    "dropout": partial(check_number, low=0.0, high=1.0),
    "keys": texts,
}
SETTINGS: dict[str, Check] = {
    **dict.fromkeys(("model", "data", "resume_adapter_file", "config"), partial(text, least=1)),
    **dict.fromkeys(("adapter_path", "report_to", "project_name"), text),
    **dict.fromkeys(("prompt_feature", "completion_feature"), text),
    **dict.fromkeys(("text_feature", "chat_feature"), text),
    **dict.fromkeys(("train", "test", "mask_prompt", "grad_checkpoint"), check_flag),
    **dict.fromkeys(("resume", "allow_changed_data", "keep_best", "trust_remote_code"), check_flag),
    **dict.fromkeys(("batch_size", "iters", "grad_accumulation_steps"), positive),
    "max_seq_length": partial(whole, low=2),  # a token, and the next one to learn
    **dict.fromkeys(("steps_per_report", "steps_per_eval", "save_every", "patience"), positive),
    **dict.fromkeys(("val_batches", "test_batches"), batches),
    **dict.fromkeys(("cache_limit", "clear_cache_threshold"), size),
    "num_layers": partial(whole, low=-1),
    "seed": partial(check_integer, low=0, high=2**32 - 1),
    "learning_rate": partial(check_number, low=0.0, ends="()"),
    "fine_tune_type": partial(check_choice, choices=FINE_TUNE_TYPES),
    "quantize": bits,
    "optimizer": lambda name, value: optimizer_name(value, name),
    "option": options,
    "optimizer_config": optimizer_config,
    "lora_parameters": lora_parameters,
    "lr_schedule": lr_schedule,
    "hf_dataset": hf_dataset,
}
"""What a file or the command line may set."""


def check_settings(values: Mapping[str, Any], source: str = "") -> dict[str, Any]:
    """Check values by name.

    Args:
        values: Values by name. None means that a name is not set.
        source: Where they were read, for the message. Empty: the command line.

    Returns:
        The values that are set, in their final form: sizes in bytes, names in lower case. Names
        that the table does not have are kept as they are.

    Raises:
        ValueError: One line, with the source, the name, what is allowed and the value.
    """
    checked = {}
    for name, value in values.items():
        check = SETTINGS.get(name, lambda _, x: x)
        if value is None:
            continue
        try:
            checked[name] = check(name, value)
        except ValueError as problem:
            where = f"{source}: " if source else ""
            raise ValueError(f"{where}{problem}{_unquoted(check, name, value)}") from None
    return {name: value for name, value in checked.items() if value is not None}


def _unquoted(check: Check, name: str, value: Any) -> str:
    """A remedy for a string that would be right without its quotes."""
    with suppress(ValueError, yaml.YAMLError):
        bare = yaml.load(value, yaml_loader) if isinstance(value, str) else value
        if not isinstance(bare, str) and bare is not value:
            check(name, bare)
            return ": leave out the quotes"
    return ""


class OnceLoader(yaml_loader):
    """The loader of mlx-lm, which refuses a name that is given twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """A dictionary of a mapping, whose names differ."""
        names = [self.construct_object(name, deep=deep) for name, _ in node.value]
        for name in names:
            if isinstance(name, str) and names.count(name) > 1:
                line = node.start_mark.line + 1
                raise ValueError(f"{name} is given twice in the mapping at line {line}")
        return super().construct_mapping(node, deep=deep)


def read_config(path: str) -> dict[str, Any]:
    """A YAML file of mlx_lm.lora, checked. Names that nothing reads are printed and left out.

    Raises:
        ValueError: The file cannot be read, or a value is wrong.
    """
    try:
        file = yaml.load(Path(path).read_text(encoding="utf-8-sig"), OnceLoader) or {}
    except (OSError, ValueError, RecursionError, TypeError, yaml.YAMLError) as problem:
        raise ValueError(f"{path}: {problem}") from problem
    if not isinstance(file, Mapping):
        raise ValueError(f"{path} must map names to values")
    unread = [f"{name}{hint(str(name), SETTINGS)}" for name in file if name not in SETTINGS]
    if unread:
        print(f"{path}: nothing reads {', '.join(sorted(unread))}")
    return check_settings({name: x for name, x in file.items() if name in SETTINGS}, path)
