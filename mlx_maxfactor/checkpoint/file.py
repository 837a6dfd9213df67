"""A safetensors file with a checksum: written completely or not at all, verified when read."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO, cast

import mlx.core as mx

Contents = tuple[dict[str, str], dict[str, mx.array]]
"""Metadata and arrays."""

CHECKSUM = b'"checksum":"%s"'
BLANK = b"0" * 64
"""Placeholder of the checksum while it is computed."""

LARGEST_HEADER = 100_000_000 - 1
"""The longest header, in bytes, that MLX reads."""

UNSUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTTY}
"""Errors from a file system that cannot sync."""

_WRITING = Lock()
"""Two threads that write to one path would share its temporary file."""


class CheckpointError(ValueError):
    """A checkpoint cannot be written or does not fit. If anything was changed, the message says so.

    Attributes:
        problem: The message without the remedy.
        differences: Everything that does not fit, one line each. The message shows the first ones.
        remedy: What to do about it in a program. Empty: the problem says it.
    """

    def __init__(self, problem: str, differences: Iterable[str] = (), remedy: str = ""):
        between = "\n" if "\n" in problem else ": "
        super().__init__(f"{problem}{between}{remedy}" if remedy else problem)
        self.problem, self.differences, self.remedy = problem, tuple(differences), remedy


def kind_of(array: mx.array) -> str:
    """Dtype and shape of an array."""
    return f"{str(array.dtype).rpartition('.')[2]} {tuple(array.shape)}"


def write(path: Path, arrays: dict[str, mx.array], metadata: Mapping[str, str]) -> None:
    """Write to a temporary file, sync, rename. A reader finds the complete old or new file.

    A link is followed. The mode of an existing file is kept. Threads write one after the other.
    """
    with _WRITING:
        try:
            check_target(path)
            _write(Path(os.path.realpath(path)), arrays, metadata)
        except CheckpointError:
            raise
        except (OSError, ValueError, RuntimeError) as problem:
            raise CheckpointError(f"{path} was not written: {problem}") from problem


def check_target(path: Path) -> None:
    """Raise if no checkpoint can be written there, whatever is in it.

    Raises:
        CheckpointError: It is a folder, a device, or a name that MLX cannot write.
    """
    if path.name in ("", "..") or path.is_dir():
        raise CheckpointError(f"{path} is a folder: name a file in it")
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path} is a device or a pipe: name a file")
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise CheckpointError(f"{path!r} is not UTF-8, which MLX cannot write: rename it") from None


def _write(path: Path, arrays: dict[str, mx.array], metadata: Mapping[str, str]) -> None:
    # One name per target, so that the next save overwrites what a killed process left. The name is
    # short, because file systems limit names to 255 bytes.
    name = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]
    beside = path.with_name(f".{name}.partial.safetensors")
    if not path.parent.exists():
        raise FileNotFoundError(f"folder {path.parent} does not exist")
    try:
        mx.save_safetensors(str(beside), arrays, {**metadata, "checksum": BLANK.decode()})
        _seal(beside)
        if path.exists():
            shutil.copymode(path, beside)
        os.replace(beside, path)
    except BaseException:
        with suppress(OSError):  # the first error is the one to report
            beside.unlink()
        raise
    _sync_folder(path.parent)


def read(path: Path, formats: tuple[str, ...]) -> Contents:
    """Open a file, after checking its bytes against the checksum.

    Returns:
        The metadata, and the arrays, which are not yet read from the disk.

    Raises:
        CheckpointError: The file is damaged, has another format, or is not a checkpoint.
    """
    try:
        with path.open("rb") as file:
            header = _header(file)
            metadata = _metadata(path, json.loads(header.decode()).get("__metadata__"), formats)
            if _checksum(file, header, metadata["checksum"]) != metadata["checksum"]:
                raise CheckpointError(f"{path} is damaged or incomplete: load an older checkpoint")
            arrays = cast(dict[str, mx.array], mx.load(str(path), format="safetensors"))
            if not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return read(path, formats)  # a save has replaced the file meanwhile
    except CheckpointError:
        raise
    except OSError as problem:
        raise CheckpointError(f"{path} cannot be read: {problem.strerror}") from problem
    except (ValueError, LookupError, AttributeError, RuntimeError, MemoryError) as problem:
        raise CheckpointError(
            f"{path} is damaged or no checkpoint ({problem}): load an older one"
        ) from problem
    return metadata, arrays


def _metadata(path: Path, metadata: Any, formats: tuple[str, ...]) -> dict[str, str]:
    """Return the metadata, if ``write`` made them and the format is known."""
    if not isinstance(metadata, dict) or "run" not in metadata:
        raise CheckpointError(
            f"{path} holds weights alone, as mlx-lm and model.save_weights write them",
            remedy="use model.load_weights(path) for it, with strict=False if they are adapters",
        )
    if (number := metadata.get("format", "none")) not in formats:
        raise CheckpointError(
            f"{path} is a checkpoint of format {number!r:.22}, and this version reads "
            f"{' and '.join(formats)}: load it with the version of mlx_maxfactor that wrote it"
        )
    return metadata


def _header(file: BinaryIO) -> bytes:
    """The JSON header of a safetensors file. The first eight bytes hold its length."""
    length = file.read(8)
    size = int.from_bytes(length, "little")
    if len(length) < 8 or size > os.fstat(file.fileno()).st_size - 8:
        raise ValueError("its header is incomplete")
    return file.read(size)


def _checksum(file: BinaryIO, header: bytes, stands: str) -> str:
    """SHA-256 of the whole file, with the checksum replaced by its placeholder."""
    blank = header.replace(CHECKSUM % stands.encode(), CHECKSUM % BLANK, 1)
    digest = hashlib.sha256(len(header).to_bytes(8, "little") + blank)
    file.seek(8 + len(header))
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _seal(path: Path) -> None:
    """Replace the placeholder by the checksum, and sync the file to the disk."""
    with path.open("r+b") as file:
        header = _header(file)
        if len(header) > LARGEST_HEADER:
            raise ValueError(
                f"extra, names and the description of the run take {len(header) / 1e6:.0f} MB, and "
                f"MLX reads at most {LARGEST_HEADER / 1e6:.0f}: keep what is large in another file"
            )
        checksum = _checksum(file, header, BLANK.decode())
        file.seek(8 + header.index(CHECKSUM % BLANK))
        file.write(CHECKSUM % checksum.encode())
        file.flush()
        _sync(file.fileno())


def _sync(descriptor: int) -> None:
    """Write a file through to the disk, as far as its file system can."""
    # On macOS fsync leaves the data in the drive's cache. F_FULLFSYNC does not, but SMB, NTFS
    # and WebDAV refuse it.
    ways: list[Callable[[int], Any]] = [os.fsync]
    if full_sync := getattr(fcntl, "F_FULLFSYNC", None):
        ways.insert(0, lambda opened: fcntl.fcntl(opened, full_sync))
    for sync in ways:
        try:
            sync(descriptor)
            return
        except OSError as problem:
            if problem.errno not in UNSUPPORTED:
                raise


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable, if the file system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
