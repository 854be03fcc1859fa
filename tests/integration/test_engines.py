"""The same apps on Flower's own engines; each engine is started once."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLWR = Path(sys.executable).with_name("flwr")
END_AFTER_S = 240


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_the_ray_backend_gives_the_same_result_file(tmp_path: Path) -> None:
    """Every device takes part and sums are made in the same order only by chance, so figures are close, not equal."""
    results: dict[str, Any] = {}
    for backend in ("local", "ray"):
        flags = ["--clients", "4", "--rounds", "3", "--dropout", "0.2", "--backend", backend, "--out", backend]
        done = subprocess.run(
            [sys.executable, "-m", "propolis", "simulate", *flags, "--json"],
            cwd=tmp_path, capture_output=True, text=True, timeout=END_AFTER_S, check=True,
        )  # fmt: skip
        results[backend] = json.loads(done.stdout)
    local, ray = results["local"], results["ray"]
    assert ray.keys() == local.keys()
    assert ray["backend"] == "ray"
    assert ray["accuracy"] > 0.5
    assert ray["history"][0].keys() == local["history"][0].keys()
    per_survivor = [sum(r["uplink_bytes"] for r in x["history"]) / sum(r["survivors"] for r in x["history"])
                    for x in (local, ray)]  # fmt: skip
    assert per_survivor[0] == pytest.approx(per_survivor[1], rel=0.01)


@pytest.fixture
def flwr(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Flower's own command line with a SuperLink of its own, which it starts and we end."""
    home = tmp_path / "flwr"
    environment = {
        **os.environ,
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(free_port()),
        "FLWR_LOCAL_CONTROL_API_PORT": str(free_port()),
        "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": f"{FLWR.parent}{os.pathsep}{os.environ['PATH']}",
    }

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [str(FLWR), *arguments], env=environment, capture_output=True, text=True, timeout=END_AFTER_S, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    yield run
    for pid in processes_with(f"FLWR_HOME={home}"):
        os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + 20
    while processes_with(f"FLWR_HOME={home}") and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in processes_with(f"FLWR_HOME={home}"):
        os.kill(pid, signal.SIGKILL)


def processes_with(variable: str) -> list[int]:
    """Ids of the processes that were started with this in their environment, ourselves left out."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and variable.encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:  # it ended meanwhile, or is another user's
            continue
    return [pid for pid in found if pid != os.getpid()]


@pytest.mark.skipif(not Path("/proc").exists(), reason="ends what flwr leaves running by looking through /proc")
def test_flwr_run_works_on_this_repository(flwr: Callable[..., str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    flwr("run", str(ROOT), "--run-config", f"rounds=2 out='{out}'")
    deadline = time.monotonic() + END_AFTER_S
    while (status := run_status(flwr))[:8] != "finished" and time.monotonic() < deadline:
        time.sleep(1)
    assert status == "finished:completed"
    result = json.loads((out / "result.json").read_text())
    assert len(result["history"]) == 2
    assert result["accuracy"] > 0.5


def run_status(flwr: Callable[..., str]) -> str:
    (run,) = json.loads(flwr("list", "local", "--format", "json"))["runs"]
    return str(run["status"])
