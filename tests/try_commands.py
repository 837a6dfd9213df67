"""Random edits of data, YAML, config.json and options, against ``lora`` and ``fits``.

    python tests/try_commands.py --minutes 10
    python tests/try_commands.py --seed 123        one attempt again

An attempt may succeed, or end with one line and a status. Anything else is printed with its seed.
"""

import argparse
import contextlib
import io
import json
import os
import random
import resource
import signal
import string
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import yaml

from mlx_maxfactor.commands import main
from mlx_maxfactor.commands.settings import SETTINGS
from mlx_maxfactor.finetuning.optimizer_names import MLX_SCHEDULES, SCHEDULES, optimizer_names

sys.path.append(str(Path(__file__).parent.parent / "examples"))
import tiny_model

SETTING = {"batch_size": 2, "iters": 2, "max_seq_length": 32, "val_batches": 1, "num_layers": -1}
VALUES = [None, True, False, 0, 1, -1, 2, 3.5, 1e-5, 10**30, 1e400, -1e-9, float("nan"), "", "x"]
VALUES += ["1", "no", "2e-5", "7GB", "adam", "muon", [], [1], ["x"], {}, {"x": 1}, {"name": "x"}]
VALUES += ["\ud800", "é", "\0", "lora", "full", "dora", [0.9, 0.99], [[1, 2]], {"path": "a/b"}]
OPTIONS = ["momentum", "betas", "eps", "weight_decay", "state_dtype", "block", "rest", "rules"]
OPTIONS += ["max_grad_norm", "skip_nonfinite", "min_rms", "total_steps", "rest_options", "seed"]
OPTIONS += ["rounding", "exclude_first", "strict", "group", "pretrained", "ns_steps", "x", ""]
SLOW = ("hf_dataset", "report_to", "model", "data", "config")
"""What may ask the network, it is edited seldom, or never."""

BYTES = [b"", b"\n", b"\xff", b"\xef\xbb\xbf", b"{", b"}", b"[", b'"', b"null", b"\0", b"\r"]


def samples(dice: random.Random) -> list:
    """Lines of one of mlx-lm's formats, and sometimes an odd one."""
    chat = [{"role": role, "content": "f(x)"} for role in ("user", "assistant")]
    kinds = [{"text": "f(x)"}, {"prompt": "f(x)", "completion": "y"}, {"messages": chat}]
    kind = dice.choice(kinds)
    lines = [dict(kind) for _ in range(dice.choice([1, 2, 4, 5]))]
    for line in lines:
        if dice.random() < 0.15:
            line[dice.choice([*line, "tools", "x"])] = odd(dice)
    return lines


def odd(dice: random.Random):
    """A value that nobody expects."""
    value = dice.choice(VALUES)
    if dice.random() < 0.1:
        value = {dice.choice(["rank", "scale", "keys", "alpha", "role", "content"]): value}
    if dice.random() < 0.05:
        value = [value, "".join(dice.choices(string.printable, k=5))]
    return value


def damaged(dice: random.Random, content: bytes, share: float) -> bytes:
    """The bytes, some of them replaced, removed or repeated."""
    while dice.random() < share:
        start = dice.randrange(len(content) + 1)
        end = min(len(content), start + dice.choice([0, 1, 3, 50]))
        content = content[:start] + dice.choice([*BYTES, content[:end]]) + content[end:]
    return content


def write_data(dice: random.Random, folder: Path) -> None:
    """The three files, of which some are missing, empty or damaged."""
    folder.mkdir()
    lines = samples(dice)
    for name in ("train", "valid", "test"):
        content = "\n".join(map(json.dumps, lines)).encode()
        if dice.random() < 0.05:
            continue
        (folder / f"{name}.jsonl").write_bytes(damaged(dice, content, 0.1))


def write_settings(dice: random.Random, path: Path, base: dict) -> None:
    """A YAML file with odd settings."""
    settings = dict(base)
    for _ in range(dice.choice([0, 0, 1, 1, 2, 4])):
        name = dice.choice([x for x in SETTINGS if x not in SLOW])
        settings[name] = odd(dice)
        if dice.random() < 0.3:
            names = [*SCHEDULES, *MLX_SCHEDULES, "x"]
            arguments = [dice.choice([1e-3, 0, -1, 10, "x"]) for _ in range(dice.randrange(5))]
            settings["lr_schedule"] = {"name": dice.choice(names), "arguments": arguments}
            settings["lr_schedule"] |= {"warmup": odd(dice)} if dice.random() < 0.3 else {}
        if dice.random() < 0.3:
            keys = dice.sample(["rank", "scale", "dropout", "keys"], 2)
            settings["lora_parameters"] = {key: dice.choice([2, 0.5, odd(dice)]) for key in keys}
        if dice.random() < 0.3:
            options = {dice.choice(OPTIONS): odd(dice)}
            settings["optimizer_config"] = {dice.choice(optimizer_names()): options}
    text = yaml.safe_dump(settings, allow_unicode=True).encode("utf-8", "surrogatepass")
    path.write_bytes(damaged(dice, text, 0.1))


def arguments_of(dice: random.Random) -> list[str]:
    """Options of the command line."""
    given = []
    for _ in range(dice.choice([0, 0, 1, 2])):
        name = dice.choice([x for x in SETTINGS if x not in SLOW and x not in ("option",)])
        given.append("--" + name.replace("_", "-"))
        if dice.random() < 0.8:
            value = odd(dice)
            given.append(value if isinstance(value, str) else json.dumps(value))
    if dice.random() < 0.5:
        given += ["--optimizer", dice.choice(optimizer_names())]
    if dice.random() < 0.3:
        given += ["--option", f"{dice.choice(OPTIONS)}={json.dumps(odd(dice))}"]
    return given


def attempt(seed: int, home: Path) -> str | None:
    """One attempt. Returns what went wrong, or None."""
    dice = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = folder / "model"
        model.mkdir()
        for file in (home / "model").iterdir():
            content = file.read_bytes()
            if file.name == "config.json" and dice.random() < 0.3:
                config = dict(tiny_model.SHAPE)
                for _ in range(dice.choice([1, 2])):
                    value = odd(dice)
                    if value != 10**30:  # so many layers would be built for ever
                        config[dice.choice([*config, "quantization", "text_config"])] = value
                content = damaged(dice, json.dumps(config).encode(), 0.1)
            elif dice.random() < 0.03:
                content = damaged(dice, content, 0.7)
            (model / file.name).write_bytes(content)
        write_data(dice, folder / "data")
        command = dice.choice(["lora", "lora", "lora", "fits"])
        base = {"model": str(model), "data": str(folder / "data"), **SETTING}
        base["adapter_path"] = str(folder / "adapters")
        write_settings(dice, folder / "x.yaml", base)
        given = [command, "-c", str(folder / "x.yaml"), *arguments_of(dice)]
        given += [] if command == "lora" else [str(model)]
        limit = dice.choice([None, None, None, 0, 1000, 20_000, 60_000])  # a full disk
        again = dice.random() < 0.2
        for more in ([], ["--resume"])[: 1 + (again and command == "lora")]:
            if (problem := outcome([*given, *more], folder, limit)) is not None:
                return f"seed {seed}: {' '.join(map(repr, given))}\n{problem}"
    return None


def outcome(given: list[str], folder: Path, limit: int | None) -> str | None:
    """Run a command in this process. Returns what a user must not see, or None."""
    out, err, here = io.StringIO(), io.StringIO(), os.getcwd()
    os.chdir(folder)
    try:
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            warnings.catch_warnings(),
            file_size_limit(limit),
        ):
            status = main(given)
    except SystemExit as end:
        last = err.getvalue().rstrip("\n").rpartition("\n")[2].rpartition("\r")[2]
        if end.code not in (0, None) and "error: " not in last:
            return f"the last line is {last!r}"
        status = 0
    except BaseException:
        return traceback.format_exc()
    finally:
        os.chdir(here)
    return None if status in (0, 1) else f"status {status}"


@contextlib.contextmanager
def file_size_limit(limit: int | None):
    """Let writing fail above a size, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def run() -> int:
    """Try until the time is over. Returns 1 if anything was found."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seed", type=int, help="try this seed alone")
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    found = count = 0
    with tempfile.TemporaryDirectory() as name:
        tiny_model.write(Path(name, "model"))
        end, seed = time.monotonic() + 60 * arguments.minutes, arguments.seed or arguments.first
        while count == 0 or (arguments.seed is None and time.monotonic() < end):
            if (problem := attempt(seed, Path(name))) is not None:
                found += 1
                print(problem, flush=True)
            count, seed = count + 1, seed + 1
    print(f"{count} attempts, {found} with a traceback or without one line")
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(run())
