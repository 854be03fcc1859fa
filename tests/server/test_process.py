"""The server process: what it refuses before anything listens, how it waits, ends and goes on."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Command
from linked import Devices

from harness import free_port
from propolis.client.ready import ready_app
from propolis.client.state import FOLDER_KEY
from propolis.secure.errors import TooFewPeersError, UsageError
from propolis.server.config import load_served
from propolis.server.process import serve
from propolis.server.registry import Registry
from propolis.server.roster import load_roster
from propolis.simulations.apps import load_data
from propolis.simulations.federation import make_federation
from propolis.simulations.linked import SERVER_FOLDER, write_linked_federation
from propolis.storage import alone

DEVICES = 3


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A federation of three in a folder, and a configuration for its server."""
    write_linked_federation(make_federation(DEVICES, seed=0), tmp_path)
    write_config(tmp_path)
    return tmp_path


def write_config(site: Path, extra: str = "", **settings: Any) -> Path:
    lines = {"task": "digits", "rounds": 2, "min_clients": DEVICES, "max_weight": 600.0, "protection": "secagg"}
    chosen = {key: value for key, value in {**lines, **settings}.items() if value is not None}
    text = "\n".join(f"{key} = {json.dumps(value)}" for key, value in chosen.items())
    (site / "server.toml").write_text(
        f"{text}\n[server]\nfederation = '{site / SERVER_FOLDER}'\nout = '{site / 'run'}'\nenroll = 'none'\n"
        f"listen = '127.0.0.1:{free_port()}'\nwait_seconds = 30.0\n{extra}"
    )
    return site / "server.toml"


def run(site: Path, **flags: Any) -> dict[str, Any] | None:
    return serve(load_served(site / "server.toml", flags))


@pytest.fixture
def devices(site: Path) -> Callable[[], Devices]:
    """Starts the three devices, each with a share of the digits, in this process."""
    _, data = load_data("digits", None)

    def start() -> Devices:
        started, address = Devices(), load_served(site / "server.toml", {}).config.listen
        for index, share in enumerate(np.array_split(np.arange(len(data.train)), DEVICES)):
            own, path = data.train.subset(share), site / f"device-{index}.npz"
            np.savez(path, inputs=own.inputs[:], labels=own.labels.numpy())
            folder = site / f"device-{index}"
            started.start(folder, address, ready_app("digits", path), node_config={FOLDER_KEY: str(folder)})
        return started

    return start


def test_a_run_over_real_devices_leaves_its_files_and_is_not_done_twice(
    site: Path, devices: Callable[[], Devices]
) -> None:
    started = devices()
    result = run(site)
    assert result is not None
    assert (result["status"], result["backend"], len(result["history"])) == ("completed", "link", 2)
    assert result["accuracy"] > 0.5
    assert json.loads((site / "run" / "result.json").read_text()) == result
    started.close()
    assert run(site) == result  # nothing is left to do, and nobody is waited for


def test_a_run_that_ended_early_is_gone_on_with(site: Path, devices: Callable[[], Devices]) -> None:
    started = devices()
    first = run(site)
    longer = run(site, rounds=4)
    started.close()
    assert first is not None
    assert longer is not None
    assert longer["history"][:2] == first["history"]
    assert len(longer["history"]) == 4


def test_a_run_is_registered_once_however_often_its_server_is_started(
    site: Path, devices: Callable[[], Devices]
) -> None:
    started, registry = devices(), str(site / "registry")
    result = run(site, registry=registry, model="digits")
    started.close()
    assert result is not None
    assert result["registered"] == {"registry": registry, "model": "digits", "version": 1}
    (site / "run" / "result.json").unlink()  # as a crash between the last checkpoint and the results leaves it
    assert run(site, registry=registry, model="digits") == result
    assert run(site, registry=registry) == result, "the model has the task's name"
    (version,) = Registry(registry).versions()
    assert bytes.fromhex(version.lineage.federation or "") == load_roster(site / SERVER_FOLDER).roster.federation
    with pytest.raises(UsageError, match=r"registry: a ServerApp of your own keeps its model itself"):
        run(site, registry=registry, app="harness:app")


def test_a_folder_with_another_run_is_refused(site: Path, devices: Callable[[], Devices]) -> None:
    started = devices()
    run(site)
    started.close()
    with pytest.raises(UsageError, match="holds a run with another lr: name another folder"):
        run(site, lr=0.2)


def test_without_devices_it_ends_when_the_wait_is_over(site: Path) -> None:
    with pytest.raises(TooFewPeersError, match=r"0 devices connected within 0\.5 s, 3 are needed"):
        run(site, wait_seconds=0.5)
    assert json.loads((site / "run" / "result.json").read_text())["status"] == "failed"


def test_a_port_in_use_is_one_line(site: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(UsageError, match="another process may have it"):
            run(site, listen=address)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda site: (site / SERVER_FOLDER / "tls.key").chmod(0o644), "chmod 600"),
        (lambda site: (site / SERVER_FOLDER / "tls.key").unlink(), "tls.key"),
        (lambda site: (site / SERVER_FOLDER / "roster.bin").write_bytes(b"x"), "does not hold"),
        (lambda site: write_config(site, max_weight=None), "max_weight"),
    ],
    ids=["readable key", "no key", "no roster", "no max_weight"],
)
def test_what_is_not_usable_is_one_line_before_anything_listens(
    site: Path, propolis: Command, change: Callable[[Path], object], said: str
) -> None:
    change(site)
    done = propolis("server", "--config", site / "server.toml")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert said in done.stderr
    assert not (site / "run" / "result.json").exists()


@pytest.mark.parametrize(
    ("reference", "said"),
    [("nonsense", "expected MODULE:NAME"), ("os:path", "is no ServerApp"), ("absent_module:app", "cannot import")],
)
def test_an_app_that_is_none_is_refused(site: Path, reference: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        run(site, app=reference)


def test_sigterm_while_it_waits_stops_it_cleanly(site: Path) -> None:
    command = [sys.executable, "-m", "propolis", "server", "--config", str(site / "server.toml")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=site)
    assert process.stderr is not None
    for line in process.stderr:
        if "waiting for devices" in line:
            break
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 130
    assert time.monotonic() - began < 20
    assert "start it again and it goes on" in process.stderr.read()


def test_json_logs_are_one_object_a_line(site: Path, propolis: Command) -> None:
    done = propolis(
        *("server", "--config", site / "server.toml", "--log-format", "json", "--wait-seconds", 1.0, "--json")
    )
    assert done.returncode == 1
    *records, last = done.stderr.splitlines()
    assert [json.loads(record)["message"] for record in records] == ["listening", "waiting for devices"]
    assert last == "propolis: 0 devices connected within 1 s, 3 are needed"


def test_the_links_thread_ends_with_the_run(site: Path) -> None:
    with pytest.raises(TooFewPeersError):
        run(site, wait_seconds=0.2)
    assert not [thread for thread in threading.enumerate() if thread.name == "propolis-link"]


def test_two_servers_do_not_work_in_one_folder(site: Path) -> None:
    (site / "run").mkdir()
    with (
        alone(site / "run" / "server.lock", "taken"),
        pytest.raises(UsageError, match=r"another server works in .*run: name another folder"),
    ):
        run(site)
    assert not (site / "run" / "result.json").exists()
