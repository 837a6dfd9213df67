"""A folder with a llama and a tokenizer that are small enough for runs of the commands."""

import mlx.core as mx
import small_llama
from mlx_lm.models.llama import Model, ModelArgs
from mlx_lm.utils import save_model

SHAPE = small_llama.SHAPE | {"num_hidden_layers": 2, "intermediate_size": 64}
SHAPE |= {"num_attention_heads": 2, "num_key_value_heads": 1}


def write(folder, seed=0):
    mx.random.seed(seed)
    folder.mkdir(exist_ok=True)
    save_model(folder, Model(ModelArgs.from_dict(SHAPE)))
    small_llama.write_json(folder / "config.json", SHAPE)
    tokenizer = small_llama.train_tokenizer(["def word(letters): return letters"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": small_llama.END}
    settings["chat_template"] = small_llama.TEMPLATE
    small_llama.write_json(folder / "tokenizer_config.json", settings)
