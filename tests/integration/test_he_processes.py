"""A run under homomorphic encryption over real processes: a newcomer, a revocation and a new key, and `kill -9`."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from enrolling import serving
from holding import Holding

from harness import free_port, wait_until
from propolis.client.encrypted_sums import open_model_file
from propolis.client.enroll import Enrolling, enroll
from propolis.client.he_folder import HE_FORMER_FILE, HE_KEY_FILE
from propolis.client.state import FileStore
from propolis.link.address import Address
from propolis.secure.errors import TrustError
from propolis.secure.he.held import KeyBundle
from propolis.secure.secagg.policy import Policy
from propolis.server.he_key import Asked
from propolis.server.opening import open_registry
from propolis.server.registry_records import Format
from propolis.simulations.apps import load_data

WAIT_S = 60.0
MOST = 5
KEY = Asked(clients=8, value_bits=16, seeded=True)


@contextmanager
def process(log: Path, *arguments: object) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("ab") as out:
        command = [sys.executable, "-m", "propolis", *map(str, arguments)]
        started = subprocess.Popen(command, stdout=out, stderr=out, stdin=subprocess.DEVNULL, cwd=log.parent)
    try:
        yield started
    finally:
        started.kill()
        started.wait()


class World:
    """Root, holder, server and devices of one federation, each in a folder of its own."""

    def __init__(self, folder: Path, protection: str) -> None:
        self.folder, self.holding, self.protection = folder, Holding(folder), protection
        self.site = self.holding.site
        self.holding.out = self.site.server / "he"  # as if it was copied there
        self.link, self.enrolment = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
        self.run, self.log = folder / "run", folder / "server.log"
        _, data = load_data("digits", None)
        for index, share in enumerate(np.array_split(np.random.default_rng(0).permutation(len(data.train)), MOST)):
            own = data.train.subset(share)
            np.savez(folder / f"device-{index}.npz", inputs=own.inputs[:], labels=own.labels.numpy())

    def home(self, index: int) -> Path:
        return self.folder / f"device-{index}"

    def enroll(self, index: int, server: Address) -> None:
        enroll(Enrolling(server, self.site.token(f"clinic-{index}"), self.home(index), None, timeout=20))

    def issue(self, renew: bool = False) -> None:
        self.holding.issue(replace(KEY, renew=renew), now=time.time())

    def device(self, index: int) -> tuple[object, ...]:
        data = ("--task", "digits", "--data", self.folder / f"device-{index}.npz")
        return ("client", "run", "--dir", self.home(index), "--server", self.link, *data)

    def server(self, rounds: int) -> tuple[object, ...]:
        (self.folder / "server.toml").write_text(
            f"task = 'digits'\nrounds = {rounds}\nmin_clients = 3\nepochs = 1\nmax_weight = 500.0\n"
            f"protection = '{self.protection}'\nhe_mode = 'seeded'\nevaluate_fraction = 0.5\nround_deadline = 30.0\n"
            f"[server]\nfederation = '{self.site.server}'\nlisten = '{self.link}'\nenroll = '{self.enrolment}'\n"
            f"out = '{self.run}'\nregistry = '{self.folder / 'registry'}'\n"
            "wait_for = 4\nwait_seconds = 60.0\nheartbeat = 2\n"
        )
        return ("server", "--config", self.folder / "server.toml")

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def done(self) -> list[tuple[int, int, int]]:
        """Round, survivors and asked devices of every line that the server wrote of one."""
        found = re.findall(r"round (\d+) of \d+: .*survivors=(\d+)/(\d+)", self.said)
        return [(int(a), int(b), int(c)) for a, b, c in found]

    def wait(self, text: str, log: Path | None = None) -> None:
        path = log or self.log
        wait_until(lambda: path.exists() and text in path.read_text(errors="replace"), WAIT_S)

    def wait_for_rounds(self, survivors: int, asked: int) -> None:
        before = len(self.done())
        wait_until(lambda: (survivors, asked) in {each[1:] for each in self.done()[before:]}, WAIT_S)

    def key_number(self, index: int) -> int:
        return KeyBundle.from_bytes((self.home(index) / HE_KEY_FILE).read_bytes()).number


@pytest.fixture(params=["he", pytest.param("he+secagg", marks=pytest.mark.soak)])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> World:
    made = World(tmp_path, request.param)
    with serving(made.site) as address:
        for index in range(4):
            made.enroll(index, address)
    made.issue()
    return made


def test_a_federation_trains_encrypted_while_devices_come_and_go_and_its_server_is_killed(world: World) -> None:
    with ExitStack() as stack:
        server = stack.enter_context(process(world.log, *world.server(rounds=2000)))
        for index in range(4):
            stack.enter_context(process(world.folder / f"log-{index}", *world.device(index)))
        world.wait_for_rounds(4, 4)

        # A newcomer enrols; as soon as the holder has sealed the key for it, it takes part.
        world.enroll(4, Address.parse(world.enrolment))
        stack.enter_context(process(world.folder / "log-4", *world.device(4)))
        world.wait("was not sealed for this device yet", world.folder / "log-4")
        world.wait("without the key of this round or of its model: device 4")
        world.wait_for_rounds(4, 5)
        world.issue()
        world.wait_for_rounds(5, 5)
        old = world.key_number(0)

        # One is revoked: no round until there is another key, and then all but it go on.
        world.site.federation.revoke("clinic-1")
        world.wait("no round until there is another key: clinic-1 is revoked")
        stopped = len(world.done())
        time.sleep(2.0)
        assert len(world.done()) == stopped
        world.issue(renew=True)
        world.wait_for_rounds(4, 4)
        stay = (0, 2, 3, 4)
        wait_until(lambda: not any((world.home(index) / HE_FORMER_FILE).exists() for index in stay), WAIT_S)
        assert {world.key_number(index) for index in stay} != {old}
        assert world.key_number(1) == old

        # `kill -9` costs the round under way.
        server.kill()
        server.wait()
        last = world.done()[-1][0] + 3
        again = stack.enter_context(process(world.log, *world.server(rounds=last)))
        assert again.wait(WAIT_S) == 0, world.said[-3000:]

    result = json.loads((world.run / "result.json").read_text())
    assert (result["status"], len(result["history"]), result["accuracy"]) == ("completed", last, None)
    assert {name for record in result["history"] for name in record["metrics"]} <= {"examples"}
    assert not (world.run / "model.safetensors").exists()
    require_good(world, last)
    registry = open_registry(str(world.folder / "registry"))
    version = registry.version("digits", 1)
    assert (version.format, version.lineage.round) == (Format.ENCRYPTED, last)
    assert b"".join(registry.read(version)) == (world.run / "model.encrypted").read_bytes()
    with pytest.raises(TrustError, match="has not, or that it has erased"):
        open_model_file(FileStore(world.home(1), Policy()), world.run / "model.encrypted")


def require_good(world: World, rounds: int) -> None:
    """That every device that stayed opens the model, and that it is worth something."""
    task, data = load_data("digits", None)
    opened = [open_model_file(FileStore(world.home(i), Policy()), world.run / "model.encrypted") for i in (0, 2, 3, 4)]
    assert {each.round for each in opened} == {rounds}
    model = task.model()
    model.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in opened[3].arrays.items()})
    with torch.no_grad():
        assert task.evaluate(model.eval(), data.test)["accuracy"] > 0.8
