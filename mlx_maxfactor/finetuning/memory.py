"""Estimate the memory of a training step before anything is allocated."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._validate import check_choice, check_flag, check_integer

if TYPE_CHECKING:
    from .memory_estimate import MemoryEstimate


def estimate_training_memory(
    model: str | Path | Mapping[str, Any],
    optimizer: str = "orthomaxfactor",
    *,
    fine_tune_type: str = "lora",
    num_layers: int | None = None,
    lora_parameters: Mapping[str, Any] | None = None,
    batch_size: int = 4,
    max_seq_length: int = 2048,
    grad_checkpoint: bool = False,
    grad_accumulation_steps: int = 1,
    dtype: str | None = None,
    bits: int | None = None,
    **options: Any,
) -> "MemoryEstimate":
    """Estimate the peak memory of fine-tuning a model with ``mlx-maxfactor lora``.

    Nothing of the model's size is allocated: weights and state follow from shapes, the rest is
    measured with a few layers of each kind, on this device, for which the estimate holds. Steps
    whose gradients are not finite are skipped, which needs memory; ``skip_nonfinite=False``
    estimates a step without it. ``mx.get_peak_memory`` is reset.

    Args:
        model: A folder with a ``config.json``, a name on the hub that is in the local cache, or
            the config itself. Weights are not needed; where they are beside the config, they say
            what is quantized, and in which dtype they are.
        optimizer: One of our names, or "adam", "sgd", "mlx_adamw", "mlx_muon", "mlx_adafactor".
            Default "orthomaxfactor".
        fine_tune_type: "lora", "dora" or "full". Default "lora".
        num_layers: How many of the last layers are trained; -1: all of them. Default: 16, or all
            of fewer.
        lora_parameters: rank, scale, dropout and keys. Default: mlx-lm's, rank 8.
        batch_size: Sequences in a batch. Default 4.
        max_seq_length: Tokens in a sequence. Default 2048.
        grad_checkpoint: Compute each layer's activations again in the backward pass. Default False.
        grad_accumulation_steps: Batches for one update. Default 1.
        dtype: "float32", "bfloat16" or "float16". None: as the weights or the config say, or
            bfloat16.
        bits: Bits of quantized base weights. None: as the weights or the config say.
        **options: Options of the optimizer.

    Returns:
        The estimate: see ``.peak``, its parts, and ``.longest_sequence(limit)``.

    Raises:
        ImportError: mlx-lm is not installed.
        ValueError: An argument out of range, an unknown model, or a model that does not run.

    Example:
        >>> from mlx_maxfactor import estimate_training_memory
        >>> config = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 8,
        ...     "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 64,
        ...     "rms_norm_eps": 1e-5, "num_key_value_heads": 2}
        >>> estimate = estimate_training_memory(
        ...     config, "mlx_adamw", dtype="float32", batch_size=1, max_seq_length=64)
        >>> estimate.weights, estimate.state < estimate.weights < estimate.peak
        (477312, True)
    """
    try:
        from .memory_estimate import Request, estimate
        from .model_config import BITS, DTYPES, read_config
        from .models import FINE_TUNE_TYPES
        from .optimizer_names import optimizer_name
    except ModuleNotFoundError as missing:
        raise ImportError(
            f"estimate_training_memory needs {missing.name}: pip install mlx-lm"
        ) from missing
    config, folder = read_config(model)
    request = Request(
        config,
        optimizer_name(optimizer),
        options,
        check_choice("fine_tune_type", fine_tune_type, FINE_TUNE_TYPES),
        None if num_layers is None else check_integer("num_layers", num_layers, -1),
        lora_parameters,
        check_integer("batch_size", batch_size, 1),
        check_integer("max_seq_length", max_seq_length, 2),
        check_flag("grad_checkpoint", grad_checkpoint),
        check_integer("grad_accumulation_steps", grad_accumulation_steps, 1),
        None if dtype is None else check_choice("dtype", dtype, tuple(DTYPES)),
        None if bits is None else check_choice("bits", bits, BITS),
        folder,
    )
    return estimate(request)
