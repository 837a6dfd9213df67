"""``mlx-maxfactor fits``: the peak memory of a training step, and which Macs it fits.

Nothing of the model's size is allocated, and no weights are needed; where they lie beside the
config, they say what is quantized. The first line is the answer in one sentence. See
``mlx_maxfactor.estimate_training_memory``, which does the same in a program.
"""

import math
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..finetuning.memory_estimate import MemoryEstimate, Request, available_bytes, estimate
from ..finetuning.model_config import DTYPES, read_config
from ..finetuning.models import FINE_TUNE_TYPES, bits_of, main_dtype
from ..routing import OPTIMIZERS
from ..routing.plan import table
from .lora_arguments import DEFAULTS, add_optimizer_arguments, optimizer_options
from .settings import check_settings
from .settings import read_config as read_yaml
from .terminal import BAD_INPUT, OneLineParser, integer

GB = 1e9
KINDS = {"lora": "LoRA", "dora": "DoRA", "full": "full"}
MACS = (8, 16, 24, 32, 36, 48, 64, 96, 128, 192, 256, 512)  # GiB
AS_IN_LORA = ("optimizer", "fine_tune_type", "num_layers", "batch_size", "max_seq_length")
AS_IN_LORA += ("grad_checkpoint", "grad_accumulation_steps", "dtype")
USAGE = """examples:
  mlx-maxfactor fits ./Qwen2.5-0.5B                      LoRA with mlx-lm's defaults
  mlx-maxfactor fits ./my_model --fine-tune-type full --num-layers -1 --grad-checkpoint
  mlx-maxfactor fits mlx-community/Qwen3-8B-4bit --memory 16 --max-seq-length 4096"""


def main(argv: Sequence[str]) -> int:
    """Print the estimate. Returns 0 if the run fits, else 1."""
    parser = make_parser()
    start = time.perf_counter()
    try:
        given = check_settings(vars(parser.parse_args(argv)))
        request, name = request_of(given)
        limit = usable_bytes(given["memory"]) if "memory" in given else available_bytes()
        found = estimate(request)
        print(sentence(found, name, given.get("memory")), training(request), sep="\n", end="\n\n")
        print(f"{parts_table(found)}\n\n{optimizers_table(found)}\n")
        print(f"{macs_table(found)}\n\n{verdict(found, limit)}")
    except BAD_INPUT as problem:
        parser.error(problem)
    seconds = time.perf_counter() - start
    print(
        f"for {found.device}: measured there with {found.measured} in {seconds:.0f} s; the rest "
        "follows from shapes"
    )
    return 0 if found.peak <= limit else 1


def make_parser() -> OneLineParser:
    """The command line."""
    parser = OneLineParser(
        prog="mlx-maxfactor fits",
        description="Estimate the peak memory of a training step, without any weights.",
        epilog=USAGE,
    )
    add = parser.add_argument
    add("model", nargs="?", help="folder with a config.json, or a name in the hub's cache")
    add("--fine-tune-type", choices=FINE_TUNE_TYPES, help="lora, dora or full (lora)")
    add("--num-layers", type=int, help="last layers to train, -1: all (16, or all of fewer)")
    add("--rank", type=integer, help="rank of LoRA and DoRA (8)")
    add("--batch-size", type=integer, help="sequences in a batch (4)")
    add("--max-seq-length", type=integer, help="tokens in a sequence (2048)")
    flag = {"action": "store_true", "default": None}
    add("--grad-checkpoint", **flag, help="compute activations again in the backward pass")
    add("--grad-accumulation-steps", type=integer, help="batches for one update (1)")
    add("--dtype", choices=DTYPES, help="dtype of the weights (as they are, or as the config says)")
    add("--quantize", type=integer, metavar="BITS", help="quantize the model: 2, 3, 4, 5, 6 or 8")
    add_optimizer_arguments(parser)
    add("--memory", type=float, metavar="GB", help="memory of the Mac (default: this machine)")
    add("-c", "--config", metavar="FILE", help="a YAML file of mlx_lm.lora")
    return parser


def request_of(given: Mapping[str, Any]) -> tuple[Request, str]:
    """What the command line and the YAML file ask for, and the model's name."""
    file = read_yaml(given["config"]) if "config" in given else {}
    arguments = Namespace(**{"dtype": None, **DEFAULTS, **file, **given})
    if arguments.model is None:
        raise ValueError("give a model: a folder with a config.json, or a name in the hub's cache")
    parameters = dict(arguments.lora_parameters or {})
    if "rank" in given:
        parameters["rank"] = given["rank"]
    config, folder = read_config(arguments.model)
    request = Request(
        config,
        options=optimizer_options(arguments),
        lora_parameters=parameters,
        bits=arguments.quantize,
        folder=folder,
        **{name: getattr(arguments, name) for name in AS_IN_LORA},
    )
    return request, Path(arguments.model).resolve().name


def sentence(found: MemoryEstimate, name: str, memory: float | None) -> str:
    """The answer in one sentence: for the Mac asked for, or else the smallest one that it fits."""
    request, model = found.request, found.request.base()
    weights = f"{bits} bits" if (bits := bits_of(model)) else str(main_dtype(model))[9:]
    tokens = f"{request.max_seq_length:,} tokens"
    if request.batch_size > 1:
        tokens = f"{request.batch_size} x {tokens}"
    macs = [mac for mac in MACS if found.peak <= usable_bytes(mac)]
    verdict = f"fits {_a_mac(macs[0])}" if macs else "fits no Mac"
    if memory is not None:
        fits = "fits" if found.peak <= usable_bytes(memory) else "does not fit"
        verdict = f"{fits} {_a_mac(memory)}"
    kind = KINDS[request.fine_tune_type]
    return f"{name}, {weights}, {kind}, {tokens}: {found.peak / GB:.3g} GB, {verdict}"


def _a_mac(memory: float) -> str:
    return f"{'an' if f'{memory:g}'.startswith(('8', '11', '18')) else 'a'} {memory:g} GB Mac"


def training(request: Request) -> str:
    """What else the memory depends on, in one line."""
    count = request.grad_accumulation_steps
    return (
        f"{request.config['model_type']}: {request.trained_layers} of {request.layers} layers "
        f"trained with {request.optimizer}"
        + (", gradient checkpointing" if request.grad_checkpoint else "")
        + (f", {count} batches an update" if count > 1 else "")
    )


def usable_bytes(memory: float) -> float:
    """What Metal may wire by default on a Mac: two thirds up to 32 GiB, three quarters above."""
    if not 0 < memory < math.inf:
        raise ValueError(f"memory must be a number above 0, got {memory:g}")
    return memory * 2**30 * (2 / 3 if memory <= 32 else 3 / 4)


def parts_table(found: MemoryEstimate) -> str:
    """The parts of the peak."""
    rows = [
        ("weights", found.weights),
        ("optimizer state", found.state),
        ("activations and gradients", found.step),
        ("peak", found.peak),
    ]
    return table([(found.request.optimizer, "GB"), *((name, _gb(x)) for name, x in rows)])


def optimizers_table(found: MemoryEstimate) -> str:
    """State and peak with each optimizer, as if each had the measured step of the one asked for."""
    rest, asked = found.weights + found.step, found.request.optimizer
    rows = [
        (name, f"{state / 1e6:,.2f}", _gb(rest + state))
        for name, state in sorted(found.states.items(), key=lambda item: item[1])
        if name in OPTIMIZERS or name.startswith("mlx_") or name == asked
    ]
    return table([("optimizer", "state, MB", "peak, about GB"), *rows])


def macs_table(found: MemoryEstimate) -> str:
    """On which Macs it fits, and the longest sequence there."""
    rows = []
    for memory in MACS:
        limit = usable_bytes(memory)
        fits = found.peak <= limit
        longest = found.longest_sequence(limit)
        rows.append((f"{memory} GB", _gb(limit), "yes" if fits else "no", f"{longest:,}"))
        if longest > 4 * found.request.max_seq_length:
            break
    return table([("Mac", "usable, GB", "fits", "longest sequence"), *rows])


def verdict(found: MemoryEstimate, limit: float) -> str:
    """Whether it fits, and if not, the cheapest change that makes it fit."""
    if found.peak <= limit:
        return f"fits: {_gb(found.peak)} of {_gb(limit)} GB"
    lines = [f"does not fit: {_gb(found.peak)} of {_gb(limit)} GB; with mlx-maxfactor lora and"]
    for change, request in changes(found.request):
        peak = estimate(request).peak
        lines.append(f"  {change}: {_gb(peak)} GB")
        if peak <= limit:
            return "\n".join([*lines, "the last line is the cheapest change that fits"])
    return "\n".join([*lines, "no change that was tried fits: take a smaller model"])


def changes(request: Request) -> Iterator[tuple[str, Request]]:
    """Changes that need less memory, each with those before it, the cheapest first."""
    taken: list[str] = []

    def changed(name: str, **values: Any) -> tuple[str, Request]:
        nonlocal request
        request = replace(request, **values)
        taken.append(name)
        return " ".join(taken), request

    if request.fine_tune_type == "full" and request.optimizer != "orthomaxfactor":
        yield changed("--optimizer orthomaxfactor", optimizer="orthomaxfactor", options=None)
    if request.batch_size > 1:
        count = request.batch_size * request.grad_accumulation_steps
        text = f"--batch-size 1 --grad-accumulation-steps {count}"
        yield changed(text, batch_size=1, grad_accumulation_steps=count)
    if not request.grad_checkpoint:
        yield changed("--grad-checkpoint", grad_checkpoint=True)
    if request.fine_tune_type == "full":
        yield changed("--fine-tune-type lora", fine_tune_type="lora")
    if not bits_of(request.base()):
        yield changed("--model MODEL-4bit (of mlx_lm.convert -q)", bits=4)
    while request.max_seq_length > 256:
        length = request.max_seq_length // 2
        yield changed(f"--max-seq-length {length}", max_seq_length=length)


def _gb(size: float) -> str:
    return f"{size / GB:.3f}"
