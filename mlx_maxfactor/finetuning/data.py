"""Data sets for mlx-lm's trainer: every line is checked and tokenized before the first step."""

import json
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

from mlx_lm.tuner.datasets import CacheDataset, create_dataset, load_dataset
from tqdm import tqdm

from .._validate import shown
from .models import prefixing_errors

FILES = {"training": "train.jsonl", "validation": "valid.jsonl", "test": "test.jsonl"}
ROUNDED = 32  # mlx-lm pads a batch to a multiple of this, and one token more


class TokenizedDataset(CacheDataset):
    """A set of mlx-lm, all tokenized.

    Args:
        data: The set.
        places: Where each sample is, for errors. It is checked in its place.
    """

    def __init__(self, data: Any, places: Sequence[str]):
        super().__init__(data)
        self.data = data
        reader = "the tokenizer" if hasattr(data, "text_key") else "the chat template"
        for i, place in enumerate(tqdm(places, desc="reading data", delay=3, leave=False)):
            with prefixing_errors(place):
                check_sample(data, data[i])
                with prefixing_errors(f"{reader} of the model"):
                    tokens = cast(Any, self[i])[0]
                if not tokens:
                    raise ValueError("there is no token in it: remove it")

    def digest(self) -> str:
        """A hash of all tokens: it changes with the data, the tokenizer and its chat template."""
        found = sha256()
        for i in range(len(self)):
            found.update(json.dumps(self[i]).encode())
        return found.hexdigest()[:16]


def load_data(arguments: Namespace, tokenizer: Any) -> dict[str, Any]:
    """The sets that a run uses, by "training", "validation" and "test". A set may be empty.

    Raises:
        ValueError: A set is missing or smaller than a batch, or a line is wrong. It is named.
    """
    a, name = arguments, name_of_data(arguments)
    used = ["training", "validation"] * bool(a.train) + ["test"] * bool(a.test)
    folder = Path(a.data or "")
    if a.data and folder.is_file():
        raise ValueError(f"{name} is a file: give the folder that has {', '.join(FILES.values())}")
    if getattr(a, "hf_dataset", None) or not folder.is_dir():
        found = dict(zip(FILES, _load_from_hub(a, tokenizer), strict=True))
        places = {
            key: [f"{name}, {key} row {i + 1}" for i in range(len(found[key]))] for key in used
        }
    else:
        with prefixing_errors(name):
            lines = {key: list(read_lines(folder / FILES[key])) for key in used}
        places = {key: [place for place, _ in lines[key]] for key in used}
        found: dict[str, Any] = {key: [] for key in used}
        for key in (key for key in used if lines[key]):
            samples = [sample for _, sample in lines[key]]
            with prefixing_errors(f"{places[key][0]}, with the names {shown([*samples[0]])}"):
                found[key] = create_dataset(samples, tokenizer, a)
    for key in used:
        if not len(found[key]) and key != "validation":
            raise ValueError(f"{name}: the {key} set, {FILES[key]}, is missing or empty")
        if 0 < len(found[key]) < a.batch_size:
            lines = f"the {key} set has {len(found[key])} lines"
            raise ValueError(f"{name}: batch_size is {a.batch_size}, but {lines}")
    # An empty list, because an empty dataset of mlx-lm cannot be described in a checkpoint.
    return {k: TokenizedDataset(found[k], places[k]) if places.get(k) else [] for k in FILES}


def _load_from_hub(arguments: Namespace, tokenizer: Any) -> Sequence[Any]:
    """Sets of the hub, as mlx-lm loads them."""
    with prefixing_errors(name_of_data(arguments)):
        try:
            return load_dataset(arguments, tokenizer)
        except ModuleNotFoundError as missing:  # mlx-lm takes what is no folder for a hub name
            if getattr(arguments, "hf_dataset", None):
                raise ValueError(f"it needs the package {missing.name}") from None
            raise ValueError(f"there is no such folder (and no package {missing.name})") from None


def name_of_data(arguments: Namespace) -> str:
    """What messages call the data. mlx-lm reads ``hf_dataset`` in place of a folder."""
    return "hf_dataset" if getattr(arguments, "hf_dataset", None) else f"data {arguments.data}"


def read_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """The samples of a JSONL file, each with its place. Blank lines are skipped.

    Raises:
        ValueError: A line is not a JSON object in UTF-8.
    """
    if not path.exists():
        return
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        with prefixing_errors(f"{path.name}, line {number}"):
            try:
                text = line.decode("utf-8-sig").strip()
                sample = json.loads(text) if text else None
                if "\\u" in text:
                    json.dumps(sample, ensure_ascii=False).encode()
            except UnicodeEncodeError as problem:
                half = problem.object[problem.start]
                raise ValueError(f"{half!r} is half of a character: remove it") from None
            except UnicodeDecodeError:
                raise ValueError("it is not UTF-8: save the file in this encoding") from None
            except json.JSONDecodeError as problem:
                where = f"column {problem.colno}: {problem.msg}"
                raise ValueError(f"each line must be a JSON object; {where}") from None
            if text and not isinstance(sample, Mapping):
                raise ValueError(f"each line must be a JSON object, got {shown(sample)}")
        if text:
            yield f"{path}, line {number}", sample


def check_sample(data: Any, sample: Any) -> None:
    """Raise ValueError for what fails in mlx-lm, or is trained as the text "None"."""
    for name in ("text_key", "prompt_key", "completion_key", "chat_key"):
        if (key := getattr(data, name, None)) is None:
            continue
        if (value := sample.get(key)) is None:
            raise ValueError(f"{key} is {'null' if key in sample else 'missing'}")
        if name == "chat_key":
            _check_messages(key, value, data.mask_prompt)
        elif not isinstance(value, str):
            raise ValueError(f"{key} must be a string, got {shown(value)}")
        elif name == "text_key" and not value:
            raise ValueError(f"{key} is empty: remove the line")


def _check_messages(key: str, messages: Any, mask_prompt: bool) -> None:
    if not (isinstance(messages, list) and messages):
        raise ValueError(f"{key} must be a list of messages, got {shown(messages)}")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"{key}[{i}] must have a role, got {shown(message)}")
        if message.get("content") is None and not message.keys() - {"role", "content"}:
            raise ValueError(f"{key}[{i}] has no content")
        if not isinstance(message.get("content") or "", (str, list)):
            raise ValueError(f"{key}[{i}]: content must be a string, got {shown(message)}")
    if mask_prompt and len(messages) < 2:
        raise ValueError("mask_prompt needs a chat of at least two messages")


def describe_lengths(name: str, data: Any, batch_size: int, longest: int) -> list[str]:
    """What to know of the lengths: samples that are cut or learn nothing, and padding."""
    sizes = [len(tokens) for tokens, _ in data]
    notes, of = [], f"of {len(sizes):,} {name} samples"
    if cut := [size for size in sizes if size > longest]:
        notes.append(
            f"{len(cut):,} {of} are longer than max_seq_length={longest} and are cut; "
            f"the longest has {max(cut):,} tokens"
        )
    if lost := sum(max(1, start) >= min(len(x), longest) for x, start in data):
        notes.append(f"{lost:,} {of} have no token to learn: their prompt is all that is left")
    if name == "training" and (share := padding(sizes, batch_size, longest)) > 0.5:
        notes.append(f"{share:.0%} of a batch is padding: sort the lines of the file by length")
    return notes


def padding(sizes: Sequence[int], batch_size: int, longest: int) -> float:
    """The share of padding in mlx-lm's batches, which are neighbouring lines of the file."""
    used = [min(size, longest) for size in sizes]
    batches = [used[i : i + batch_size] for i in range(0, len(used), batch_size)]
    widths = [min(1 + ROUNDED * -(-max(batch) // ROUNDED), longest) for batch in batches]
    return 1 - sum(used) / max(1, batch_size * sum(widths))
