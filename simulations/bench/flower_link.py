"""The peer of our link: the echo app on the installed Flower's own SuperLink and SuperNodes, on loopback."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from propolis.secure.errors import PropolisError
from propolis.simulations.bench import echo_app

_HOST, _NAME = "127.0.0.1", "bench"
_POLL_S = 0.1
_ASK_EVERY_S = 60.0  # seldom: a `flwr` takes seconds of processor time to start, which the nodes need
_COMMAND_DEADLINE_S = 120.0
_END_DEADLINE_S = 10.0


def exchange_times(nodes: int, parameters: int, exchanges: int, deadline_s: float) -> list[float]:
    """Seconds that each exchange with all nodes took, as the ServerApp saw it.

    Everything runs in a scratch folder and is ended whatever happens.

    Args:
        nodes: SuperNodes to start.
        parameters: float32 values that go to each of them and come back.
        exchanges: how often, one after the other.
        deadline_s: seconds for all of it, but for the ending.

    Raises:
        PropolisError: the run failed or took too long; the message says what Flower says of it.
    """
    if not Path("/proc/self/environ").exists():
        raise PropolisError("the processes that Flower starts are found through /proc, which is not here")
    deadline = time.monotonic() + deadline_s
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, _engine(Path(folder), nodes) as engine:
        out = Path(folder) / "figures.json"
        config = {"exchanges": exchanges, "parameters": parameters, "nodes": nodes, "timeout": deadline_s}
        _write_app(Path(folder) / "app", {**config, "out": str(out)})
        if not _holds_in_time(engine.is_listening, deadline):
            raise PropolisError(f"Flower's SuperLink did not start in time: {engine.last_words()}")
        engine.flwr("run", str(Path(folder) / "app"), _NAME)
        _wait_for_figures(engine, out, deadline)
        figures = json.loads(out.read_text(encoding="utf-8"))
    return [float(seconds) for seconds in figures["seconds"]]


def _wait_for_figures(engine: _Engine, out: Path, deadline: float) -> None:
    while not _holds_in_time(out.exists, min(deadline, time.monotonic() + _ASK_EVERY_S)):
        status = engine.status()
        is_over = status.startswith("finished") or time.monotonic() >= deadline
        if is_over and not out.exists():
            raise PropolisError(f"Flower's run gave no figures in time; it is {status}")


@dataclass(frozen=True, slots=True)
class _Engine:
    """A running SuperLink: where it listens, its processes' environment and their log."""

    port: int
    environment: Mapping[str, str]
    log: Path

    def flwr(self, *arguments: str) -> str:
        """What ``flwr ARGUMENTS`` prints; it knows this SuperLink by its name."""
        command = [_program("flwr"), *arguments]
        try:
            done = subprocess.run(
                command, env=self.environment, capture_output=True, text=True, timeout=_COMMAND_DEADLINE_S, check=True
            )
        except subprocess.CalledProcessError as error:
            raise PropolisError(
                f"flwr {arguments[0]} exited with {error.returncode}: {error.stderr or error.stdout}"
            ) from None
        except subprocess.TimeoutExpired:
            raise PropolisError(f"flwr {arguments[0]} did not end in {_COMMAND_DEADLINE_S:.0f} s") from None
        return done.stdout

    def is_listening(self) -> bool:
        """Whether the SuperLink can be reached."""
        with socket.socket() as probe:
            return probe.connect_ex((_HOST, self.port)) == 0

    def status(self) -> str:
        """What became of the only run; ``flwr run`` itself does not say."""
        (run,) = json.loads(self.flwr("list", _NAME, "--format", "json"))["runs"]
        return f"{run['status']} {run['status-details']}".strip()

    def last_words(self) -> str:
        """The last line in the log."""
        return (self.log.read_text(encoding="utf-8").strip().splitlines() or ["it wrote nothing"])[-1].strip()


@contextmanager
def _engine(scratch: Path, nodes: int) -> Iterator[_Engine]:
    """A SuperLink and its SuperNodes; in the end every process with their home is ended, whoever started it."""
    port, local_port, control_port, *node_ports = _free_ports(3 + nodes)
    home, address = scratch / "home", f"{_HOST}:{port}"
    home.mkdir()
    superlinks = {_NAME: {"address": address, "insecure": True}}
    (home / "config.toml").write_text(tomli_w.dumps({"superlink": superlinks}), encoding="utf-8")
    engine = _Engine(port, _environment(home, local_port, control_port), scratch / "log")
    commands = [["flower-superlink", "--port", str(port), "--disable-runtime-dependency-installation"]]
    commands += [["flower-supernode", "--port", str(own), "--superlink", address] for own in node_ports]
    with engine.log.open("w") as log, ExitStack() as ending:
        try:
            for program, *arguments in commands:
                command = [_program(program), "--insecure", "--host", _HOST, *arguments]
                process = subprocess.Popen(
                    command, env=engine.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
                )
                ending.enter_context(process)  # which waits for it
            yield engine
        finally:
            _end_processes(f"FLWR_HOME={home}")


def _holds_in_time(condition: Callable[[], bool], deadline: float) -> bool:
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(_POLL_S)
    return True


def _environment(home: Path, local_port: int, control_port: int) -> dict[str, str]:
    return {
        **os.environ,
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(local_port),
        "FLWR_LOCAL_CONTROL_API_PORT": str(control_port),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }


def _program(name: str) -> str:
    """Flower's program of this environment, which need not be on the path."""
    return str(Path(sys.executable).with_name(name))


def _write_app(folder: Path, config: Mapping[str, Any]) -> None:
    """The echo app as a folder that ``flwr run`` takes."""
    folder.mkdir()
    shutil.copy(Path(echo_app.__file__), folder / "echo_app.py")
    app = {
        "publisher": "propolis",
        "components": {"serverapp": "echo_app:server_app", "clientapp": "echo_app:client_app"},
        "config": dict(config),
    }
    project = {"name": "echo-app", "version": "1.0.0", "license": "Apache-2.0", "dependencies": ["flwr", "numpy"]}
    (folder / "pyproject.toml").write_text(
        tomli_w.dumps({"project": project, "tool": {"flwr": {"app": app}}}), encoding="utf-8"
    )


def _free_ports(count: int) -> list[int]:
    with ExitStack() as held:
        probes = [held.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind((_HOST, 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def _end_processes(variable: str) -> None:
    """Ask all processes with this in their environment to end, and end those that do not."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + _END_DEADLINE_S
        for pid in _processes_with(variable):
            with suppress(ProcessLookupError):
                os.kill(pid, how)
        while _processes_with(variable) and time.monotonic() < deadline:
            time.sleep(_POLL_S)


def _processes_with(variable: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):  # it ended meanwhile, or is another user's
            if entry.name.isdigit() and variable.encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found
