"""Load models and adapters as ``mlx_lm.lora`` does, with errors that name what is wrong."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm import load
from mlx_lm.lora import CONFIG_DEFAULTS
from mlx_lm.tuner.utils import linear_to_lora_layers

from .._validate import shown
from ..engine.trees import flatten

FINE_TUNE_TYPES = ("lora", "dora", "full")


@contextmanager
def prefixing_errors(what: str, folder: str | Path | None = None) -> Iterator[None]:
    """Put what was read in front of an error message, and name a damaged file of its folder.

    Other people's code may raise anything.
    """
    try:
        yield
    except Exception as problem:
        for file in sorted(Path(folder).glob("*")) if folder else ():
            with prefixing_errors(f"{what}: {file.name} is damaged: download it again"):
                if file.suffix == ".json":
                    json.loads(file.read_text(encoding="utf-8"))
                elif file.suffix == ".safetensors":
                    mx.load(str(file))
        raise ValueError(f"{what}: {str(problem) or type(problem).__name__}") from problem


def load_model(model: str, trust_remote_code: bool = False) -> tuple[nn.Module, Any]:
    """The model and the tokenizer of a folder, or of a name on the hub.

    Args:
        model: The folder or the name.
        trust_remote_code: Let the model's folder run its own code. Default False.

    Raises:
        ValueError: mlx-lm cannot load it.
    """
    # mlx-lm 0.31, the last for Python 3.10, does not have this argument.
    trust: dict[str, Any] = {"trust_remote_code": True} if trust_remote_code else {}
    with prefixing_errors(f"model {model}", model):
        network, tokenizer = load(model, tokenizer_config=trust, **trust)[:2]
        check_layers(network)
    return network, tokenizer


def check_layers(model: nn.Module) -> None:
    """Raise ValueError unless the model has a list of layers."""
    if not getattr(model, "layers", None):
        raise ValueError("it has no list of layers, and mlx-lm trains the last ones")


def number_of_layers(num_layers: int | None, layers: int) -> int:
    """How many layers are trained: -1 means all, None the last 16 or all of fewer.

    Raises:
        ValueError: The model has fewer layers.
    """
    if num_layers is None:
        return min(CONFIG_DEFAULTS["num_layers"], layers)
    if num_layers > layers:
        raise ValueError(f"num_layers is {num_layers}, but the model has {layers} layers (-1: all)")
    return layers if num_layers < 1 else num_layers


def add_adapters(
    model: nn.Module,
    fine_tune_type: str,
    num_layers: int | None,
    lora_parameters: Mapping[str, Any] | None,
    *,
    any_rank: bool = False,
) -> int:
    """Freeze the model, then unfreeze the last layers ("full") or give them adapters.

    Args:
        model: A model of mlx-lm.
        fine_tune_type: "lora", "dora" or "full".
        num_layers: How many of the last layers are trained, see :func:`number_of_layers`.
        lora_parameters: mlx-lm's: rank, scale, dropout and keys. Not used by "full".
        any_rank: Take a rank above the shorter side of every matrix. Default False.

    Returns:
        How many layers are trained.

    Raises:
        ValueError: The model has fewer layers, the keys match none, or the rank is too high.
        KeyError: ``lora_parameters`` lacks a key.
    """
    model.freeze()
    layers: Any = model.layers
    num_layers = number_of_layers(num_layers, len(layers))
    if fine_tune_type == "full":
        for layer in layers[-num_layers:]:
            layer.unfreeze()
        return num_layers
    if fine_tune_type not in FINE_TUNE_TYPES:
        raise ValueError(f"fine_tune_type is lora, dora or full, got {shown(fine_tune_type)}")
    settings = dict(lora_parameters or {})
    every = {name for part in (model, *layers) for name, _ in part.named_modules()}
    unmatched = [key for key in settings.get("keys") or () if key not in every]
    linear_to_lora_layers(model, num_layers, settings, use_dora=fine_tune_type == "dora")
    if not flatten(model.trainable_parameters()):
        modules = layers[-1].named_modules()
        linear = [name for name, layer in modules if hasattr(layer, "weight") and name]
        raise ValueError(
            f"lora_parameters: keys {shown(settings.get('keys'))} match no layer; the last layer "
            f"has {', '.join(sorted(linear))}"
        )
    if unmatched:
        raise ValueError(f"lora_parameters: keys {', '.join(map(shown, unmatched))} match no layer")
    if not any_rank:
        check_rank(model)
    return num_layers


def check_rank(model: nn.Module) -> None:
    """Raise ValueError if the rank is above the shorter side of every matrix that is adapted."""
    rank, sides = 0, [0]
    for module in model.modules():
        if isinstance(a := module.get("lora_a"), mx.array):
            b = module["lora_b"].shape
            # (in, r) and (r, out), or of experts (n, r, in) and (n, out, r)
            (rows, rank), (_, columns) = (a.shape, b) if a.ndim == 2 else (a.shape[:0:-1], b[:0:-1])
            sides.append(min(rows, columns))
    if rank > max(sides):
        raise ValueError(f"lora_parameters: rank must be at most {max(sides)} here, got {rank}")


def load_adapters_into(model: nn.Module, path: str) -> None:
    """Start from trained adapters. Every array of the file must fit the model.

    Raises:
        ValueError: The file cannot be read, or belongs to another model, rank or set of layers.
    """
    with prefixing_errors(f"resume_adapter_file {path}"):
        if not Path(path).is_file():
            raise ValueError("there is no such file: give an adapters.safetensors")
        arrays = cast(dict[str, mx.array], mx.load(path))
    here = flatten(model.parameters())
    odd = [
        f"{name} is {x.shape} in the file and "
        + (f"{here[name].shape} here" if name in here else "not in the model")
        for name, x in arrays.items()
        if name not in here or here[name].shape != x.shape
    ]
    if odd:
        more = f", and {len(odd) - 3} more" if len(odd) > 3 else ""
        raise ValueError(f"{path} does not fit the model: {'; '.join(odd[:3])}{more}")
    model.load_weights(list(arrays.items()), strict=False)


def bytes_of(tree: Any) -> int:
    """Bytes of all arrays of a tree, from their shapes."""
    return sum(array.nbytes for array in flatten(tree).values() if isinstance(array, mx.array))


def bits_of(model: nn.Module) -> int | None:
    """Bits of most of the weights that are quantized. None: no weights are."""
    sizes: Counter[int] = Counter()
    for module in model.modules():
        if (bits := getattr(module, "bits", None)) and hasattr(module, "weight"):
            sizes[bits] += cast(Any, module).weight.size
    return sizes.most_common(1)[0][0] if sizes else None


def main_dtype(model: nn.Module) -> mx.Dtype:
    """The dtype of most weights that are not quantized."""
    sizes: Counter[mx.Dtype] = Counter({mx.float32: 0})
    for x in flatten(model.parameters()).values():
        if mx.issubdtype(x.dtype, mx.floating):
            sizes[x.dtype] += x.size
    return sizes.most_common(1)[0][0]
