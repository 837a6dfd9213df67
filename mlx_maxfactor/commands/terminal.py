"""What the commands share: one-line errors, tables, signals."""

import argparse
import io
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

BAD_INPUT = (ArithmeticError, ImportError, KeyError, OSError, RuntimeError, TypeError, ValueError)
"""What reading the user's files and settings may raise."""


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage, and whose help keeps line breaks."""

    def __init__(self, formatter_class: Any = argparse.RawDescriptionHelpFormatter, **options: Any):
        super().__init__(formatter_class=formatter_class, **options)

    def error(self, message: str | BaseException) -> NoReturn:
        """Print one line and exit with status 2."""
        sys.stdout.flush()  # so that the error comes last where both go to one file
        self.exit(2, f"{self.prog}: error: {one_line(message)}\n")


def one_line(problem: str | BaseException) -> str:
    """A message, or that of an exception, in one line. A list of thousands of names is cut."""
    text = str(problem.args[0] if isinstance(problem, KeyError) else problem)
    text, most = " ".join(text.split()), 800
    cut = f"{text[: most // 2]} ... {text[-most // 2 :]}"
    return text if len(text) <= most else cut


def integer(argument: str) -> int:
    """A whole number of at least 1."""
    value = int(argument)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {argument}")
    return value


@contextmanager
def plain_output() -> Iterator[None]:
    """No failure at a character that the terminal lacks or a closed pipe; warnings in one line."""
    formatted = warnings.formatwarning
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell
            setattr(sys, name, io.StringIO())
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        warnings.formatwarning = formatted
        try:
            sys.stdout.flush()
        except OSError:
            silence(sys.stdout)  # Python would try again at its end, and print a traceback
            raise


def silence(stream: Any) -> None:
    """Send what is written to a stream from now on to nowhere."""
    with suppress(OSError), open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


@contextmanager
def catching_interrupts(note: Callable[[], None]) -> Iterator[list[int]]:
    """Collect signals that end a program in a list, so that the current step can end.

    These are Ctrl-C, SIGTERM and SIGHUP. A second one stops at once. What the program was started
    to ignore, as by nohup, stays ignored.

    Args:
        note: Called at the first signal, to tell the user.
    """
    caught: list[int] = []
    # Asked now: one that is gone is no terminal.
    terminals = [stream for stream in (sys.stdout, sys.stderr) if stream.isatty()]

    def catch(number: int, _: Any) -> None:
        for each, handler in before.items():
            signal.signal(each, handler)
        caught.append(number)
        if number not in (signal.SIGINT, signal.SIGTERM):  # SIGHUP: the terminal is gone
            for stream in terminals:
                silence(stream)
        with suppress(RuntimeError, OSError):  # the same stream may be written at this moment
            note()

    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    before = {n: x for n, x in handlers.items() if x not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, catch)
    try:
        yield caught
    except RuntimeError:
        if caught:  # Ctrl-C also reached a compiler that MLX was waiting for
            raise KeyboardInterrupt from None
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
