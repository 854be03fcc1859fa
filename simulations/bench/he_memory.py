"""A large model from many devices through a server process, whose memory is looked at."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from rich.console import Console
from rich.progress import Progress

from propolis.secure.errors import PeerError, PropolisError
from propolis.secure.he.parameters import choose
from propolis.secure.he.stream import Declared, encrypt_vector, open_vector
from propolis.secure.he.tag import tag_bytes
from propolis.simulations.bench.he_sides import Key

_CLIENTS, _BITS = 1000, 16
_SERVER = "propolis.simulations.bench.he_server"
_END_S = 60.0


@dataclass(frozen=True, slots=True)
class Seen:
    """Of the server process.

    Attributes:
        peak: most memory, in bytes.
        add_s: seconds to read and add an upload, median.
        upload: bytes of one.
        steps: largest error of the sum.
    """

    peak: float
    add_s: float
    upload: int
    steps: float


def streamed(parameters: int, devices: int) -> Seen:
    """Send a model of so many 16-bit parameters from each of the devices, and open the sum.

    Raises:
        PropolisError: the server process failed.
    """
    key = Key(choose(_CLIENTS, _BITS), parameters)
    size = key.scheme.upload_bytes + tag_bytes(key.parameters)
    with tempfile.TemporaryDirectory(prefix="propolis-bench-") as name:
        out, log = Path(name) / "figures.json", Path(name) / "server.log"
        arguments = [_CLIENTS, _BITS, key.public.key_id.hex(), key.chunks, devices, out]
        with _started(arguments, log) as server:
            steps = _exchanged(key, server, parameters, devices, size)
        return Seen(**json.loads(out.read_text(encoding="utf-8")), upload=size * key.chunks, steps=steps)


@contextmanager
def _started(arguments: Sequence[object], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The server process, which ends in this block; raises PropolisError when it fails."""
    command = [sys.executable, "-m", _SERVER, *map(str, arguments)]
    fault: Exception | None = None
    with (
        log.open("w") as errors,
        suppress(BrokenPipeError),  # at its end, Popen writes what is left to a pipe that may be gone
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors) as server,
    ):
        try:
            try:
                yield server
            except (BrokenPipeError, PeerError) as error:  # it ended before its time, perhaps
                fault = error
            server.wait(_END_S)
        except subprocess.TimeoutExpired as error:
            fault = error
        finally:
            server.kill()
    if server.returncode:
        last = (log.read_text(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
        raise PropolisError(f"the server process exited with {server.returncode}: {last}") from fault
    if fault is not None:
        raise fault


def _exchanged(key: Key, server: subprocess.Popen[bytes], parameters: int, devices: int, size: int) -> float:
    """Send all, open what comes back; the largest error."""
    assert server.stdin is not None  # noqa: S101, both are pipes
    assert server.stdout is not None  # noqa: S101
    drawn, encryptor = np.random.default_rng(0), key.encryptor()
    total, half = np.zeros(parameters, np.int64), 1 << _BITS - 1
    with Progress(console=Console(stderr=True), transient=True) as progress:
        shown = progress.add_task("encrypting", total=devices * key.chunks)
        for device in range(devices):
            values = drawn.integers(-half, half, parameters)
            total += values
            for data in encrypt_vector(values, encryptor, key.tags, device):
                server.stdin.write(data)
                progress.advance(shown)
        server.stdin.close()
    declared = Declared(range(devices), devices, parameters)
    opened = open_vector(_pieces(server.stdout, size), key.decryptor(), key.tags, declared)
    return float(np.abs(opened - total).max())


def _pieces(stream: IO[bytes], size: int) -> Iterator[bytes]:
    return iter(lambda: stream.read(size), b"")
