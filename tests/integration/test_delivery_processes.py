"""A server that trains and stays, and devices that train and take what is released: processes, as they are started."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
from delivering import Site
from onnx_models import linear

from harness import free_port, wait_until
from propolis.client.slots import records
from propolis.link.delivery import Outcome
from propolis.secure.manifest import Kind
from propolis.simulations.apps import load_data

DEVICES = 3
WAIT_S = 90.0
FILES = {"model.onnx": (linear(), Kind.ONNX)}


@contextmanager
def process(log: Path, *arguments: object) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("ab") as errors:
        command = [sys.executable, "-m", "propolis", *map(str, arguments)]
        started = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, cwd=log.parent)
    try:
        yield started
    finally:
        started.kill()
        started.wait()


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """A federation whose devices have a third of the digits each."""
    made = Site(tmp_path, DEVICES)
    _, data = load_data("digits", None)
    for index, share in enumerate(np.array_split(np.arange(len(data.train)), DEVICES)):
        own = data.train.subset(share)
        np.savez(tmp_path / f"device-{index}.npz", inputs=own.inputs[:], labels=own.labels.numpy())
    return made


def device_of(site: Site, index: int, address: str) -> tuple[object, ...]:
    flags = ("--task", "digits", "--data", site.folder / f"device-{index}.npz", "--server", address)
    return ("client", "run", "--dir", site.device(index), *flags, "--node-config", "propolis-allow-unprotected=true")


@pytest.mark.soak
def test_devices_train_and_then_take_what_is_released_although_one_is_killed_meanwhile(site: Site) -> None:
    address, log = f"127.0.0.1:{free_port()}", site.folder / "server.log"
    server = ("server", "--task", "digits", "--rounds", 1, "--min-clients", DEVICES, "--federation", site.server_folder,
              "--listen", address, "--enroll", "none", "--out", site.folder / "run", "--stay")  # fmt: skip
    with ExitStack() as stack:
        served = stack.enter_context(process(log, *server))
        devices = [
            stack.enter_context(process(site.folder / f"log-{index}", *device_of(site, index, address)))
            for index in range(DEVICES)
        ]
        wait_until(lambda: "staying" in log.read_text(), WAIT_S)
        assert json.loads((site.folder / "run" / "result.json").read_text())["status"] == "completed"

        first = site.release(1, files=FILES, percent=100)
        for index in range(DEVICES):
            site.wait_for_report(first.release, Outcome.INSTALLED, index)
        second = site.release(2, files={**FILES, "more.bin": (bytes(20_000_000), Kind.OTHER)})
        wait_until(lambda: (site.device(0) / "incoming" / second.manifest).exists(), WAIT_S)
        devices[0].send_signal(signal.SIGKILL)
        assert records(site.device(0))["digits"].slots[0].release.sequence in (1, 2)
        stack.enter_context(process(site.folder / "log-0", *device_of(site, 0, address)))
        for index in range(DEVICES):
            site.wait_for_report(second.release, Outcome.INSTALLED, index)
            assert records(site.device(index))["digits"].slots[0].release.sequence == 2
        served.terminate()
        assert served.wait(WAIT_S) == 0
