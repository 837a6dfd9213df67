"""Read a model's folder: its config, and what the config says of quantized weights."""

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from copy import deepcopy
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import _get_classes, load_config, load_model

from .._validate import check_choice, check_integer, shown
from ..engine.trees import flatten
from .models import bits_of, check_layers, main_dtype, prefixing_errors

Config = Mapping[str, Any]
Predicate = Callable[[str, nn.Module], bool | dict[str, Any]]
"""Whether to quantize the module at a path, or how."""

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
WIDTHS = ("hidden_size", "intermediate_size", "moe_intermediate_size", "model_dim", "n_embd")
WIDTHS += ("num_attention_heads", "num_key_value_heads", "num_heads", "n_head")
WIDTHS += ("mamba_n_heads", "mamba_num_heads", "vocab_size")
"""What is halved in a model that does not fit on this device, or takes too long to measure."""

PACKED = ("awq", "bitnet", "compressed-tensors", "gptq", "modelopt")
"""Methods of other programs whose weights mlx-lm keeps quantized. Only the weights say how."""

READABLE = (*PACKED, "fp8", "mxfp4", "mxfp8")
"""Methods of other programs that mlx-lm reads."""


def read_config(model: str | Path | Mapping[str, Any]) -> tuple[dict[str, Any], Path | None]:
    """A model's config, and its folder.

    Args:
        model: The folder, a name on the hub that is in the local cache, or the config itself.

    Returns:
        The config, and the folder, or None where the config was passed.

    Raises:
        ValueError: There is no config, or it lacks the model's type.
    """
    if isinstance(model, Mapping):
        with prefixing_errors("config"):
            return _checked(dict(model)), None
    folder = Path(model)
    if not (folder / "config.json").is_file():
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.utils import HFValidationError

        cached = None
        with suppress(HFValidationError):
            cached = try_to_load_from_cache(str(model), "config.json")
        if not isinstance(cached, str):
            path = folder / "config.json"
            raise ValueError(f"model {model}: there is no {path}, and the hub's cache has none")
        folder = Path(cached).parent
    with prefixing_errors(str(folder / "config.json")):
        return _checked(load_config(folder)), folder


SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
SIZES += ("intermediate_size",)
BITS = (2, 3, 4, 5, 6, 8)
MODES = {"affine": (BITS, (32, 64, 128)), "mxfp4": ((4,), (32,)), "mxfp8": ((8,), (32,))}
MODES |= {"nvfp4": ((4,), (16,))}
"""MLX's modes of quantization, with the bits and group sizes of each."""


def _checked(config: Any) -> dict[str, Any]:
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ValueError("it must map names to values, with model_type among them")
    for key in SIZES:
        if (size := value_of(config, key)) is not None and not isinstance(size, list):
            check_integer(key, size, 1)
    if (ours := config.get("quantization")) is not None:
        _check_quantization("quantization", ours, ("bits", "group_size"))
    elif theirs := value_of(config, "quantization_config"):
        method = theirs.get("quant_method") if isinstance(theirs, dict) else None
        if not isinstance(method, str):
            raise ValueError(f"quantization_config needs quant_method, got {shown(theirs)}")
        if method not in READABLE:
            raise ValueError(
                f"mlx-lm does not read weights of {method}: take those before quantizing"
            )
    return config


def _check_quantization(name: str, given: Any, needed: tuple[str, ...] = ()) -> None:
    """Check what is said of a model, or of one of its modules."""
    if not isinstance(given, dict):
        raise ValueError(f"{name} must map names to values, got {shown(given)}")
    mode = check_choice(f"{name}: mode", given.get("mode", "affine"), tuple(MODES))
    for key, choices in zip(("bits", "group_size"), MODES[mode], strict=True):
        if key in given or key in needed:
            check_choice(f"{name}: {key}", given.get(key), choices)
    for path, x in given.items():
        if "." in path and not isinstance(x, bool):
            _check_quantization(f"{name}: {path}", x)


def base_model(
    config: Config, folder: Path | None, dtype: str | None, bits: int | None, halvings: int = 0
) -> nn.Module:
    """A model of mlx-lm before adapters. No array of it is evaluated.

    Args:
        config: The config.
        folder: Where it lies, perhaps beside weights.
        dtype: Dtype of the weights that are not quantized; None: as the weights or the config say.
        bits: Bits to which it is quantized; None: as the weights or the config say.
        halvings: How often the width is halved.

    Raises:
        ValueError: mlx-lm cannot build it.
    """
    own_code = config.get("model_file")  # mlx-lm asks for it to be trusted
    weights = folder if folder and not own_code and has_weights(folder) else None
    read = None if halvings else weights
    source = "config" if folder is None else str(folder / "config.json")
    with prefixing_errors(f"model {read}" if read else source, read):
        if read:
            model = load_model(read, lazy=True)[0]
            if cast_to := dtype or (bits and converted_dtype(config)):
                model.set_dtype(DTYPES[cast_to])
        else:
            config = narrowed(config, halvings)
            model_class, arguments_class = _get_classes(config)
            model = model_class(arguments_class.from_dict(config))
            if weights:
                _make_like(model, base_model(config, folder, dtype, bits))
            else:
                model.set_dtype(DTYPES[dtype or dtype_of(config)])
                quantize_as_config_says(model, config)
        check_layers(model)
        for path, x in flatten(model.parameters()).items():
            if any(size < 1 for size in x.shape):
                raise ValueError(f"{path} would have the shape {x.shape}")
        if bits and not (halvings and weights):
            if found := bits_of(model):
                raise ValueError(f"it is quantized already (bits: {found}): leave out --quantize")
            quantize(model, convert_predicate(model), bits=bits)
    return model


def _make_like(model: nn.Module, like: nn.Module) -> None:
    """Give a narrow model the dtype and the quantization of the whole one."""
    model.set_dtype(main_dtype(like))
    modes = {
        path: {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
        for path, module in cast(Any, like).named_modules()
        if hasattr(module, "bits") and hasattr(module, "mode")
    }
    quantize(model, lambda path, _: modes.get(path, False), bits=4)


def has_weights(folder: Path) -> bool:
    """Whether all weights lie beside the config, as mlx-lm reads them."""
    index = folder / "model.safetensors.index.json"
    needed: set[str] = set()
    if index.is_file():
        with prefixing_errors(str(index)):
            needed = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    found = {file.name for file in folder.glob("model*.safetensors")}
    return bool(found) and needed <= found


def value_of(config: Config, key: str) -> Any:
    """A value of a config, or of the ``text_config`` in it. None: neither has it."""
    found = config.get(key)
    return _text_config(config).get(key) if found is None else found


def _text_config(config: Config) -> dict[str, Any]:
    """The part of a model with images or sound that describes its text model. Empty: no part."""
    text = config.get("text_config")
    return text if isinstance(text, dict) else {}


def narrowed(config: Config, halvings: int) -> dict[str, Any]:
    """A copy of a config with a halved width, also in its ``text_config``."""
    copied = deepcopy(dict(config))  # mlx-lm writes into text_config
    for part in (copied, _text_config(copied)):
        for key in WIDTHS:
            if halvings and isinstance(part.get(key), int):
                part[key] = max(1, part[key] >> halvings)
    return copied


def dtype_of(config: Config) -> str:
    """The name of the dtype that a config says, or bfloat16."""
    name = value_of(config, "torch_dtype") or value_of(config, "dtype") or "bfloat16"
    name = str(name).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {shown(name)}")
    return name


def converted_dtype(config: Config) -> str | None:
    """The dtype to which ``mlx_lm.convert`` casts a model. None: it leaves it as it is."""
    name = config.get("torch_dtype") or _text_config(config).get("dtype")
    return name if name in DTYPES else None


def quantize_as_config_says(model: nn.Module, config: Config) -> None:
    """Quantize what mlx-lm would find quantized in the weights that belong to a config.

    Raises:
        ValueError: Another program quantized them, and the config alone does not say what.
    """
    as_convert = convert_predicate(model)
    if ours := config.get("quantization"):

        def as_said(path: str, module: nn.Module) -> bool | dict[str, Any]:
            return ours[path] if path in ours else as_convert(path, module)

        quantize(model, as_said, **ours)
        return
    theirs = value_of(config, "quantization_config")
    method = theirs.get("quant_method") if theirs else None
    if method in PACKED:
        raise ValueError(
            f"it is quantized with {method}: download the weights beside it, which say what is "
            "quantized, or leave out quantization_config"
        )
    if method in ("mxfp4", "mxfp8"):
        named = theirs.get("modules_to_not_convert") or []
        if not isinstance(named, list | tuple) or not all(isinstance(name, str) for name in named):
            raise ValueError(f"modules_to_not_convert must be a list of names, got {shown(named)}")
        left_out = [*named, "*lm_head"]

        def chosen(path: str, module: nn.Module) -> bool:
            is_named = any(fnmatchcase(f"{path}.", f"{name}.*") for name in left_out)
            return not (is_named or isinstance(module, nn.Embedding))

        quantize(model, chosen, bits=int(method[-1]), group_size=32, mode=method)


def convert_predicate(model: nn.Module) -> Predicate:
    """What ``mlx_lm.convert`` quantizes: all that it can, unless the model says otherwise."""
    return getattr(model, "quant_predicate", None) or (lambda path, module: True)


def quantize(
    model: nn.Module,
    predicate: Predicate,
    *,
    bits: int,
    group_size: int = 64,
    mode: str = "affine",
    **_: Any,
) -> None:
    """Quantize the modules that a predicate chooses and whose width allows it."""

    def chosen(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if not hasattr(module, "to_quantized"):
            return False
        found = predicate(path, module)
        size = found.get("group_size", group_size) if isinstance(found, dict) else group_size
        return False if cast(Any, module).weight.shape[-1] % size else found

    nn.quantize(model, group_size, bits, mode=mode, class_predicate=chosen)
