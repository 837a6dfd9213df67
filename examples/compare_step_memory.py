"""Compare the peak memory of fine-tuning steps: ours, mlx's AdamW, and layer-by-layer evaluation.

    python examples/compare_step_memory.py
    python examples/compare_step_memory.py --width 512 --layers 8 --tokens 1024

What is printed is the peak of a step over the model's weights. "layer by layer" is what another
MLX trainer does to release gradients early: a step that is not compiled, whose updated layers are
evaluated one after the other, the last one first. It runs with mlx's AdamW. "accumulated" adds the
gradients of two batches before the update, as mlx-lm's trainer does; "guards" clips by the global
norm and skips bad steps, "each clipped" clips the gradient of each parameter.
"""

import argparse
import gc
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from compare_optimizers import markdown
from mlx.optimizers import Optimizer
from mlx.utils import tree_map
from mlx_lm.tuner.trainer import default_loss, grad_checkpoint
from tqdm import tqdm

from mlx_maxfactor.finetuning.memory_estimate import Request, restoring_layers
from mlx_maxfactor.finetuning.models import bytes_of
from mlx_maxfactor.finetuning.optimizer_names import make_optimizer

Step = Callable[[mx.array, mx.array], None]
MODEL = {
    "model_type": "llama",
    "rms_norm_eps": 1e-5,
    "vocab_size": 2048,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


def main() -> None:
    given = parse_arguments()
    cases: Any = itertools.product(("lora", "full"), (False, True), given.layers, given.tokens)
    rows = [["training", "layers", "tokens", *METHODS]]
    for kind, checkpointed, layers, tokens in tqdm(list(cases)):
        sizes = {"hidden_size": given.width, "intermediate_size": 11 * given.width // 4}
        config = {**MODEL, **sizes, "num_hidden_layers": layers}
        request = Request(config, fine_tune_type=kind, num_layers=-1, dtype="float32")
        peaks = [peak(request, tokens, checkpointed, method) for method in METHODS.values()]
        title = kind + (", checkpointed" if checkpointed else "")
        rows.append([title, str(layers), f"{tokens:,}", *(f"{x:.2f}" for x in peaks)])
        print("|", " | ".join(rows[-1]), "|", flush=True)
    print(f"\nwidth {given.width}, float32, {mx.default_device()}\n\n{markdown(rows)}")


def peak(request: Request, tokens: int, checkpointed: bool, method: Callable[..., Step]) -> float:
    """Peak bytes of a step over the weights."""
    gc.collect()
    mx.clear_cache()
    model = request.build()
    with restoring_layers(model):
        if checkpointed:
            grad_checkpoint(layers_of(model)[0])
        step = method(model)
        batch = mx.random.randint(0, 2048, (1, tokens)), mx.array([[0, tokens]])
        mx.eval(model.state, batch)
        found = 0
        for _ in range(3):
            mx.clear_cache()
            mx.reset_peak_memory()
            step(*batch)
            found = max(found, mx.get_peak_memory())
        return found / bytes_of(model.parameters())


def layers_of(model: Any) -> Sequence[Any]:
    return model.layers


# Ways to make a step


def compiled(model: nn.Module, name: str, transform: Any = None, **options: Any) -> Step:
    """A compiled step, as in mlx-lm's trainer."""
    optimizer = make_optimizer(model, name, **{"skip_nonfinite": False, **options})
    state = [model.state, optimizer.state]
    mx.eval(state)

    @partial(mx.compile, inputs=state, outputs=state)
    def step(*batch: mx.array) -> mx.array:
        loss, gradients = value_and_grad(model)(model, *batch)
        optimizer.update(model, transform(gradients) if transform else gradients)
        return loss

    return lambda *batch: mx.eval(step(*batch), state)


def accumulated(model: nn.Module, name: str) -> Step:
    """Two batches for one update."""
    optimizer = make_optimizer(model, name, skip_nonfinite=False)
    state = [model.state, optimizer.state]
    mx.eval(state)

    @partial(mx.compile, inputs=state, outputs=state)
    def step(tokens: mx.array, lengths: mx.array, before: Any) -> Any:
        _, gradients = value_and_grad(model)(model, tokens, lengths)
        if before is None:
            return gradients
        optimizer.update(model, tree_map(lambda x, y: (x + y) / 2, gradients, before))
        return None

    def both(tokens: mx.array, lengths: mx.array) -> None:
        before = step(tokens, lengths, None)
        mx.eval(before)
        step(tokens, lengths, before)
        mx.eval(state)

    return both


def layer_by_layer(model: nn.Module) -> Step:
    """Not compiled; the last layer is evaluated first."""
    optimizer = make_optimizer(model, "mlx_adamw", skip_nonfinite=False)
    mx.eval(model.state, optimizer.state)

    def step(*batch: mx.array) -> None:
        loss, gradients = value_and_grad(model)(model, *batch)
        optimizer.update(model, gradients)
        del gradients
        states = states_of(optimizer)
        for i in reversed(range(len(layers_of(model)))):
            mx.eval(layers_of(model)[i].trainable_parameters(), states[i])
        mx.eval(model.state, optimizer.state, loss)

    return step


def states_of(optimizer: Optimizer) -> Sequence[Any]:
    state: Any = optimizer.state
    return state["model"]["layers"]


def value_and_grad(model: nn.Module) -> Callable[..., Any]:
    return nn.value_and_grad(model, lambda *batch: default_loss(*batch)[0])


def clip_each(gradients: Any) -> Any:
    """Each gradient scaled down to a norm of 1."""
    return tree_map(lambda g: g / mx.maximum(mx.linalg.norm(g), 1.0), gradients)


GUARDS = {"max_grad_norm": 1.0, "skip_nonfinite": True}
METHODS: dict[str, Callable[..., Step]] = {
    "default": partial(compiled, name="orthomaxfactor"),
    "adamw": partial(compiled, name="adamw"),
    "mlx AdamW": partial(compiled, name="mlx_adamw"),
    "layer by layer": layer_by_layer,
    "default, guards": partial(compiled, name="orthomaxfactor", **GUARDS),
    "default, each clipped": partial(compiled, name="orthomaxfactor", transform=clip_each),
    "default, accumulated": partial(accumulated, name="orthomaxfactor"),
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare the peaks of fine-tuning steps.")
    add = parser.add_argument
    add("--width", type=int, default=256)
    add("--layers", type=int, nargs="+", default=[4, 8, 16])
    add("--tokens", type=int, nargs="+", default=[512, 2048])
    return parser.parse_args()


if __name__ == "__main__":
    main()
