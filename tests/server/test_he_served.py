"""The server's view of the federation's key: what rounds may be under, what devices fetch, what is one clear line."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from enrolling import DAY_S
from holding import NOW, SMALL, Holding, holding

from propolis.client.he_key import open_for
from propolis.secure.errors import UsageError
from propolis.secure.he.held import KeyBundle
from propolis.server.he_served import ServedKey, key_for, largest_round, require_room
from propolis.server.membership import Membership
from propolis.server.shelf import NotOnOfferError
from propolis.settings import Settings

RENEW = replace(SMALL, renew=True)
NAMES = ("clinic", "lab", "ward")


@pytest.fixture
def made(tmp_path: Path) -> Holding:
    made = holding(tmp_path, *NAMES)
    made.issue()
    return made


class Server:
    """What a server has: its members, and the two files."""

    def __init__(self, made: Holding, now: float = NOW) -> None:
        self.made, self.now = made, now
        self.members = Membership(made.site.server)
        self.key = ServedKey(made.out, self.members, lambda: self.now)

    def fault(self) -> str:
        self.members.look()
        with pytest.raises(UsageError) as caught:
            self.key.require()
        return str(caught.value)


def test_each_device_gets_its_own_part_and_no_other(made: Holding) -> None:
    server = Server(made)
    usable = server.key.require()
    assert (usable.number, usable.sealed) == (int(NOW), {0, 1, 2})
    for index in range(3):
        bundle = KeyBundle.from_bytes(server.key.bundle(index, b""))
        assert open_for(made.device(index), bundle.published, bundle.sealed, NOW).public == usable.key
        assert bundle.sealed == made.sealed(index)
        assert server.key.bundle(index, usable.key.key_id) == b""
        assert server.key.bundle(index, bytes(32)) != b""
    with pytest.raises(NotOnOfferError, match="was not sealed for this device yet"):
        server.key.bundle(3, b"")


def test_a_newcomer_is_noticed_without_a_restart(made: Holding, caplog: pytest.LogCaptureFixture) -> None:
    server = Server(made)
    before = server.key.bundle(0, b"")
    assert not server.key.refresh()
    made.enroll("late")
    with pytest.raises(NotOnOfferError):
        server.key.bundle(3, b"")
    assert "was not sealed for this device: propolis federation he-key" in caplog.text
    made.issue()
    assert server.key.refresh()
    assert not server.key.refresh()
    assert server.key.bundle(3, b"")
    assert server.key.bundle(0, b"") == before
    assert server.key.require().sealed == {0, 1, 2, 3}


def test_a_key_that_a_revoked_device_has_is_not_used_until_there_is_another(made: Holding) -> None:
    server = Server(made)
    old = server.key.require()
    made.site.federation.revoke("lab")
    expected = (
        "lab is revoked and has the key of homomorphic encryption: its holder makes another (propolis federation "
    )
    assert server.fault().startswith(expected)
    assert server.fault().endswith("he-key --renew)")
    assert server.key.refresh()
    with pytest.raises(NotOnOfferError, match="not to be used at the moment"):
        server.key.bundle(0, b"")
    made.issue(RENEW)
    new = server.key.require()
    assert new.number > old.number
    assert new.sealed == {0, 2}
    assert server.key.refresh()
    with pytest.raises(NotOnOfferError):
        server.key.bundle(1, b"")
    assert KeyBundle.from_bytes(server.key.bundle(0, old.key.key_id)).number == new.number


def test_files_that_are_copied_one_after_the_other_are_waited_for(made: Holding, tmp_path: Path) -> None:
    older = shutil.copytree(made.out, tmp_path / "older")
    server = Server(made)
    made.issue(RENEW)
    newer = shutil.copytree(made.out, tmp_path / "newer")
    shutil.copy(older / "he.keys", made.out / "he.keys")
    assert "is not of the key in" in server.fault()
    with pytest.raises(NotOnOfferError):
        server.key.bundle(0, b"")
    whole = (newer / "he.keys").read_bytes()
    (made.out / "he.keys").write_bytes(whole[:-1])
    assert "is cut: copy it again" in server.fault()
    (made.out / "he.keys").write_bytes(whole)
    assert server.key.require().sealed == {0, 1, 2}
    assert server.key.bundle(0, b"")


def missing(made: Holding) -> None:
    (made.out / "he.public").unlink()


def no_parts(made: Holding) -> None:
    (made.out / "he.keys").unlink()


def garbage(made: Holding) -> None:
    (made.out / "he.public").write_bytes(os.urandom(500))


def cut(made: Holding) -> None:
    (made.out / "he.public").write_bytes((made.out / "he.public").read_bytes()[:-1])


def garbage_for_parts(made: Holding) -> None:
    (made.out / "he.keys").write_bytes(os.urandom(500))


def damaged_parts(made: Holding) -> None:
    """Its last record twice."""
    whole = (made.out / "he.keys").read_bytes()
    record = (len(whole) - len(b"propolis he keys\x01") - 4 - 32) // len(NAMES)
    (made.out / "he.keys").write_bytes(whole + whole[-record:])


def of_another_federation(made: Holding) -> None:
    other = holding(made.folder / "other", *NAMES)
    other.issue()
    shutil.copytree(other.out, made.out, dirs_exist_ok=True)


def of_a_revoked_holder(made: Holding) -> None:
    made.site.federation.revoke_key_holder(1)


WRONG = [
    (missing, "no key of homomorphic encryption in .*: its holder makes one .propolis federation he-key."),
    (no_parts, "he.keys is not of the key in"),
    (garbage, "he.public is no key"),
    (cut, "he.public is no key"),
    (garbage_for_parts, "holds no sealed keys"),
    (damaged_parts, "he.keys is damaged"),
    (of_another_federation, r"he\.public: .*"),
    (of_a_revoked_holder, "the key holder 1 is revoked"),
]


@pytest.mark.parametrize(("change", "said"), WRONG, ids=lambda given: getattr(given, "__name__", ""))
def test_a_key_that_rounds_cannot_be_under_is_one_line(
    made: Holding, change: Callable[[Holding], None], said: str
) -> None:
    change(made)
    server = Server(made)
    fault = server.fault()
    assert "\n" not in fault
    assert re.search(said, fault), fault


def test_a_holders_time_is_looked_at_again_and_again(made: Holding) -> None:
    server = Server(made)
    server.key.require()
    server.now = NOW + DAY_S + 1
    assert "has expired" in server.fault()
    server.now = NOW
    server.key.require()


def test_a_folder_without_a_key_has_none_for_anybody(tmp_path: Path) -> None:
    made = holding(tmp_path, "clinic")
    assert Server(made).key.bundle(0, b"") == b""


SETTINGS = {"protection": "he", "he_mode": "seeded", "clients": 3, "min_clients": 3}


def test_a_run_is_held_to_the_key(made: Holding) -> None:
    key = Server(made).key
    assert key_for(key, Settings(**SETTINGS)) == key.require().key
    with pytest.raises(UsageError, match="bits: the federation's key is for values of 16, and the run has 8"):
        key_for(key, Settings(**SETTINGS, bits=8))
    with pytest.raises(UsageError, match="he_mode: the federation's key is for seeded, and the run is public"):
        key_for(key, Settings(**{**SETTINGS, "he_mode": "public"}))


def test_a_run_without_masks_is_not_under_a_key_for_masks(made: Holding) -> None:
    masks = Settings(**{**SETTINGS, "protection": "he+secagg"})
    server = Server(made)
    key_for(server.key, masks)  # a run may protect more than its key asks for
    made.issue(replace(RENEW, masked=True))
    assert key_for(server.key, masks).masked
    line = r"protection: the federation's key is for updates under masks only, and the run is he: set it to he\+secagg"
    with pytest.raises(UsageError, match=line):
        key_for(server.key, Settings(**SETTINGS))


def test_a_round_has_room_in_the_key_and_enough_devices_have_it(made: Holding) -> None:
    key = Server(made).key
    with pytest.raises(UsageError, match=r"for sums of 10 devices at most, and 11 train .* --renew --clients 11"):
        key_for(key, Settings(**{**SETTINGS, "clients": 11, "min_clients": 11}))
    with pytest.raises(UsageError, match="is sealed for 3 devices, and a round takes 4"):
        key_for(key, Settings(**{**SETTINGS, "clients": 4, "min_clients": 4}))
    key_for(key, Settings(**{**SETTINGS, "min_clients": 2}))


def test_a_round_of_all_members_has_room_in_the_key_that_a_run_begins_with(made: Holding) -> None:
    roster = Server(made).members.roster.roster
    assert largest_round(Settings(**SETTINGS), roster) == 3
    assert largest_round(Settings(**{**SETTINGS, "clients": 14}), roster) == 14
    assert largest_round(Settings(**{**SETTINGS, "clients": 14, "fraction": 0.5}), roster) == 7
    made.enroll("late")
    roster = Server(made).members.roster.roster
    assert largest_round(Settings(**SETTINGS), roster) == 4
    assert largest_round(Settings(**SETTINGS), roster.revoking(0)) == 3
    require_room(4, 4)
    with pytest.raises(UsageError, match="for sums of 3 devices at most, and 4 train"):
        require_room(3, 4)
