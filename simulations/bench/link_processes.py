"""A federation as processes on this machine: the server command on loopback, and device commands with certificates."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from propolis.secure.errors import PropolisError
from propolis.simulations.bench.memory import resident_of
from propolis.simulations.federation import device_folder
from propolis.simulations.linked import SERVER_FOLDER

_LISTENING, _CONNECTED = "listening", "device connected"
_POLL_S = 0.05
_START_DEADLINE_S, _END_DEADLINE_S = 60.0, 20.0


@dataclass(frozen=True, slots=True)
class Serving:
    """What a server process runs.

    Attributes:
        app: MODULE:NAME of a ServerApp that writes its figures to the file ``out`` of the run's configuration.
        devices: that it waits for.
        config: of the run.
        heartbeat: seconds.
        deadline_s: seconds for all of it, with the devices' start; the app is told of it as ``timeout``.
    """

    app: str
    devices: int
    config: Mapping[str, Any]
    heartbeat: int = 10
    deadline_s: float = 120.0


@dataclass(frozen=True, slots=True)
class Process:
    """A process of ours and what it writes to its standard error."""

    popen: subprocess.Popen[str]
    log: Path

    @property
    def last_line(self) -> str:
        """The last thing it said."""
        return (self.log.read_text(errors="replace").strip().splitlines() or ["it said nothing"])[-1]

    def go(self) -> None:
        """Send the line that a process waits for before it begins."""
        if self.popen.stdin is not None:
            self.popen.stdin.write("\n")
            self.popen.stdin.flush()

    def wait(self, seconds: float) -> None:
        """Wait until it has ended well; raises PropolisError when it did not, or not in time."""
        try:
            code = self.popen.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            raise PropolisError(f"{self.log.stem} did not end in time; its last line: {self.last_line}") from None
        if code:
            raise PropolisError(f"{self.log.stem} exited with {code}: {self.last_line}")


@dataclass(frozen=True, slots=True)
class Server:
    """A server process that listens.

    Attributes:
        port: for the devices.
        process: the process.
        out: file that its app's figures go to.
        deadline: on the monotonic clock.
    """

    port: int
    process: Process
    out: Path
    deadline: float

    @property
    def address(self) -> str:
        """Where the devices connect."""
        return f"127.0.0.1:{self.port}"

    def resident(self) -> int:
        """Bytes of the process in memory."""
        return resident_of(self.process.popen.pid)

    def streams(self) -> int:
        """How many the devices have begun until now."""
        return sum(1 for _ in _entries(self.process.log, _CONNECTED))

    def figures(self) -> dict[str, Any]:
        """What its app wrote, as soon as the process has ended; raises PropolisError when it failed."""
        self.process.wait(self.deadline - time.monotonic())
        found: dict[str, Any] = json.loads(self.out.read_text(encoding="utf-8"))
        return found


@contextmanager
def started(module: str, arguments: Sequence[str], log: Path) -> Iterator[Process]:
    """``python -m MODULE ARGUMENTS``, ended with the context whatever happens."""
    command = [sys.executable, "-m", module, *arguments]
    with log.open("w") as errors:
        popen = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=errors, text=True, start_new_session=True
        )
    try:
        yield Process(popen, log)
    finally:
        popen.terminate()
        try:
            popen.wait(_END_DEADLINE_S)
        except subprocess.TimeoutExpired:
            popen.kill()
            popen.wait()


@contextmanager
def served(folder: Path, serving: Serving) -> Iterator[Server]:
    """The server of the federation in `folder`, as soon as it listens.

    Raises:
        PropolisError: it does not, in time.
    """
    deadline, out = time.monotonic() + serving.deadline_s, folder / "figures.json"
    out.unlink(missing_ok=True)
    config = folder / "server.toml"
    config.write_text(tomli_w.dumps(_settings(folder, serving, out)), encoding="utf-8")
    with started("propolis", ["server", "--config", str(config)], folder / "server.log") as process:
        yield Server(listening_port(process), process, out, deadline)


@contextmanager
def attending(folder: Path, devices: int, address: str, app: str) -> Iterator[None]:
    """So many device processes of the federation in `folder`; they leave when the run is over."""
    with ExitStack() as ending:
        for index in range(devices):
            arguments = ["client", "run", "--dir", str(device_folder(folder, index)), "--server", address]
            log = folder / f"device-{index}.log"
            ending.enter_context(started("propolis", [*arguments, "--app", app, "--once"], log))
        yield


def listening_port(process: Process) -> int:
    """Where a server process listens, as soon as it says so in JSON; raises PropolisError when it does not."""
    wait_until(lambda: any(_entries(process.log, _LISTENING)), process, _START_DEADLINE_S)
    port: int = next(_entries(process.log, _LISTENING))["port"]
    return port


def wait_until(condition: Callable[[], bool], process: Process, seconds: float) -> None:
    """Wait for something that a process does; raises PropolisError when it has ended, or it takes too long."""
    deadline = time.monotonic() + seconds
    while not condition():
        if process.popen.poll() is not None or time.monotonic() > deadline:
            raise PropolisError(f"{process.log.stem} did not do its part in time; its last line: {process.last_line}")
        time.sleep(_POLL_S)


def _settings(folder: Path, serving: Serving, out: Path) -> dict[str, Any]:
    server = {
        "federation": str(folder / SERVER_FOLDER),
        "listen": "127.0.0.1:0",
        "enroll": "none",
        "out": str(folder / "run"),
        "wait_for": serving.devices,
        "wait_seconds": serving.deadline_s,
        "app": serving.app,
        "heartbeat": serving.heartbeat,
        "log_format": "json",
    }
    told = {"nodes": serving.devices, "timeout": serving.deadline_s, **serving.config, "out": str(out)}
    return {"server": server, "run-config": told}


def _entries(log: Path, message: str) -> Iterator[dict[str, Any]]:
    """What a process has said under this heading."""
    for line in log.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.startswith("{") and line.endswith("\n") and (entry := json.loads(line))["message"] == message:
            yield entry
