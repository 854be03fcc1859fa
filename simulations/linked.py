"""Simulated devices as real processes behind the gRPC link, with certificates, on this machine."""

from __future__ import annotations

import secrets
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from flwr.app.user_config import UserConfigValue

from propolis.client.config import SETTINGS_FILE
from propolis.link.authority import Authority
from propolis.link.certificates import (
    AUTHORITY_FILE,
    CERTIFICATE_FILE,
    KEY_FILE,
    DeviceName,
    load_tls,
    new_tls_key,
    signing_request,
    to_pem,
)
from propolis.link.keys import save_private_key
from propolis.link.spool import Spools
from propolis.secure.errors import TooFewPeersError, UsageError
from propolis.secure.identity import descriptor_digest, fingerprint
from propolis.server.link import LinkOptions, LinkServer
from propolis.server.link_grid import LinkGrid
from propolis.server.membership import Membership
from propolis.server.post import Post
from propolis.settings import Settings
from propolis.simulations.federation import Federation, device_folder, write_federation
from propolis.storage import write_atomically

LOOPBACK = ("127.0.0.1", "localhost")
SERVER_FOLDER = "server"
_DAYS = 365
_LARGEST_MESSAGE = 4 * 2**30
_ANY_NUMBER = 2**31 - 1
_START_S, _START_EACH_S, _POLL_S, _END_S = 60.0, 10.0, 0.5, 10.0


def write_linked_federation(federation: Federation, folder: Path) -> None:
    """Write what `write_federation` does, and certificates, as if every device had enrolled with a server on loopback.

    Raises:
        UsageError: there is a device already.
        StorageError: a file could not be written.
    """
    now = time.time()
    write_federation(federation, folder)
    server = folder / SERVER_FOLDER
    authority = Authority.create(fingerprint(federation.root_key), now)
    authority.save(server)
    key = new_tls_key()
    save_private_key(server / KEY_FILE, key)
    certificate = authority.issue_for_server(key.public_key(), LOOPBACK, _DAYS, now)
    write_atomically(server / CERTIFICATE_FILE, to_pem(certificate))
    membership = Membership(server)
    for index, device in enumerate(federation.devices):
        membership.admit(index, device.descriptor)
        name = DeviceName(fingerprint(federation.root_key), index, descriptor_digest(device.descriptor))
        _certify(device_folder(folder, index), name, authority, now)


def _certify(folder: Path, name: DeviceName, authority: Authority, now: float) -> None:
    key = new_tls_key()
    save_private_key(folder / KEY_FILE, key)
    certificate = authority.issue_for_device(signing_request(key), name, now)
    write_atomically(folder / CERTIFICATE_FILE, to_pem(certificate))
    write_atomically(folder / AUTHORITY_FILE, authority.pem)
    write_atomically(folder / SETTINGS_FILE, b"")  # the server's address is given when it is known


@contextmanager
def linked_grid(settings: Settings, federation: Federation) -> Iterator[LinkGrid]:
    """A grid of real device processes on this machine, behind a real server on loopback.

    Args:
        settings: of the run; a process for each of its clients.
        federation: that the devices are of.

    Raises:
        UsageError: a device could not be started.
        TooFewPeersError: they did not all connect in time.
    """
    with TemporaryDirectory(prefix="propolis-") as name:
        folder = Path(name)
        write_linked_federation(federation, folder)
        server = folder / SERVER_FOLDER
        post = Post(_LARGEST_MESSAGE, Spools())
        options = LinkOptions(
            "127.0.0.1:0", secrets.randbits(62) + 2, _told(settings), largest_message=_LARGEST_MESSAGE
        )
        with ExitStack() as stack:
            devices = stack.enter_context(_ended([]))
            link = stack.enter_context(LinkServer(options, load_tls(server), Membership(server), post))
            for index in range(settings.clients):
                devices.append(_start_device(settings, folder, index, link.port))
            _wait_for_all(link, devices)
            yield LinkGrid(post, link.wake, options.run_id)


@dataclass(frozen=True, slots=True)
class _Device:
    """A process and what it writes."""

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def last_line(self) -> str:
        """The last thing it said."""
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit code {self.process.returncode}"


def _told(settings: Settings) -> dict[str, UserConfigValue]:
    """All of the settings: the devices are simulated here, on the same machine."""
    return {name.replace("_", "-"): value for name, value in settings.model_dump(exclude_none=True).items()}


def _start_device(settings: Settings, folder: Path, index: int, port: int) -> _Device:
    home = device_folder(folder, index)
    node_config = f"partition-id={index} num-partitions={settings.clients} propolis-max-reveals={_ANY_NUMBER}"
    if not settings.is_protected:
        node_config += " propolis-allow-unprotected=true"
    command = [
        *(sys.executable, "-m", "propolis", "client", "run", "--dir", str(home), "--once"),
        *("--server", f"127.0.0.1:{port}", "--app", "propolis.simulations.apps:client", "--node-config", node_config),
    ]
    log = folder / f"device-{index}.log"
    with log.open("wb") as out:  # a session of its own: Ctrl-C is for us, who end it in order
        process = subprocess.Popen(command, stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True)
    return _Device(process, log)


def _wait_for_all(link: LinkServer, devices: Sequence[_Device]) -> None:
    deadline = time.monotonic() + _START_S + _START_EACH_S * len(devices)
    while (connected := link.wait_for_devices(len(devices), _POLL_S)) < len(devices):
        for index, device in enumerate(devices):
            if device.process.poll() is not None:
                raise UsageError(f"device {index} ended before the run began: {device.last_line}")
        if time.monotonic() > deadline:
            raise TooFewPeersError(f"{connected} of {len(devices)} device processes connected in time")


@contextmanager
def _ended(devices: list[_Device]) -> Iterator[list[_Device]]:
    """End the processes whatever happens; they leave by themselves when the server has said that the run is over."""
    try:
        yield devices
    finally:
        deadline = time.monotonic() + _END_S
        for device in devices:
            try:
                device.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                device.process.kill()
                device.process.wait()
