"""Break one rule of the package at a time, and see whether the tests find it.

    python tests/break_rules.py            # all of broken_rules.txt, in a copy of the tree
    python tests/break_rules.py Schedule   # those whose description has this text

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


class Break(NamedTuple):
    """A rule, the text in a file that follows it, a text that breaks it, and the tests to run.

    ``twins:muon`` runs those of test_twins.py whose name or case has this word.
    """

    rule: str
    file: str
    tests: str
    old: str
    new: str


def read() -> list[Break]:
    """The entries of broken_rules.txt."""
    breaks = []
    for entry in (ROOT / "tests" / "broken_rules.txt").read_text().strip().split("\n\n")[1:]:
        head, *lines = entry.split("\n")
        texts = ["\n".join(line[1:] for line in lines if line[0] == sign) for sign in "-+"]
        breaks.append(Break(*head.split(" | "), *texts))
    return breaks


def find(broken: Break, folder: Path) -> str:
    """The first test that fails when the rule is broken in a copy of the tree, or a remark."""
    file = folder / "mlx_maxfactor" / broken.file
    text = file.read_text()
    if (count := text.count(broken.old)) != 1:
        return f"{broken.file} holds {broken.old!r} {count} times, not once"
    names, _, word = broken.tests.partition(":")
    tests = [f"tests/test_{name}.py" for name in names.split()]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    command += ["-k", word] if word else []
    # The copy comes before a package that was installed with pip install -e.
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    file.write_text(text.replace(broken.old, broken.new))
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    file.write_text(text)
    failed = re.search(r"^(?:FAILED|ERROR) \S*?::(\w+)", run.stdout, re.MULTILINE)
    return f"found by {failed[1]}" if run.returncode == 1 and failed else "NOT FOUND"


def main() -> None:
    """Break each rule and print what found it."""
    word, missed = sys.argv[1] if len(sys.argv) > 1 else "", 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "tree"
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", "__pycache__", "runs"))
        for broken in read():
            if word in broken.rule:
                result = find(broken, folder)
                missed += not result.startswith("found")
                print(f"{broken.rule:60} {result}", flush=True)
    sys.exit(missed)


if __name__ == "__main__":
    main()
