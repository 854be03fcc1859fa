"""A device enrols: one command, one line for every mistake, and no half-made member whatever the crash."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import Command
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from enrolling import DAY_S, HOUR_S, Site, enrolling, serving

from propolis.client.enroll import SETTINGS_FILE, enroll
from propolis.client.hybrid import announcement_of
from propolis.client.seal import Seal
from propolis.client.state import LOCK_FILE, STATE_FILE, FileStore
from propolis.link.address import Address
from propolis.link.certificates import DeviceName, fault_of, load_tls, new_tls_key
from propolis.secure.errors import UsageError
from propolis.secure.secagg.device_state import DeviceState
from propolis.secure.secagg.policy import Policy
from propolis.server.enroll import Enrolment
from propolis.server.foundation import renew_server_certificate

WAIT_S = 30.0


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(tmp_path_factory.mktemp("site") / "fed")


@pytest.fixture(scope="module")
def server(site: Site) -> Iterator[Address]:
    with serving(site) as address:
        yield address


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "device"


def state_in(folder: Path, seal: Seal | None = None) -> DeviceState:
    return FileStore(folder, Policy(), seal).change(lambda device: device.state)


def test_a_device_joins_with_its_token(site: Site, server: Address, folder: Path) -> None:
    before = os.umask(0)
    try:
        invitation = enroll(enrolling(server, site.token("one"), folder))
    finally:
        os.umask(before)
    tls, state = load_tls(folder), state_in(folder)
    assert fault_of(tls, time.time()) is None
    site.membership.require(DeviceName.of(tls.certificate))
    assert state.roster == site.membership.roster.signed
    assert state.index == invitation.index
    assert tomllib.loads((folder / SETTINGS_FILE).read_text()) == {"server": "localhost:7443"}
    assert {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()} == {
        STATE_FILE: 0o600,
        LOCK_FILE: 0o600,
        "enroll.lock": 0o600,
        "tls.key": 0o600,
        "hybrid.key": 0o600,
        "tls.pem": 0o644,
        "ca.pem": 0o644,
        SETTINGS_FILE: 0o644,
    }
    assert folder.stat().st_mode & 0o777 == 0o700


def test_nothing_secret_is_sent(site: Site, server: Address, folder: Path) -> None:
    token = site.token("discreet")
    enroll(enrolling(server, token, folder))
    sent, state = site.asked[-1].SerializeToString(), state_in(folder)
    numbers = load_private_number(folder)
    for secret in (token.private_key, state.signing_key.private, state.hpke_private, state.rounding_secret, numbers):
        assert secret not in sent


def load_private_number(folder: Path) -> bytes:
    from propolis.link.keys import load_tls_key

    return load_tls_key(folder / "tls.key").private_numbers().private_value.to_bytes(32, "big")


def test_with_a_passphrase_no_key_lies_open(site: Site, server: Address, folder: Path) -> None:
    token = site.token("sealed")
    enroll(enrolling(server, token, folder, b"open sesame"))
    state = state_in(folder, Seal(b"open sesame"))
    assert state.roster is not None
    everything = b"".join(path.read_bytes() for path in folder.iterdir())
    for secret in (state.signing_key.private, state.hpke_private, state.descriptor.payload):
        assert secret not in everything
    assert load_tls(folder, b"open sesame")
    with pytest.raises(UsageError, match="the passphrase is wrong"):
        load_tls(folder, b"open barley")


KILLED = """
import os, sys
from pathlib import Path
from propolis import storage
at, write, calls = int(sys.argv[1]), storage.write_atomically, []
def dying(*arguments, **named):
    calls.append(1)
    if len(calls) == at:
        os._exit(9)
    write(*arguments, **named)
storage.write_atomically = dying
from propolis.client.enroll import Enrolling, enroll
from propolis.link.address import Address
from propolis.link.token import Token
enroll(Enrolling(Address.parse(sys.argv[2]), Token.from_text(sys.argv[3]), Path(sys.argv[4])))
if len(calls) + 1 == at:
    os._exit(9)
"""


def test_killed_at_any_write_the_same_token_gives_one_whole_member(site: Site, server: Address, tmp_path: Path) -> None:
    for number in range(1, 20):
        folder, token = tmp_path / str(number), site.token(f"killed-{number}")
        arguments = [str(number), str(server), token.to_text(), str(folder)]
        done = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode in (0, 9), done.stderr
        has_joined = (folder / SETTINGS_FILE).exists()
        assert has_joined == (number > 7)
        if has_joined:
            with pytest.raises(UsageError, match="is enrolled already"):
                enroll(enrolling(server, token, folder))
        else:
            enroll(enrolling(server, token, folder))
        site.membership.require(DeviceName.of(load_tls(folder).certificate))
        assert fault_of(load_tls(folder), time.time()) is None
        index = state_in(folder).index
        assert state_in(folder).descriptor == site.membership.enrolled(index)
        assert announcement_of(folder) == site.membership.announced(index)
        if done.returncode == 0:
            break
    assert number == 9  # state, two keys, authority, certificate, roster, settings, after them, and not at all


def test_an_answer_that_was_lost_is_asked_for_again(site: Site, server: Address, folder: Path) -> None:
    """Admitted by the server, but the device did not hear so."""
    token = site.token("deaf")
    enroll(enrolling(server, token, folder))
    first = state_in(folder).descriptor
    for file in (SETTINGS_FILE, "tls.pem", "ca.pem"):
        (folder / file).unlink()
    enroll(enrolling(server, token, folder))
    assert state_in(folder).descriptor == first


def test_a_device_that_has_joined_does_not_again(site: Site, server: Address, folder: Path) -> None:
    enroll(enrolling(server, site.token("again"), folder))
    for token in (site.token("again"), site.token("another")):
        with pytest.raises(UsageError, match="is enrolled already: use another folder"):
            enroll(enrolling(server, token, folder))


def test_two_at_once_in_one_folder_make_one_device(site: Site, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token, make, both = site.token("twice"), new_tls_key, threading.Barrier(2)

    def slow() -> EllipticCurvePrivateKey:
        with suppress(threading.BrokenBarrierError):
            both.wait(0.5)  # for the other one to have no key either
        return make()

    monkeypatch.setattr("propolis.client.enroll.new_tls_key", slow)
    with serving(site) as address, ThreadPoolExecutor(2) as threads:
        faults = [threads.submit(enroll, enrolling(address, token, folder)).exception for _ in range(2)]
        (fault,) = [fault for fault in (each(WAIT_S) for each in faults) if fault is not None]
    assert "is enrolled already" in str(fault)
    assert fault_of(load_tls(folder), time.time()) is None


def test_a_folder_with_the_keys_of_another_token_is_left_alone(site: Site, server: Address, folder: Path) -> None:
    enroll(enrolling(server, site.token("first"), folder))
    (folder / SETTINGS_FILE).unlink()
    before = (folder / STATE_FILE).read_bytes()
    with pytest.raises(UsageError, match="has the keys of another token: use a new folder"):
        enroll(enrolling(server, site.token("second"), folder))
    assert (folder / STATE_FILE).read_bytes() == before


def test_a_federation_with_its_root_online_may_be_refused(tmp_path: Path, folder: Path) -> None:
    site = Site(tmp_path / "online", root_online=True)
    with serving(site) as address:
        asked = enrolling(address, site.token(), folder)
        with pytest.raises(UsageError, match="which --require-offline-root refuses"):
            enroll(replace(asked, require_offline_root=True))
        assert not folder.exists()
        assert enroll(asked).root_online


# What can go wrong on the way.


def test_nobody_listens(site: Site, folder: Path) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        address = Address("127.0.0.1", bound.getsockname()[1])
        with pytest.raises(UsageError, match=f"cannot connect to {address}: Connection refused"):
            enroll(enrolling(address, site.token(), folder))


def test_an_unknown_host_is_told(site: Site, folder: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot connect to nowhere\.invalid:1: "):
        enroll(enrolling(Address("nowhere.invalid", 1), site.token(), folder))


@contextmanager
def listening(answer: bytes) -> Iterator[Address]:
    """A server that says this to everybody and nothing more."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        held: list[socket.socket] = []

        def serve() -> None:
            while True:
                try:
                    held.append(server.accept()[0])
                    held[-1].sendall(answer)
                except OSError:
                    return

        threading.Thread(target=serve, daemon=True).start()
        yield Address("127.0.0.1", server.getsockname()[1])
        server.shutdown(socket.SHUT_RDWR)
        for each in held:
            each.close()


def test_a_server_that_says_nothing_is_waited_for_no_longer_than_asked(site: Site, folder: Path) -> None:
    with listening(b"") as address, pytest.raises(UsageError, match="does not answer"):
        enroll(replace(enrolling(address, site.token(), folder), timeout=0.3))


def test_a_server_that_speaks_something_else_is_told(site: Site, folder: Path) -> None:
    with listening(b"SSH-2.0-OpenSSH_9.2\r\n") as address, pytest.raises(UsageError, match="does not speak TLS"):
        enroll(enrolling(address, site.token(), folder))


def test_a_name_that_is_not_in_the_certificate_is_told_with_those_that_are(
    site: Site, server: Address, folder: Path
) -> None:
    with pytest.raises(UsageError, match=r"is not for 127\.0\.0\.2 but for localhost, 127\.0\.0\.1: connect by such"):
        enroll(enrolling(replace(listening_everywhere(server), host="127.0.0.2"), site.token(), folder))


def listening_everywhere(server: Address) -> Address:
    """The same server by a second address: a pipe to it."""
    pipe = socket.create_server(("127.0.0.2", 0))

    def forward() -> None:
        there, (here, _) = socket.create_connection(("127.0.0.1", server.port)), pipe.accept()
        threading.Thread(target=copy, args=(here, there), daemon=True).start()
        copy(there, here)

    def copy(source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(4096):
                target.sendall(data)
        except OSError:
            pass

    threading.Thread(target=forward, daemon=True).start()
    return Address("127.0.0.2", pipe.getsockname()[1])


# The command.


def test_the_command_takes_a_token_from_anywhere(
    site: Site, server: Address, propolis: Command, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text(site.token("from-a-file").to_text() + "\n")
    done = propolis("client", "enroll", "--server", server, "--token", "@token", "--dir", "a")
    assert (done.returncode, done.stderr) == (0, "")
    assert "from-a-file" in done.stdout
    piped = subprocess.run(
        [sys.executable, "-m", "propolis", *f"client enroll --server {server} --token - --dir b".split()],
        input=site.token("piped").to_text(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "piped" in piped.stdout, piped.stderr


def test_the_command_says_each_mistake_in_one_line(
    site: Site, server: Address, mistake: Callable[..., str], tmp_path: Path
) -> None:
    token = site.token("clinic", HOUR_S).to_text()
    where = ("--dir", "device")
    (tmp_path / "bytes").touch(mode=0o600)
    (tmp_path / "bytes").write_bytes(b"\xff")
    for arguments, line in (
        (("--server", "nonsense", "--token", token), "expected HOST:PORT"),
        (("--server", server, "--token", token[:-3]), "mistyped or cut"),
        (("--server", server, "--token", "@missing"), "cannot read the token from missing"),
        (("--server", server, "--token", token, "--passphrase-file", "missing"), "cannot read missing"),
        (("--server", server, "--token", token, "--passphrase-file", "bytes"), "the passphrase in bytes is no text"),
        (("--server", "localhost:1", "--token", token), "cannot connect to localhost:1"),
    ):
        assert line in mistake("client", "enroll", *arguments, *where)


def test_a_server_whose_certificate_has_expired_is_told(tmp_path: Path, folder: Path) -> None:
    site = Site(tmp_path / "fed")
    renew_server_certificate(site.server, (), 1, None, time.time() - 40 * DAY_S)
    with serving(site) as address, pytest.raises(UsageError, match="the server's certificate expired on"):
        enroll(enrolling(address, site.token(), folder))


def test_an_attack_is_one_line_of_the_command_too(tmp_path: Path, mistake: Callable[..., str]) -> None:
    site, other = Site(tmp_path / "fed"), Site(tmp_path / "other")
    shown = Enrolment(other.membership, site.authority, ":1")
    with serving(other, enrolment=shown) as address:
        told = mistake("client", "enroll", "--server", address, "--token", site.token().to_text(), "--dir", "device")
    assert "has no certificate of the token's authority: this may be an attack" in told
