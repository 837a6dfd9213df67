"""Choose the subcommand, and import only what it needs."""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version

from .terminal import OneLineParser, plain_output

COMMANDS = {
    "fits": ("estimate the peak memory of a training step", "mlx-maxfactor fits ./my_model"),
    "lora": ("fine-tune with mlx-lm", "mlx-maxfactor lora --model ./my_model --data ./my_data"),
    "check": ("test the optimizers on this machine", "mlx-maxfactor check"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Args:
        argv: The arguments. None: those of the process.

    Returns:
        The exit status: 0 for success.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = make_parser()
    if not arguments:
        parser.print_help()
        return 2
    try:
        with plain_output():
            return run(parser, arguments)
    except KeyboardInterrupt:
        parser.exit(130, "\ninterrupted\n")
    except OSError as problem:  # of the output: commands report those of their files
        parser.exit(1, f"{parser.prog}: error: the output was not written: {problem}\n")


def make_parser() -> OneLineParser:
    """The command line before that of the command."""
    width = max(map(len, COMMANDS))
    lines = [
        f"  {name:{width}}  {what}\n{'':{width}}    {example}"
        for name, (what, example) in COMMANDS.items()
    ]
    parser = OneLineParser(
        prog="mlx-maxfactor",
        usage="mlx-maxfactor COMMAND ...",
        description="commands (--help of each has more):\n" + "\n".join(lines),
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=", ".join(COMMANDS))
    parser.add_argument("--version", action="version", version=version("mlx_maxfactor"))
    return parser


def run(parser: OneLineParser, arguments: Sequence[str]) -> int:
    """Import the command and run it."""
    command = parser.parse_args(arguments[:1]).command
    try:
        module = import_module(f".{command}", __package__)
    except ModuleNotFoundError as missing:
        name = str(missing.name).partition(".")[0]
        parser.error(f"{command} needs {name}: pip install mlx-lm")
    return module.main(arguments[1:])
