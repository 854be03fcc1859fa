"""The server process under homomorphic encryption: what it refuses before anything starts, what a run leaves."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Command
from delivering import KeyHolder, put_key
from linked import Devices

from harness import free_port, one_line_error, wait_until
from propolis.client.encrypted_sums import OpenedModel, open_model_file
from propolis.client.ready import ready_app
from propolis.client.state import FOLDER_KEY, FileStore
from propolis.secure.errors import PropolisError, TooFewPeersError, TrustError, UsageError
from propolis.secure.he import bfv
from propolis.secure.he.held import KeyBundle, scheme_of
from propolis.secure.he.keys import read_material
from propolis.secure.he.messages import EncryptedPlan, EncryptedSum
from propolis.secure.secagg.policy import Policy
from propolis.server.config import load_served
from propolis.server.process import serve
from propolis.server.roster import load_roster, replace_roster
from propolis.simulations.apps import load_data
from propolis.simulations.federation import Federation, make_federation
from propolis.simulations.linked import SERVER_FOLDER, write_linked_federation

DEVICES = 4
OTHER = make_federation(DEVICES, seed=1)


class Site:
    """A federation of four whose server has a key of ten clients and eight bits."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.server = folder, folder / SERVER_FOLDER
        self.federation: Federation = make_federation(DEVICES, seed=0)
        write_linked_federation(self.federation, folder)
        self.holder = KeyHolder(self.federation.root)
        self.bundles = self.holder.bundles(1, self.federation.devices)
        put_key(self.server / "he", self.bundles)
        self.port = free_port()
        self.write()

    def write(self, wait_for: int = 3, **settings: Any) -> Path:
        lines = {"task": "digits", "rounds": 2, "min_clients": 3, "max_weight": 600.0, "epochs": 1}
        lines |= {"protection": "he", "he_mode": "seeded", "bits": 8, **settings}
        text = "\n".join(f"{key} = {json.dumps(value)}" for key, value in lines.items() if value is not None)
        path = self.folder / "server.toml"
        path.write_text(
            f"{text}\n[server]\nfederation = '{self.server}'\nout = '{self.folder / 'run'}'\nenroll = 'none'\n"
            f"listen = '127.0.0.1:{self.port}'\nwait_seconds = 30.0\nwait_for = {wait_for}\n"
        )
        return path

    def run(self, **flags: Any) -> dict[str, Any] | None:
        return serve(load_served(self.folder / "server.toml", flags))

    def put_roster(self, change: Callable[[Any], Any]) -> None:
        roster = load_roster(self.server).roster
        replace_roster(self.server, self.federation.root.sign_roster(change(roster)))

    def opened(self, index: int) -> OpenedModel:
        """The run's model, as a device sees it."""
        return open_model_file(FileStore(self.folder / f"device-{index}", Policy()), self.model)

    @property
    def model(self) -> Path:
        return self.folder / "run" / "model.encrypted"

    def key_of_model(self) -> bytes:
        return EncryptedPlan.from_bytes(EncryptedSum.from_bytes(self.model.read_bytes()).plan).key_id

    def devices(self) -> Devices:
        """The devices, in this process; somebody has installed their keys from files."""
        _, data = load_data("digits", None)
        started, address = Devices(), load_served(self.folder / "server.toml", {}).config.listen
        for index, share in enumerate(np.array_split(np.arange(len(data.train)), DEVICES)):
            own, home = data.train.subset(share), self.folder / f"device-{index}"
            np.savez(f"{home}.npz", inputs=own.inputs[:], labels=own.labels.numpy())
            if index not in self.bundles:
                continue
            FileStore(home, Policy()).keep_he_key(self.bundles[index])
            app = ready_app("digits", Path(f"{home}.npz"))
            started.start(home, address, app, node_config={FOLDER_KEY: str(home)})
        return started


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def test_a_run_leaves_what_its_server_may_know(site: Site) -> None:
    site.write(wait_for=DEVICES)
    started = site.devices()
    result = site.run()
    again = site.run(rounds=3)
    started.close()
    assert result is not None
    assert again is not None
    assert (result["status"], result["accuracy"], result["loss"]) == ("completed", None, None)
    assert again["history"][:2] == result["history"]
    assert all(set(record["metrics"]) <= {"num-examples"} for record in again["history"])
    files = {path.name for path in (site.folder / "run").iterdir()}
    assert {"result.json", "model.encrypted", "config.toml", "checkpoint.safetensors"} <= files
    assert not files & {"model.safetensors", "curves.png", "devices"}
    assert site.run(rounds=3) == again  # nothing is left to do
    assert site.opened(1).round == 3


def test_a_federation_whose_key_is_for_masks_trains_with_them_and_with_nothing_less(site: Site) -> None:
    site.bundles = site.holder.bundles(2, site.federation.devices, masked=True)
    put_key(site.server / "he", site.bundles)
    site.write(wait_for=DEVICES)
    with pytest.raises(UsageError, match="protection: the federation's key is for updates under masks only"):
        site.run()
    site.write(wait_for=DEVICES, protection="he+secagg")
    started = site.devices()
    result = site.run()
    assert result is not None
    assert result["status"] == "completed"
    assert (site.opened(1).round, site.opened(1).devices) == (2, DEVICES)
    site.write(wait_for=DEVICES, protection="secagg", he_mode=None, bits=None, rounds=1)
    with pytest.raises(TooFewPeersError, match="prepare: policy"):
        serve(load_served(site.folder / "server.toml", {"out": str(site.folder / "plain")}))
    started.close()


def no_key(site: Site) -> None:
    (site.server / "he" / "he.public").unlink()


def of_another_federation(site: Site) -> None:
    put_key(site.server / "he", KeyHolder(OTHER.root).bundles(1, OTHER.devices))


def of_a_revoked_holder(site: Site) -> None:
    site.put_roster(lambda roster: roster.revoking_release(1))


def that_a_revoked_device_has(site: Site) -> None:
    site.put_roster(lambda roster: roster.revoking(2))


def for_too_few(site: Site) -> None:
    put_key(site.server / "he", {index: site.bundles[index] for index in (0, 1)})


def of_other_bits(site: Site) -> None:
    site.write(bits=None)


def of_another_mode(site: Site) -> None:
    site.write(he_mode=None)


def without_room(site: Site) -> None:
    site.write(wait_for=11)


def for_fewer_than_a_round_takes(site: Site) -> None:
    site.write(wait_for=11, min_clients=11)


def without_a_weight(site: Site) -> None:
    site.write(max_weight=None)


WRONG = [
    (no_key, "no key of homomorphic encryption in .*: its holder makes one"),
    (of_another_federation, r"he\.public: "),
    (of_a_revoked_holder, "the key holder 1 is revoked"),
    (that_a_revoked_device_has, "device-2 is revoked and has the key .*propolis federation he-key --renew"),
    (for_too_few, "sealed for 2 devices, and a round takes 3"),
    (of_other_bits, "bits: the federation's key is for values of 8, and the run has 16"),
    (of_another_mode, "he_mode: the federation's key is for seeded, and the run is public"),
    (without_room, "for sums of 10 devices at most, and 11 train"),
    (for_fewer_than_a_round_takes, "for sums of 10 devices at most, and 11 train"),
    (without_a_weight, "max_weight"),
]


@pytest.mark.parametrize(("change", "said"), WRONG, ids=lambda given: getattr(given, "__name__", ""))
def test_a_key_that_does_not_do_is_one_line_before_anything_starts(
    site: Site, change: Callable[[Site], object], said: str
) -> None:
    change(site)
    with pytest.raises(UsageError, match=said):
        site.run()
    assert not (site.folder / "run" / "result.json").exists()


def test_without_tenseal_it_is_one_line(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tenseal.sealapi", None)
    for cached in (bfv._sealapi, scheme_of):
        cached.cache_clear()
    try:
        with pytest.raises(UsageError, match=r"needs TenSEAL: pip install 'propolis\[he\]'"):
            site.run()
    finally:
        for cached in (bfv._sealapi, scheme_of):
            cached.cache_clear()


def test_the_command_ends_with_two(site: Site, propolis: Command) -> None:
    no_key(site)
    assert "no key of homomorphic encryption" in one_line_error(propolis("server", "--config", site.write()))
    line = one_line_error(propolis("server", "--config", site.write(), "--he-key", site.folder / "elsewhere"))
    assert f"in {site.folder / 'elsewhere'}" in line


def test_a_run_whose_key_a_revoked_device_has_ends_with_the_line_and_is_gone_on_with(site: Site) -> None:
    site.write(wait_for=DEVICES, rounds=1000, round_deadline=2.0)
    started, ended = site.devices(), list[BaseException]()

    def run() -> None:
        try:
            site.run()
        except PropolisError as error:
            ended.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    wait_until((site.folder / "run" / "checkpoint.safetensors").exists, 60)
    site.put_roster(lambda roster: roster.revoking(3))
    thread.join(60)
    started.close()
    (error,) = ended
    assert not isinstance(error, UsageError)
    assert "device-3 is revoked and has the key of homomorphic encryption" in str(error)
    result = json.loads((site.folder / "run" / "result.json").read_text())
    assert (result["status"], result["error"]) == ("failed", str(error))
    with pytest.raises(UsageError, match="device-3 is revoked"):
        site.run()

    site.bundles = site.holder.bundles(2, site.federation.devices[:3])
    put_key(site.server / "he", site.bundles)
    started, done = site.devices(), len(result["history"])
    again = site.run(rounds=done + 2, round_deadline=60.0)
    started.close()
    assert again is not None
    assert again["history"][:done] == result["history"]
    new = KeyBundle.from_bytes(site.bundles[0])
    assert site.key_of_model() == read_material(site.federation.root.federation, new.material).key_id
    assert site.opened(0).round == done + 2
    with pytest.raises(TrustError, match="has not, or that it has erased"):
        site.opened(3)
