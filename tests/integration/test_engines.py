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

from harness import free_port
from propolis.simulations.federation import make_federation, write_federation

ROOT = Path(__file__).resolve().parents[2]
FLWR = Path(sys.executable).with_name("flwr")
END_AFTER_S = 240


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
    # A round that was tried again has also the bytes of those who answered the first time.
    at_once = [[record for record in x["history"] if record["attempts"] == 1] for x in (local, ray)]
    per_survivor = [sum(r["uplink_bytes"] for r in x) / sum(r["survivors"] for r in x) for x in at_once]
    assert per_survivor[0] == pytest.approx(per_survivor[1], rel=0.01)


@pytest.mark.parametrize(
    "changes", [[], pytest.param(["--prune", "0.5", "--codec", "thin"], marks=pytest.mark.soak)], ids=str
)
def test_secure_sums_are_the_same_on_every_backend(tmp_path: Path, changes: list[str]) -> None:
    """Masks and keys differ in every run; the sum is exact, whoever was first, and rounding is seeded."""
    losses, models = [], []
    for backend in ("local", "ray", "link"):
        flags = ["--clients", "4", "--rounds", "2", "--protection", "secagg", "--backend", backend]
        flags += [*changes, "--out", backend]
        done = subprocess.run(
            [sys.executable, "-m", "propolis", "simulate", *flags, "--json"],
            cwd=tmp_path, capture_output=True, text=True, timeout=END_AFTER_S, check=True,
        )  # fmt: skip
        losses.append([record["loss"] for record in json.loads(done.stdout)["history"]])
        models.append((tmp_path / backend / "model.safetensors").read_bytes())
    assert losses[0] == losses[1] == losses[2]
    assert models[0] == models[1] == models[2]


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


needs_proc = pytest.mark.skipif(
    not Path("/proc").exists(), reason="ends what flwr leaves running by looking through /proc"
)


@needs_proc
@pytest.mark.parametrize("protection", ["none", "secagg", pytest.param("he", marks=pytest.mark.soak)])
def test_flwr_run_works_on_this_repository(flwr: Callable[..., str], tmp_path: Path, protection: str) -> None:
    out = tmp_path / "out"
    nodes = ("--federation-config", "num-supernodes=4")
    flwr("run", str(ROOT), *nodes, "--run-config", f"rounds=2 protection='{protection}' out='{out}'")
    assert end_of_run(flwr, "local") == "finished:completed"
    result = json.loads((out / "result.json").read_text())
    assert len(result["history"]) == 2
    assert result["history"][1]["survivors"] == 4
    assert result["accuracy"] > 0.5
    assert ("update-range" in result["history"][0]["metrics"]) == (protection == "secagg")


def end_of_run(flwr: Callable[..., str], superlink: str) -> str:
    """The status that the only run ends with."""
    deadline = time.monotonic() + END_AFTER_S
    while True:
        runs = json.loads(flwr("list", superlink, "--format", "json")).get("runs", [])
        status = str(runs[0]["status"]) if runs else "none"
        if status.startswith("finished") or time.monotonic() > deadline:
            return status
        time.sleep(1)


@needs_proc
def test_two_lines_make_a_flower_app_secure_on_two_supernodes(flwr: Callable[..., str], tmp_path: Path) -> None:
    """Flower's own processes, and a plain Flower app; each device's floor is two, as its node's configuration says."""
    write_federation(make_federation(2), tmp_path / "fed")
    address, bin_ = f"127.0.0.1:{free_port()}", FLWR.parent
    home = tmp_path / "flwr"
    home.mkdir()
    (home / "config.toml").write_text(f'[superlink.loop]\naddress = "{address}"\ninsecure = true\n')
    environment = {**os.environ, "FLWR_HOME": str(home), "PATH": f"{bin_}{os.pathsep}{os.environ['PATH']}"}
    host, port = address.split(":")
    commands = [
        ["flower-superlink", "--insecure", "--host", host, "--port", port, "--disable-runtime-dependency-installation"]
    ]
    for index in range(2):
        config = (
            f"partition-id={index} num-partitions=2 propolis-dir='{tmp_path / 'fed' / f'device-{index}'}' "
            "propolis-min-cohort=2"
        )
        where = ["--superlink", address, "--host", host, "--port", str(free_port())]
        commands.append(["flower-supernode", "--insecure", *where, "--node-config", config])
    with (tmp_path / "log").open("w") as log:
        for command in commands:  # ended with everything else that has this FLWR_HOME
            subprocess.Popen([str(bin_ / command[0]), *command[1:]], env=environment, stdout=log, stderr=log)
    wait_for_port(int(port))
    out = tmp_path / "figures.json"
    settings = f"rounds=1 federation='{tmp_path / 'fed' / 'server'}' out='{out}'"
    flwr("run", str(ROOT / "examples" / "flower-app"), "loop", "--run-config", settings)
    assert end_of_run(flwr, "loop") == "finished:completed", (tmp_path / "log").read_text()[-3000:]
    figures = json.loads(out.read_text())
    assert figures["train"]["saturated"] == 0
    assert figures["evaluate"]["accuracy"] > 0.8


def wait_for_port(port: int) -> None:
    deadline = time.monotonic() + END_AFTER_S
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
