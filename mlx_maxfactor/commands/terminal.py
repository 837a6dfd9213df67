"""What the commands share: one-line errors, tables, Ctrl-C."""

import argparse
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage.

    Args:
        raw: Keep the line breaks of the description and the epilog.
    """

    def __init__(self, *arguments: Any, raw: bool = False, **options: Any):
        formatter = argparse.RawDescriptionHelpFormatter if raw else argparse.HelpFormatter
        super().__init__(*arguments, **{"formatter_class": formatter, **options})

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with status 2."""
        sys.stdout.flush()  # so that the error comes last where both go to one file
        self.exit(2, f"{self.prog}: error: {message}\n")


def integer(argument: str) -> int:
    """A whole number of at least 1."""
    value = int(argument)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {argument}")
    return value


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns, the first one to the left and the others to the right. The first row is the head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(row: Sequence[str]) -> str:
        first, *others = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        cells = [cell.strip().rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        return "  ".join([first, *cells]).rstrip()

    head, *body = map(line, rows)
    return "\n".join([head, "  ".join("-" * width for width in widths), *body])


@contextmanager
def catching_interrupts(note: Callable[[], None]) -> Iterator[list[int]]:
    """Collect Ctrl-C in a list, so that the current step can end. A second one stops at once.

    Args:
        note: Called at the first Ctrl-C, to tell the user.
    """
    caught: list[int] = []

    def catch(number: int, _: Any) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        caught.append(number)
        with suppress(RuntimeError):  # the signal may come while the same stream is written
            note()

    before = signal.signal(signal.SIGINT, catch)
    try:
        yield caught
    except RuntimeError:
        if caught:  # Ctrl-C also reached a compiler that MLX was waiting for
            raise KeyboardInterrupt from None
        raise
    finally:
        signal.signal(signal.SIGINT, before)
