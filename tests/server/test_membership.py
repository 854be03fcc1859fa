"""The server's view of its members: the newest roster that the root signed, and who enrolled with which keys."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from enrolling import DAY_S, Applicant, Site

from propolis.link.certificates import DeviceName
from propolis.secure.errors import TrustError, UsageError
from propolis.secure.identity import descriptor_digest
from propolis.server.membership import Membership
from propolis.storage import write_atomically


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path / "fed")


def joined(site: Site, name: str = "clinic") -> DeviceName:
    """A device that was invited and has enrolled."""
    device = Applicant(site.token(name))
    site.membership.refresh()
    site.membership.admit(device.state.index, device.state.descriptor)
    return name_of(device)


def name_of(device: Applicant) -> DeviceName:
    descriptor = device.state.own_descriptor
    return DeviceName(descriptor.federation, descriptor.index, descriptor_digest(device.state.descriptor))


def test_a_newer_roster_is_taken_when_it_lies_there(site: Site) -> None:
    membership = site.membership
    assert not membership.refresh()
    site.token("clinic")
    assert membership.refresh()
    assert (membership.roster.number, len(membership.roster.roster.entries)) == (2, 1)
    assert not membership.refresh()


def older(site: Site) -> bytes:
    first = (site.server / "roster.bin").read_bytes()
    site.token("clinic")
    site.membership.refresh()
    return first


def of_another_root(site: Site) -> bytes:
    other = Site(site.folder.parent / "other")
    for name in "abc":
        other.token(name)
    return (other.server / "roster.bin").read_bytes()


def of_the_same_number(site: Site) -> bytes:
    copied = site.folder.parent / "copied"
    subprocess.run(["/bin/cp", "-r", site.folder, copied], check=True)
    Site(copied).token("eve")
    site.token("clinic")
    site.membership.refresh()
    return (copied / "server" / "roster.bin").read_bytes()


def half_copied(site: Site) -> bytes:
    site.token("clinic")
    return (site.server / "roster.bin").read_bytes()[:-9]


@pytest.mark.parametrize("put", [older, of_another_root, of_the_same_number, half_copied, lambda site: b""])
def test_any_other_roster_is_logged_once_and_the_last_good_one_kept(
    site: Site, caplog: pytest.LogCaptureFixture, put: Callable[[Site], bytes]
) -> None:
    data = put(site)
    kept = site.membership.roster
    (site.server / "roster.bin").write_bytes(data)
    with caplog.at_level(logging.WARNING, "propolis.server"):
        assert [site.membership.refresh() for _ in range(3)] == [False, False, False]
    assert site.membership.roster is kept
    assert len(caplog.records) == 1
    assert f"keeping roster {kept.number}" in caplog.text


def test_after_a_bad_roster_a_good_one_is_taken(site: Site) -> None:
    site.token("clinic")
    good = (site.server / "roster.bin").read_bytes()
    for data in (good[:-9], good):
        (site.server / "roster.bin").write_bytes(data)
        taken = site.membership.refresh()
    assert taken


def test_a_roster_that_cannot_be_opened_for_a_moment_is_not_lost(
    site: Site, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when strangers hold all the files that a process may have."""

    def exhausted(path: Path) -> bytes:
        raise OSError(errno.EMFILE, "Too many open files", str(path))

    joined(site)
    site.federation.revoke("clinic")
    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(Path, "read_bytes", exhausted)
        assert [site.membership.refresh() for _ in range(3)] == [False] * 3
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert line.startswith("keeping roster 2: ")
    assert line.endswith("roster.bin: Too many open files")
    assert site.membership.refresh()
    assert site.membership.roster.roster.entries[0].revoked


def test_a_copy_that_ends_without_a_trace_is_taken(site: Site) -> None:
    """The clock of a file system has steps: the last bytes may come in the same one as those that were looked at."""
    site.token("clinic")
    path = site.server / "roster.bin"
    good = path.read_bytes()
    path.write_bytes(good[:-9] + bytes(9))
    step = path.stat().st_mtime_ns
    assert not site.membership.refresh()
    path.write_bytes(good)
    os.utime(path, ns=(step, step))
    assert site.membership.refresh()


def test_another_fault_of_the_roster_is_told_too(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    for damage in (Path.unlink, Path.touch, Path.unlink):
        damage(site.server / "roster.bin")
        site.membership.refresh()
    assert len([record for record in caplog.records if record.levelname == "WARNING"]) == 3


def test_a_roster_that_is_away_for_a_moment_is_waited_for(site: Site) -> None:
    (site.server / "roster.bin").rename(site.server / "away")
    assert not site.membership.refresh()
    site.membership.roster.require_current(time.time())


def test_another_root_is_not_taken_over_while_the_server_runs(site: Site) -> None:
    other = Site(site.folder.parent / "other")
    other.token("eve")
    for file in ("root.pub", "roster.bin"):
        (other.server / file).replace(site.server / file)
    assert not site.membership.refresh()
    assert site.membership.root_key != other.membership.root_key


def test_a_member_is_let_in(site: Site) -> None:
    site.membership.require(joined(site))


def test_others_are_refused_with_a_reason(site: Site) -> None:
    name = joined(site)
    site.token("ward")
    site.membership.refresh()
    for stranger, line in (
        (replace(name, federation=bytes(32)), "device 0 is of another federation"),
        (replace(name, index=2), "device 2 is not in the roster 3"),
        (replace(name, index=1), "device 1 has not enrolled with this server"),
        (replace(name, descriptor=bytes(32)), "device 0 enrolled with other keys than these"),
    ):
        with pytest.raises(TrustError, match=line):
            site.membership.require(stranger)


def test_a_revoked_device_is_refused_from_the_next_look_on(site: Site) -> None:
    name = joined(site)
    site.federation.revoke("clinic")
    site.membership.refresh()
    with pytest.raises(TrustError, match=r"device 0 \(clinic\) is revoked"):
        site.membership.require(name)


def test_under_an_expired_roster_nobody_is_let_in(site: Site) -> None:
    name = joined(site)
    late = Membership(site.server, clock=lambda: time.time() + 366 * DAY_S)
    with pytest.raises(TrustError, match="roster 2 has expired"):
        late.require(name)


def test_who_enrolled_is_kept_over_a_restart(site: Site) -> None:
    name = joined(site)
    restarted = Membership(site.server)
    restarted.require(name)
    descriptor = restarted.enrolled(0)
    assert descriptor is not None
    assert descriptor_digest(descriptor) == name.descriptor
    file = site.server / "enrolled" / "0"
    assert file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("restart", [False, True])
def test_the_first_descriptor_of_a_place_is_the_only_one(site: Site, restart: bool) -> None:
    token = site.token("clinic")
    first, second = Applicant(token), Applicant(token)
    site.membership.admit(0, first.state.descriptor)
    membership = Membership(site.server) if restart else site.membership
    membership.admit(0, first.state.descriptor)
    with pytest.raises(TrustError, match="the token was used before, by another device"):
        membership.admit(0, second.state.descriptor)
    assert Membership(site.server).enrolled(0) == first.state.descriptor


def test_two_servers_on_one_folder_give_a_place_once(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    token = site.token("clinic")
    devices, begun, go_on = [Applicant(token), Applicant(token)], threading.Event(), threading.Event()

    def slow(*arguments: Any, **named: Any) -> None:
        begun.set()
        go_on.wait(10)
        write_atomically(*arguments, **named)

    monkeypatch.setattr("propolis.server.membership.write_atomically", slow)
    with ThreadPoolExecutor(2) as threads:
        admitted = []
        for device in devices:
            admitted.append(threads.submit(Membership(site.server).admit, 0, device.state.descriptor))
            assert begun.wait(10)
        wait(admitted, 0.3)  # the second one has looked whether the place is free
        go_on.set()
        assert admitted[0].result(10) is None
        with pytest.raises(TrustError, match="by another device: place 0 is taken"):
            admitted[1].result(10)
    assert Membership(site.server).enrolled(0) == devices[0].state.descriptor


KILLED = """
import os, sys
from pathlib import Path
from propolis.secure.identity import Signed
from propolis.server import membership
write = membership.write_atomically
def dying(*arguments, **named):
    if sys.argv[2] == "after":
        write(*arguments, **named)
    os._exit(9)
membership.write_atomically = dying
membership.Membership(Path(sys.argv[1])).admit(0, Signed(*map(bytes.fromhex, sys.argv[3:])))
"""


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_crash_while_a_member_is_kept_keeps_it_whole_or_not_at_all(site: Site, when: str) -> None:
    descriptor = Applicant(site.token("clinic")).state.descriptor
    signed = (descriptor.payload.hex(), descriptor.signature.hex())
    done = subprocess.run([sys.executable, "-c", KILLED, str(site.server), when, *signed], check=False)
    assert done.returncode == 9
    assert Membership(site.server).enrolled(0) == (descriptor if when == "after" else None)
    Membership(site.server).admit(0, descriptor)


def test_a_damaged_entry_is_told_and_not_overwritten(site: Site) -> None:
    device = Applicant(site.token("clinic"))
    (site.server / "enrolled" / "0").write_bytes(b"\xff")
    with pytest.raises(UsageError, match="enrolled/0 is damaged"):
        site.membership.admit(0, device.state.descriptor)
    site.membership.refresh()
    with pytest.raises(UsageError, match="enrolled/0 is damaged"):
        site.membership.require(name_of(device))


def test_a_folder_without_a_federation_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no federation"):
        Membership(tmp_path)
