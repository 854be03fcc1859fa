"""Files that are in memory only, because TenSEAL reads and writes nothing but files, keys included."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from propolis.secure.errors import UsageError


def saved_bytes(thing: Any) -> bytes:
    """What a thing of SEAL's saves."""
    with memory_file() as path:
        thing.save(path)
        return Path(path).read_bytes()


@contextmanager
def memory_file(content: bytes = b"") -> Iterator[str]:
    """The path of a file in memory, which goes with the block.

    Raises:
        UsageError: the system has none, or no memory.
    """
    try:
        descriptor = os.memfd_create("propolis")
    except (AttributeError, OSError):
        raise UsageError("homomorphic encryption needs Linux's files in memory (memfd_create)") from None
    with os.fdopen(descriptor, "wb", 0) as file:
        if content and file.write(content) != len(content):
            raise UsageError("there is no memory for a ciphertext")
        yield f"/proc/self/fd/{descriptor}"
