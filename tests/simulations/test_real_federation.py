"""The app of ``flwr run``, with the federation of real devices in a server's folder."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, RecordDict
from flwr.serverapp.strategy import FedAvg
from holding import Holding
from secure_app import Rounds, Wire, app_of, honest, outcome_of

from propolis.client.he_key import install_he_key
from propolis.client.keyholder import Keyholder
from propolis.client.state import DeviceStore, FileStore
from propolis.secure.errors import UsageError
from propolis.secure.secagg.policy import Policy
from propolis.server.app import Members
from propolis.server.encryption import Encryption
from propolis.server.he_grid import HeGrid
from propolis.server.he_key import Asked
from propolis.settings import Settings
from propolis.simulations.apps import _members_of_run, load_data
from propolis.simulations.local import LocalGrid

DEVICES = 3


@pytest.fixture(scope="module")
def holding(tmp_path_factory: pytest.TempPathFactory) -> Holding:
    made = Holding(tmp_path_factory.mktemp("holding"))
    for index in range(DEVICES):
        made.enroll(f"clinic-{index}")
    made.issue(Asked(clients=10, seeded=True))
    return made


def members(holding: Holding, grid: Any = None, **settings: Any) -> Members | None:
    asked = Settings(**{"clients": DEVICES, "protection": "he", "he_mode": "seeded", **settings})
    context = Context(7, 1, {}, RecordDict(), {"federation": str(holding.site.server)})
    with _members_of_run(asked, load_data("digits", None)[1], grid or LocalGrid(None, DEVICES), context) as (found, _):  # type: ignore[arg-type]
        return found


@pytest.fixture
def with_key(holding: Holding) -> Path:
    shutil.rmtree(holding.site.server / "he", ignore_errors=True)
    return Path(shutil.copytree(holding.out, holding.site.server / "he"))


def test_a_round_is_under_the_key_that_the_holder_made(holding: Holding, with_key: Path) -> None:
    found = members(holding)
    assert found is not None
    assert found.he_key is not None
    homes = [holding.home(index) for index in range(DEVICES)]
    for index, home in enumerate(homes):
        install(holding, index, home)

    def store_of(context: Context) -> DeviceStore:
        return FileStore(homes[int(context.node_config["partition-id"])], Policy(max_reveals_per_model=None))

    class Asking(Rounds):
        def __init__(self) -> None:
            self.wire = Wire(LocalGrid(lambda: app_of(honest, store_of), DEVICES))
            encryption = Encryption(found.he_key, max_weight=10.0)  # type: ignore[union-attr, arg-type]
            self.grid = HeGrid(self.wire, FedAvg(), found.roster, encryption)  # type: ignore[union-attr]

    assert outcome_of(Asking().round()).survivors == DEVICES


def install(holding: Holding, index: int, home: Path) -> None:
    install_he_key(home, Keyholder.under(home, None), holding.published, holding.sealed(index), time.time())


MISTAKES: dict[str, tuple[Callable[[Path], object], dict[str, Any], str]] = {
    "no key": (shutil.rmtree, {}, "no key of homomorphic encryption"),
    "another mode": (lambda folder: None, {"he_mode": "public"}, "seeded"),
    "other bits": (lambda folder: None, {"bits": 12}, "16"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_key_that_the_run_cannot_be_under_is_one_line(holding: Holding, with_key: Path, mistake: str) -> None:
    spoil, settings, said = MISTAKES[mistake]
    spoil(with_key)
    with pytest.raises(UsageError, match=said) as caught:
        members(holding, **settings)
    assert "\n" not in str(caught.value)


def test_secure_sums_need_no_key(holding: Holding) -> None:
    found = members(holding, protection="secagg", he_mode="public")
    assert found is not None
    assert found.he_key is None
