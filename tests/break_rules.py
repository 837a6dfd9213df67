"""Break one rule of the package at a time, and see whether the tests find it.

    python tests/break_rules.py            # all of them, in a copy of the tree
    python tests/break_rules.py schedule   # those whose description holds this word

The exit status is the number of broken rules that no test found.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PACKAGE = "mlx_maxfactor"


class Break(NamedTuple):
    """A rule, the text in a file that follows it, a text that breaks it, and the tests to run."""

    rule: str
    file: str
    old: str
    new: str
    tests: str


ADAMW, MAXFACTOR, ORTHO = (f"optimizers/{n}.py" for n in ("adamw", "maxfactor", "orthomaxfactor"))
BASE, CHECKPOINT = "optimizers/base.py", "checkpoint/save_and_load.py"
BREAKS = [
    Break("AdamW: decay", ADAMW, "1 - eta * self.weight_decay", "1 - 0 * eta", "adamw"),
    Break("AdamW: v is corrected by its own beta", ADAMW, "n(beta2, t))", "n(beta1, t))", "adamw"),
    Break(
        "AdamW: t counts the parameter's own updates",
        ADAMW,
        't = state["count"].astype',
        "t = self.step.astype",
        "adamw",
    ),
    Break(
        "Adafactor: the update is clipped",
        "optimizers/adafactor.py",
        "(alpha / clip)",
        "(alpha)",
        "adafactor",
    ),
    Break(
        "SignSGD: sign", "optimizers/signsgd.py", "- eta * mx.sign", "+ eta * mx.sign", "signsgd"
    ),
    Break(
        "SignSGD: sparse rows, axis",
        "optimizers/signsgd.py",
        "axis=-1, keepdims=True) if",
        "axis=0, keepdims=True) if",
        "signsgd",
    ),
    Break(
        "Muon: scale of rows by columns",
        "optimizers/muon.py",
        "muon_scale(rows, columns",
        "muon_scale(columns, rows",
        "muon",
    ),
    Break(
        "Momentum: Nesterov",
        "optimizers/moment_state.py",
        "return decay * m + x if nesterov else m",
        "return m",
        "muon",
    ),
    Break(
        "OrthoMaxFactor: floor of RMS(p)",
        ORTHO,
        "mx.maximum(f.rms(parameter, (-2, -1)), floor)",
        "f.rms(parameter, (-2, -1))",
        "orthomaxfactor",
    ),
    Break(
        "Statistics: the mean of a row divides by its length",
        "functional/moments.py",
        "gradient.shape[-1] + eps",
        "gradient.shape[-2] + eps",
        "functional",
    ),
    Break(
        "Statistics: bounds of the newest weight",
        "functional/moments.py",
        "exponent), *bounds)",
        "exponent), 0.0, 1.0)",
        "maxfactor",
    ),
    Break(
        "Orthogonalization: every matrix has its own norm",
        "functional/norms.py",
        "mx.sum(mx.square(x), axis=(-2, -1), keepdims=True)",
        "mx.sum(mx.square(x), keepdims=True)",
        "functional",
    ),
    Break(
        "MaxFactor: a step is as long as the maximum of its row",
        MAXFACTOR,
        "scale * peaks if",
        "scale if",
        "maxfactor",
    ),
    Break(
        "MaxFactor: cautious steps drop elements of the other sign",
        MAXFACTOR,
        "root, scale) * agrees",
        "root, scale)",
        "maxfactor momentum",
    ),
    Break(
        "Frequency bands: damping shortens the memory",
        "optimizers/frequency_adaptive_momentum.py",
        "self.alpha * (1 - damping)",
        "self.alpha * (1 + 0 * damping)",
        "momentum",
    ),
    Break(
        "4 bits: momentum without gradients goes to zero",
        "functional/quantization.py",
        "max((low + high) / 2, decay * FALL * high)",
        "(low + high) / 2",
        "quantization",
    ),
    Break(
        "Stochastic rounding: every step has a new key",
        BASE,
        'state["key"], key = mx.random.split',
        "_, key = mx.random.split",
        "rounding",
    ),
    Break(
        "fp16: weights stay finite",
        BASE,
        "if parameter.dtype == mx.float16:",
        "if False:",
        "contract",
    ),
    Break(
        "Rate: one set by hand reaches a compiled step",
        BASE,
        'self.state["scheduled"] = mx.array(False)',
        'self._schedulers.pop("learning_rate")',
        "contract",
    ),
    Break(
        "State: one that is assigned reaches a compiled step",
        BASE,
        "        self._state.clear()\n        self._state.update(state)",
        "        self._state = state",
        "contract",
    ),
    Break(
        "Guard: clipping by the global norm",
        "guard.py",
        "self.max_grad_norm / peak / norm",
        "self.max_grad_norm / norm",
        "guard",
    ),
    Break(
        "Guard: a skipped step keeps the old state",
        "optimizers/update_loop.py",
        "new = tree_map(self._decision.select, new, self[key])",
        "pass",
        "guard",
    ),
    Break(
        "A failed update restores the state",
        "optimizers/update_loop.py",
        "for state, before in kept:",
        "for state, before in []:",
        "contract",
    ),
    Break(
        "Schedule: the cosine begins after the warm-up",
        "schedules.py",
        "progress = (step - self.warmup_steps)",
        "progress = step",
        "schedules",
    ),
    Break(
        "Accumulation: micro-batches are weighted",
        "accumulation.py",
        "g.astype(mx.float32) * weight, 0.0",
        "g.astype(mx.float32), 0.0",
        "accumulation",
    ),
    Break(
        "Average: a compiled step counts",
        "weight_average.py",
        'self.state["step"] = step',
        'self.state = self.state | {"step": step}',
        "weight_average",
    ),
    Break(
        "Checkpoint: random key",
        CHECKPOINT,
        "mx.random.seed(high << 32 | low)",
        "mx.random.seed(low)",
        "checkpoint",
    ),
    Break(
        "Checkpoint: a rate is restored",
        CHECKPOINT,
        "if there == here:",
        "if there != there:",
        "checkpoint",
    ),
    Break(
        "Checkpoint: the checksum is compared",
        "checkpoint/file.py",
        'header, metadata["checksum"]) !=',
        'header, metadata["checksum"]) is',
        "checkpoint",
    ),
    Break(
        "Router: a new rate keeps the members' ratios",
        "routing/routed.py",
        "set_rate(member.optimizer, learning_rate * ratio)",
        "set_rate(member.optimizer, learning_rate)",
        "routing",
    ),
    Break(
        "Router: LoRA's A and B are stored transposed",
        "routing/roles.py",
        'return "transposed"',
        'return "batched"',
        "roles",
    ),
    Break(
        "Ranks: gradients are averaged",
        "distributed/collectives.py",
        "all_sum(flat) / self.size",
        "all_sum(flat)",
        "distributed",
    ),
]


def find(broken: Break, folder: Path) -> str:
    """The first test that fails when the rule is broken in a copy of the tree, or a remark."""
    file = folder / PACKAGE / broken.file
    text = file.read_text()
    if (count := text.count(broken.old)) != 1:
        return f"{broken.file} holds {broken.old!r} {count} times, not once"
    file.write_text(text.replace(broken.old, broken.new))
    tests = [f"tests/test_{name}.py" for name in broken.tests.split()]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    # The copy comes before a package that was installed with pip install -e.
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    finally:
        file.write_text(text)
    failed = re.search(r"^(?:FAILED|ERROR) \S*?::(\S+)", run.stdout, re.MULTILINE)
    return f"found by {failed[1]}" if run.returncode == 1 and failed else "NOT FOUND"


def main() -> None:
    """Break each rule and print what found it."""
    word, missed = sys.argv[1] if len(sys.argv) > 1 else "", 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "tree"
        ignored = shutil.ignore_patterns(".*", "__pycache__", "runs")
        shutil.copytree(ROOT, folder, ignore=ignored)
        for broken in BREAKS:
            if word in broken.rule:
                result = find(broken, folder)
                missed += not result.startswith("found")
                print(f"{broken.rule:60} {result}", flush=True)
    sys.exit(missed)


if __name__ == "__main__":
    main()
