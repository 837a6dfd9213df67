"""A safetensors file under a checksum of its bytes: written whole or not at all, read warily."""

import fcntl
import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import mlx.core as mx

CHECKSUM = b'"checksum":"%s"'
BLANK = b"0" * 64
"""What stands in place of the checksum while it is computed."""

DTYPES = {
    **{"BOOL": mx.bool_, "F16": mx.float16, "BF16": mx.bfloat16, "F32": mx.float32},
    **{"U8": mx.uint8, "U16": mx.uint16, "U32": mx.uint32, "U64": mx.uint64},
    **{"I8": mx.int8, "I16": mx.int16, "I32": mx.int32, "I64": mx.int64, "C64": mx.complex64},
}


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, or does not fit; nothing was changed, or it says so.

    Attributes:
        differences: All that does not fit, a line each; the message shows the first ones.
    """

    def __init__(self, message: str, differences: Iterable[str] = ()):
        super().__init__(message)
        self.differences = tuple(differences)


class Kind(NamedTuple):
    """Dtype and shape of an array."""

    dtype: mx.Dtype
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{str(self.dtype).rpartition('.')[2]} {self.shape}"


def kind_of(array: Any) -> Kind:
    """Dtype and shape of an array, or of the number that stands for one."""
    array = mx.array(array) if isinstance(array, (int, float)) else array
    return Kind(array.dtype, tuple(array.shape))


@dataclass(frozen=True)
class Sealed:
    """An undamaged file.

    Attributes:
        metadata: Text by name.
        kinds: Dtype and shape of each array.
        arrays: The arrays, not yet read from the disk.
    """

    metadata: Mapping[str, str]
    kinds: Mapping[str, Kind]
    arrays: dict[str, mx.array]


def write(path: Path, arrays: dict[str, mx.array], metadata: Mapping[str, str]) -> None:
    """Write beside the place, sync, rename: a reader finds the old file or the new one, whole."""
    # One name, so that what a killed process left is written over, not gathered.
    beside = path.with_name(f".{path.name}.partial.safetensors")
    try:
        if not path.parent.exists():
            raise FileNotFoundError(f"folder {path.parent} does not exist")
        mx.save_safetensors(str(beside), arrays, {**metadata, "checksum": BLANK.decode()})
        _seal(beside)
        os.replace(beside, path)
        _sync_folder(path.parent)
    except (OSError, ValueError, RuntimeError) as problem:
        beside.unlink(missing_ok=True)
        raise CheckpointError(f"{path} was not written: {problem}") from problem


def read(path: Path, formats: tuple[str, ...]) -> Sealed:
    """Check every byte of a file against its checksum, and its header against itself.

    Raises:
        CheckpointError: It is damaged, of another format, or no checkpoint at all.
    """
    try:
        with path.open("rb") as file:
            header = _header(file)
            entries = json.loads(header.decode(), object_pairs_hook=_table)
            if not isinstance(entries, dict):
                raise ValueError("its header is no table")
            metadata = _metadata(path, entries.pop("__metadata__", None), formats)
            if _checksum(file, header, metadata["checksum"]) != metadata["checksum"]:
                raise CheckpointError(f"{path} is damaged or incomplete: load an older checkpoint")
            kinds = _kinds(entries, file.tell() - 8 - len(header))
        arrays = cast(dict[str, mx.array], mx.load(str(path), format="safetensors"))
        if {name: kind_of(array) for name, array in arrays.items()} != kinds:
            raise ValueError("its header can be read in two ways")
    except IsADirectoryError:
        raise CheckpointError(f"{path} is a folder") from None
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except CheckpointError:
        raise
    except (OSError, ValueError, AttributeError, RuntimeError, MemoryError) as problem:
        raise CheckpointError(
            f"{path} is damaged or no checkpoint ({problem}): load an older one"
        ) from problem
    return Sealed(metadata, kinds, arrays)


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(table := dict(pairs)) < len(pairs):
        raise ValueError("its header says something twice")
    return table


def _metadata(path: Path, metadata: Any, formats: tuple[str, ...]) -> dict[str, str]:
    """The metadata, if ``write`` made them and the format is known."""
    if not isinstance(metadata, dict) or not metadata.keys() & {"checksum", "run"}:
        raise CheckpointError(
            f"{path} holds weights alone, as mlx-lm and model.save_weights write them: "
            "use model.load_weights(path) for it, with strict=False if they are adapters"
        )
    if not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("its metadata are not text")
    if (number := metadata.get("format", "none")) not in formats:
        raise CheckpointError(
            f"{path} is a checkpoint of format {number[:20]!r}, and this version reads "
            f"{' and '.join(formats)}: load it with the version that wrote it"
        )
    if "checksum" not in metadata:
        raise ValueError("it has no checksum")
    return metadata


def _kinds(entries: Mapping[str, Any], size: int) -> dict[str, Kind]:
    """Dtype and shape of each array, if the arrays fill the file from end to end."""
    kinds, spans = {}, []
    for name, entry in entries.items():
        shape, span = entry.get("shape"), entry.get("data_offsets")
        numbers = [*shape, *span] if isinstance(shape, list) and isinstance(span, list) else [-1]
        sizes = len(numbers) < 32 and all(type(n) is int and 0 <= n < 1 << 63 for n in numbers)
        if not sizes or len(span) != 2:
            raise ValueError(f"its entry of {name[:100]!r} is none")
        kinds[name] = Kind(DTYPES[_text(entry.get("dtype"))], tuple(shape))
        if span[1] - span[0] != math.prod(shape) * kinds[name].dtype.size:
            raise ValueError(f"{name[:100]!r} has not the bytes of its shape")
        spans.append(span)
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise ValueError("its arrays overlap, or leave gaps")
        end = stop
    if end != size:
        raise ValueError("its arrays do not fill it")
    return kinds


def _text(dtype: Any) -> str:
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError("it holds an array of an unknown dtype")
    return dtype


def _header(file: BinaryIO) -> bytes:
    """The first bytes of a safetensors file: eight for a length, then JSON of that length."""
    length = file.read(8)
    size = int.from_bytes(length, "little")
    if len(length) < 8 or size > os.fstat(file.fileno()).st_size - 8:
        raise ValueError("its header is incomplete")
    return file.read(size)


def _checksum(file: BinaryIO, header: bytes, stands: str) -> str:
    """SHA-256 of the whole file, as it was when blanks stood in place of the checksum."""
    blank = header.replace(CHECKSUM % stands.encode(), CHECKSUM % BLANK, 1)
    digest = hashlib.sha256(len(header).to_bytes(8, "little") + blank)
    file.seek(8 + len(header))
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _seal(path: Path) -> None:
    """Write the checksum into its blanks, and everything to the disk."""
    with path.open("r+b") as file:
        header = _header(file)
        checksum = _checksum(file, header, BLANK.decode())
        file.seek(8 + header.index(CHECKSUM % BLANK))
        file.write(CHECKSUM % checksum.encode())
        file.flush()
        # On macOS fsync leaves the data in the drive's cache; F_FULLFSYNC does not.
        if full_sync := getattr(fcntl, "F_FULLFSYNC", None):
            fcntl.fcntl(file.fileno(), full_sync)
        else:
            os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable, where the file system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
