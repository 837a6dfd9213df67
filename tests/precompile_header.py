"""Precompile the header of MLX's CPU kernels: a new kernel then takes g++ 0.1 s instead of 0.4.

g++ uses ``HEADER.gch`` beside a header if it was made with the same flags. This script records the
command that MLX runs, makes the file with its flags, and asks g++ whether it is used; if not, the
file is removed. g++ does not see that a header has changed: run this again after upgrading MLX.
"""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

HEADER = "mlx/backend/cpu/compiled_preamble.h"


def flags_of_mlx(folder: Path, compiler: str) -> list[str]:
    """The flags that MLX gives g++, recorded by a script that comes before it in the path."""
    record, spy = folder / "arguments", folder / "g++"
    record.touch()
    spy.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >"{record}"\nexec "{compiler}" "$@"\n')
    spy.chmod(0o755)
    os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ['PATH']}"
    os.environ["TMPDIR"] = str(folder)  # where MLX looks for kernels that are already compiled
    import mlx.core as mx

    with mx.stream(mx.cpu):
        mx.eval(mx.compile(lambda x: mx.exp(x) * x)(mx.ones(8)))
    arguments = record.read_text().splitlines()
    return arguments[: -arguments[::-1].index("-o") - 2] if "-o" in arguments else []


def precompile(folder: Path, compiler: str) -> str:
    """Make the file beside the header, and return a message: where it is, or what went wrong."""
    command = [compiler, *(flag for flag in flags_of_mlx(folder, compiler) if flag != "-shared")]
    header = next((Path(flag, HEADER) for flag in command if Path(flag, HEADER).is_file()), None)
    if header is None:
        return f"not precompiled: MLX ran {command}, without a folder that has {HEADER}"
    made, partial, kernel = Path(f"{header}.gch"), Path(f"{header}.partial"), folder / "kernel.cpp"
    kernel.write_text(f'#include "{HEADER}"\n')
    make = [*command, "-x", "c++-header", str(header), "-o", str(partial)]
    run = subprocess.run(make, capture_output=True, text=True)
    if run.returncode:
        return f"not precompiled: {make} failed\n{run.stderr}"
    partial.replace(made)
    # -H marks a precompiled header that is used with "!".
    check = [*command, "-H", "-Winvalid-pch", "-fsyntax-only", str(kernel)]
    run = subprocess.run(check, capture_output=True, text=True)
    if f"! {made}" in run.stderr:
        return f"precompiled: {made}"
    made.unlink()
    reasons = [line for line in run.stderr.splitlines() if "[-Winvalid-pch]" in line]
    return "\n".join([f"not precompiled: g++ does not use it in {check}", *reasons])


def main() -> None:
    """Precompile the header, or say why not; never fail, since all works without."""
    compiler = shutil.which("g++")
    with tempfile.TemporaryDirectory() as folder:
        print(precompile(Path(folder), compiler) if compiler else "not precompiled: no g++")


if __name__ == "__main__":
    main()
