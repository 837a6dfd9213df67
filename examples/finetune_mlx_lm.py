"""Fine-tune with mlx-lm in a program of your own: LoRA, its trainer, a checkpoint.

    python examples/finetune_mlx_lm.py

`mlx-maxfactor lora` does this from the command line, with all of mlx_lm.lora's arguments.
"""

from types import SimpleNamespace
from typing import Any, cast

from mlx_lm import load
from mlx_lm.tuner.datasets import CacheDataset, load_dataset
from mlx_lm.tuner.trainer import TrainingArgs, train
from mlx_lm.tuner.utils import linear_to_lora_layers
from small_llama import build_model, write_task

from mlx_maxfactor import create_optimizer, save_checkpoint


def main() -> None:
    model, tokenizer = load(str(build_model("runs/small_llama")))[:2]  # any model of mlx-lm
    request = SimpleNamespace(data=str(write_task("runs/small_task")), train=True, test=False)
    training, validation, _ = load_dataset(request, cast(Any, tokenizer))

    model.freeze()
    linear_to_lora_layers(model, -1, {"rank": 8, "scale": 20.0, "dropout": 0.0})
    optimizer = create_optimizer(model, skip_nonfinite=True)  # after the adapters are added
    print(optimizer.plan)

    arguments = TrainingArgs(iters=100, adapter_file="runs/adapters.safetensors")
    train(model, optimizer, CacheDataset(training), CacheDataset(validation), arguments)
    save_checkpoint("runs/finetuned.safetensors", model, optimizer, weights="trainable")


if __name__ == "__main__":
    main()
