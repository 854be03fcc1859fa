"""`kill -9` of the server and of devices, again and again, at random instants: the model is that of a quiet run."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest

from harness import free_port
from propolis.simulations.apps import load_data
from propolis.simulations.federation import make_federation
from propolis.simulations.linked import write_linked_federation

DEVICES = 3
# `make soak` asks for more.
KILLS = int(os.environ.get("PROPOLIS_SOAK_KILLS", "1"))
# More than the longest pauses between kills leave time for.
ROUNDS = 4 + 12 * KILLS
END_AFTER_S = 180 + 60 * KILLS


class Service:
    """A process that is started again whenever it dies, as a service manager does."""

    def __init__(self, log: Path, *arguments: str) -> None:
        self._command = [sys.executable, "-m", "propolis", *arguments]
        self._log = log
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as out:
            return subprocess.Popen(self._command, stdout=out, stderr=out, stdin=subprocess.DEVNULL)

    def kill(self) -> None:
        """End it as a power cut does, and start it again."""
        self.process.kill()
        self.process.wait()
        self.process = self._start()

    def end(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")


@contextmanager
def running(folder: Path, protection: str) -> Iterator[tuple[Service, list[Service]]]:
    """A server and its devices over the federation in a folder."""
    address = f"127.0.0.1:{free_port()}"
    (folder / "server.toml").write_text(
        f"task = 'digits'\nrounds = {ROUNDS}\nmin_clients = {DEVICES}\nepochs = 60\nmax_weight = 500.0\n"
        f"protection = '{protection}'\nround_deadline = 60.0\n"
        f"[server]\nfederation = '{folder / 'server'}'\nlisten = '{address}'\nenroll = 'none'\n"
        f"out = '{folder / 'run'}'\nwait_seconds = 60.0\nheartbeat = 2\n"
    )
    owner = "propolis-max-reveals=1000" + ("" if protection == "secagg" else " propolis-allow-unprotected=true")
    with ExitStack() as stack:
        devices = []
        for index in range(DEVICES):
            home = folder / f"device-{index}"
            given = ["--server", address, "--task", "digits", "--data", f"{home}.npz", "--node-config", owner]
            devices.append(Service(folder / f"device-{index}.log", "client", "run", "--dir", str(home), *given))
            stack.callback(devices[-1].end)
        server = Service(folder / "server.log", "server", "--config", str(folder / "server.toml"))
        stack.callback(server.end)
        yield server, devices


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A federation with a share of the digits for each device; every run gets a copy."""
    folder = tmp_path_factory.mktemp("federation")
    write_linked_federation(make_federation(DEVICES, seed=0), folder)
    _, data = load_data("digits", None)
    for index, share in enumerate(np.array_split(np.random.default_rng(0).permutation(len(data.train)), DEVICES)):
        own = data.train.subset(share)
        np.savez(folder / f"device-{index}.npz", inputs=own.inputs[:], labels=own.labels.numpy())
    return folder


def wait_for_another_round(server: Service, deadline: float) -> None:
    before = server.log.count(" of ")
    while server.log.count(" of ") == before and server.process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)


def completed(server: Service, devices: list[Service], seed: int | None) -> None:
    """Wait until the run is complete; with a seed, kill this and that meanwhile."""
    rng, deadline = random.Random(seed), time.monotonic() + END_AFTER_S
    for victim in [server, rng.choice(devices)] * KILLS if seed is not None else []:
        if rng.random() < 0.5:  # in the middle of the rounds; else at any instant, also while something starts
            wait_for_another_round(server, deadline)
            time.sleep(rng.uniform(0.0, 1.0))
        else:
            time.sleep(rng.uniform(0.2, 5.0))
        assert victim.process.poll() is None, f"it ended before it was killed: {victim.log[-3000:]}"
        victim.kill()
    assert server.process.wait(deadline - time.monotonic()) == 0, server.log[-3000:]


@pytest.mark.parametrize("protection", [pytest.param("none", marks=pytest.mark.soak), "secagg"])
def test_a_run_that_is_killed_again_and_again_ends_with_the_model_of_a_quiet_run(
    federation: Path, tmp_path: Path, protection: str
) -> None:
    models = []
    for name, seed in (("quiet", None), ("killed", 1)):
        folder = tmp_path / name
        shutil.copytree(federation, folder)
        with running(folder, protection) as (server, devices):
            completed(server, devices, seed)
        models.append((folder / "run" / "model.safetensors").read_bytes())
    assert models[0] == models[1]
