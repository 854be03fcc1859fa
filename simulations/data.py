"""Readers of public data formats: IDX (LeCun's MNIST files, plain or gzipped)."""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np

from propolis.secure.errors import UsageError

_UNSIGNED_BYTE = 0x08


def read_idx(folder: Path, name: str, dimensions: int) -> np.ndarray:
    """One IDX file of unsigned bytes.

    The format: two zero bytes, the type, the number of dimensions, each dimension as a big-endian uint32, then the
    data in C order (yann.lecun.com/exdb/mnist, "The IDX file format").

    Args:
        folder: where the file or its ``.gz`` lies.
        name: file name without ``.gz``.
        dimensions: expected number of dimensions.

    Returns:
        uint8 array of the file's shape, read-only.

    Raises:
        UsageError: the file is missing, or its magic number or length is wrong.
    """
    path, data = _read(folder, name)
    magic = bytes((0, 0, _UNSIGNED_BYTE, dimensions))
    if data[:4] != magic:
        raise UsageError(f"{path}: expected the magic number {magic.hex()}, got {data[:4].hex() or 'an empty file'}")
    header = 4 + 4 * dimensions
    if len(data) < header:
        raise UsageError(f"{path}: the header is cut off after {len(data)} bytes")
    shape = struct.unpack(f">{dimensions}I", data[4:header])
    expected = header + int(np.prod(shape, dtype=object))
    if len(data) != expected:
        raise UsageError(f"{path}: expected {expected} bytes for shape {shape}, got {len(data)}")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def _read(folder: Path, name: str) -> tuple[Path, bytes]:
    plain, packed = folder / name, folder / f"{name}.gz"
    path = plain if plain.exists() else packed
    try:
        return path, plain.read_bytes() if path == plain else gzip.decompress(packed.read_bytes())
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UsageError(f"{path} is not a whole gzip file: {error}") from None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
