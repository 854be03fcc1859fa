"""A federation in a folder, and a server on the loopback that devices enrol with."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from propolis.client.enroll import Enrolling
from propolis.link.address import Address
from propolis.link.authority import Authority
from propolis.link.certificates import load_tls, new_tls_key, signing_request
from propolis.link.enrolment import EnrollReply, EnrollRequest, prove
from propolis.link.token import Token
from propolis.protos import link_pb2 as pb
from propolis.secure.identity import Signed
from propolis.secure.secagg.device_state import DeviceState
from propolis.secure.wire import fill
from propolis.server.enroll import Enrolment, Hospitality, make_enrolment_server
from propolis.server.federation import Federation
from propolis.server.foundation import SERVER_FOLDER, Foundation, found
from propolis.server.membership import Membership

NAMES = ("localhost", "127.0.0.1")
HOUR_S, DAY_S = 3600, 24 * 3600


@dataclass
class Site:
    """The root's folder, and the server that has read what is in it."""

    folder: Path
    root_online: bool = False
    asked: list[pb.EnrollRequest] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.folder.exists():
            found(self.folder, Foundation(NAMES, self.root_online), time.time())
        self.federation = Federation(self.folder)
        self.authority = Authority.load(self.server)
        self.membership = Membership(self.server)

    @property
    def server(self) -> Path:
        return self.folder / SERVER_FOLDER

    @property
    def enrolment(self) -> Enrolment:
        return _Recording(self)

    def token(self, name: str = "clinic", lifetime_s: int = HOUR_S, now: float | None = None) -> Token:
        return Token.from_text(self.federation.invite(name, lifetime_s, time.time() if now is None else now))


class _Recording(Enrolment):
    """Keeps what was asked."""

    def __init__(self, site: Site) -> None:
        super().__init__(site.membership, site.authority, ":7443")
        self._asked = site.asked

    def answer(self, asked: pb.EnrollRequest, now: float) -> EnrollReply:
        self._asked.append(asked)
        return super().answer(asked, now)


@contextmanager
def serving(
    site: Site,
    tls_folder: Path | None = None,
    enrolment: Enrolment | None = None,
    hospitality: Hospitality | None = None,
) -> Iterator[Address]:
    """The site's enrolment on a free port."""
    loop, ready, stop = asyncio.new_event_loop(), threading.Event(), asyncio.Event()
    ports: list[int] = []

    async def serve() -> None:
        tls = load_tls(tls_folder or site.server)
        server, port = make_enrolment_server(enrolment or site.enrolment, "127.0.0.1:0", tls, hospitality)
        await server.start()
        ports.append(port)
        ready.set()
        await stop.wait()
        await server.stop(0)

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    try:
        assert ready.wait(10)
        yield Address("localhost", ports[0])
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        loop.close()


def enrolling(server: Address, token: Token, folder: Path, passphrase: bytes | None = None) -> Enrolling:
    return Enrolling(server, token, folder, passphrase, timeout=10)


class Applicant:
    """A device that has a token, and signs what it is told to."""

    def __init__(self, token: Token) -> None:
        self.state = DeviceState.enrolled(token.root_key, token.invitation, token.key)
        self.tls_key = new_tls_key()
        self.invitation = token.invitation

    def request(
        self,
        clock: float | None = None,
        *,
        csr: bytes | None = None,
        descriptor: Signed | None = None,
        invitation: Signed | None = None,
        proof: bytes | None = None,
        version: int = 1,
    ) -> pb.EnrollRequest:
        seconds = int(time.time() if clock is None else clock)
        csr = signing_request(self.tls_key) if csr is None else csr
        proof = proof or prove(self.state.signing_key, self.state.own_descriptor, csr, seconds)
        filled = pb.EnrollRequest()
        request = EnrollRequest(
            invitation or self.invitation, descriptor or self.state.descriptor, csr, seconds, proof, version
        )
        fill(request, filled)
        return filled
