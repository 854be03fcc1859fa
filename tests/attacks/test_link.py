"""What a stranger, or a member that lies, can do to the link: nothing to the run."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from grpc_health.v1 import health_pb2, health_pb2_grpc
from linked import Link, Raw, link_of

from propolis.client.agent import RefusedByServerError
from propolis.client.diagnose import _shaken, why_unreachable
from propolis.link.authority import Authority
from propolis.link.certificates import DeviceName, Tls, new_tls_key, signing_request, to_pem
from propolis.link.frames import (
    LARGEST_FRAME,
    Begin,
    Cancel,
    Chunk,
    Farewell,
    Frame,
    Reason,
    Received,
    Welcome,
    decode_frame,
    encode_frame,
)
from propolis.link.keys import encode_private_key
from propolis.link.options import METHOD_PATH, SERVICE
from propolis.link.spool import Spools
from propolis.secure.errors import PropolisError, UsageError
from propolis.secure.identity import Root, Roster, SigningKey
from propolis.secure.secagg.device_state import DeviceState
from propolis.server.link import LinkOptions, LinkServer
from propolis.server.post import Post
from propolis.server.roster import replace_roster
from propolis.simulations.federation import Federation
from propolis.simulations.linked import write_linked_federation

HONEST = 3
ID = b"i" * 16


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Link]:
    """A link with three honest devices, and the places of more that the tests play."""
    with Link(tmp_path_factory.mktemp("federation"), 6, beat_seconds=1) as link:
        link.start(*range(HONEST))
        yield link


@pytest.fixture
def link(running: Link) -> Iterator[Link]:
    """The same; what a test has done must not keep the honest devices from the next exchange."""
    yield running
    running.wait_until(lambda: len(running.grid.get_node_ids()) == HONEST)
    replies = running.exchange()
    assert [reply.has_error() for reply in replies] == [False] * HONEST


@pytest.fixture
def raw(link: Link) -> Iterator[Callable[..., Raw]]:
    """Makes raw devices, and closes them."""
    made: list[Raw] = []

    def make(tls: Tls | None = None) -> Raw:
        made.append(Raw(link, tls or link.tls(3)))
        return made[-1]

    yield make
    for each in made:
        each.close()


def issued(link: Link, index: int, *, now: float | None = None, authority: Authority | None = None) -> Tls:
    """A certificate for a device, by the federation's authority at some time, or by another one."""
    issuer = authority or Authority.load(link.folder / "server")
    key = new_tls_key()
    name = DeviceName.of(link.tls(index).certificate)
    certificate = issuer.issue_for_device(signing_request(key), name, time.time() if now is None else now)
    return replace(link.tls(index), private_key=encode_private_key(key), certificate=to_pem(certificate))


def require_refused(said: Frame, reason: Reason, words: str) -> None:
    assert isinstance(said, Farewell), said
    assert (said.name, words in said.detail) == (reason.name, True), said


def test_without_a_certificate_there_is_no_stream(link: Link, raw: Callable[..., Raw]) -> None:
    stranger = raw(replace(link.tls(3), private_key=b""))
    assert stranger.end() is grpc.StatusCode.UNAVAILABLE


def test_a_certificate_of_another_authority_is_refused(link: Link, raw: Callable[..., Raw]) -> None:
    forged = issued(link, 3, authority=Authority.create(SigningKey.generate().public, time.time()))
    assert raw(forged).end() is grpc.StatusCode.UNAVAILABLE
    assert "authority" in why_unreachable(link.address, forged, time.time())


def test_an_expired_certificate_is_refused(link: Link, raw: Callable[..., Raw]) -> None:
    authority, key, now = Authority.load(link.folder / "server"), new_tls_key(), time.time()
    name = x509.UniformResourceIdentifier(DeviceName.of(link.tls(3).certificate).uri)
    until = datetime.fromtimestamp(now - 60, UTC)
    builder = authority._leaf("Propolis device 3", key.public_key(), now - 10 * 86400, until)
    certificate = to_pem(authority._sign(builder, [name], ExtendedKeyUsageOID.CLIENT_AUTH))
    expired = replace(link.tls(3), private_key=encode_private_key(key), certificate=certificate)
    assert raw(expired).end() is grpc.StatusCode.UNAVAILABLE
    assert "expired" in why_unreachable(link.address, expired, now)
    assert "this device's certificate does not hold" in why_unreachable(link.address, expired, now - 3600)


def test_a_device_is_who_its_certificate_says(link: Link, raw: Callable[..., Raw]) -> None:
    require_refused(raw().hello(link.node_id(4)), Reason.IDENTITY, "not that of the certificate")
    require_refused(raw().hello(link.node_id(0)), Reason.IDENTITY, "not that of the certificate")


def test_the_servers_certificate_is_no_devices(link: Link, raw: Callable[..., Raw]) -> None:
    from propolis.link.certificates import load_tls

    assert raw(load_tls(link.folder / "server")).end() is not grpc.StatusCode.OK


def test_a_certificate_for_a_descriptor_that_did_not_enrol_is_refused(link: Link, raw: Callable[..., Raw]) -> None:
    """As the authority alone could issue it: it makes nobody a member."""
    authority, key = Authority.load(link.folder / "server"), new_tls_key()
    name = replace(DeviceName.of(link.tls(3).certificate), descriptor=b"d" * 32)
    certificate = to_pem(authority.issue_for_device(signing_request(key), name, time.time()))
    forged = replace(link.tls(3), private_key=encode_private_key(key), certificate=certificate)
    require_refused(raw(forged).hello(name.node_id), Reason.IDENTITY, "other keys")


@pytest.mark.parametrize("hour", [-3600, 3600])
def test_a_clock_an_hour_off_is_told(link: Link, raw: Callable[..., Raw], hour: int) -> None:
    side = "ahead of" if hour > 0 else "behind"
    require_refused(raw().hello(link.node_id(3), clock=time.time() + hour), Reason.CLOCK, f"s {side} the server's")


def test_a_device_that_says_nothing_has_no_stream(link: Link, raw: Callable[..., Raw]) -> None:
    silent = raw()
    require_refused(silent.hear(), Reason.SILENT, "no Hello")


WRONG: dict[str, Frame | bytes] = {
    "bytes of nothing": Chunk(b"x"),
    "a reply to no request": Begin(ID, 5, (), 0, b"reply"),
    "the middle of a message": Begin(ID, 5, (), 3, b"ly"),
    "what only a server says": Received(ID),
    "a cancellation": Cancel(ID),
    "a second welcome": Welcome(b"p" * 16, 10, 10, 5, b"", ()),
    "a frame of a later version": b"\xa2\x06\x03abc",
    "garbage": b"\xff" * 100,
    "nothing": b"",
}


@pytest.mark.parametrize("what", WRONG)
def test_a_frame_that_cannot_be_ends_the_stream_with_its_reason(
    link: Link, raw: Callable[..., Raw], what: str, caplog: pytest.LogCaptureFixture
) -> None:
    liar = raw()
    assert isinstance(liar.hello(link.node_id(3)), Welcome)
    with caplog.at_level(logging.WARNING, "propolis.link"):
        liar.say(WRONG[what])
        require_refused(liar.last(), Reason.PROTOCOL, "")
    assert liar.end() is grpc.StatusCode.OK
    assert "refused a frame" in caplog.text


def test_a_first_frame_that_is_no_hello_is_refused(link: Link, raw: Callable[..., Raw]) -> None:
    for wrong in (encode_frame(Chunk(b"x")), b"\xff" * 100):
        liar = raw()
        liar.say(wrong)
        require_refused(liar.hear(), Reason.PROTOCOL, "")


def test_a_frame_over_the_limit_ends_the_stream(link: Link, raw: Callable[..., Raw]) -> None:
    liar = raw()
    liar.hello(link.node_id(3))
    liar.say(b"x" * (LARGEST_FRAME + 1))
    assert liar.end() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "larger than max" in str(liar.call.details())


def asked(link: Link, liar: Raw, timeout: float = 30.0) -> tuple[list[str], Begin]:
    """Ask the raw device something; the ids, and the request as it came."""
    (message,) = link.messages(nodes=[link.node_id(3)])
    message.metadata.ttl = timeout
    ids = list(link.grid.push_messages([message]))
    while not (isinstance(request := liar.hear(), Begin) and request.id.hex() in ids):
        pass  # of a test before
    return ids, request


@pytest.mark.parametrize(
    "frames",
    [
        [Begin(ID, 5, (4,), 0, b"reply"), Begin(ID, 5, (4,), 0, b"reply")],
        [Begin(ID, 5, (4,), 0, b"reply"), Begin(ID, 5, (4,), 7, b"")],
        [Begin(ID, 5, (4,), 0, b"reply"), Chunk(b"12345")],
        [Begin(ID, 5, (), 0, b"reply"), Begin(ID, 5, (), 0, b"reply")],
    ],
    ids=["begun twice", "out of order", "too long", "sent twice"],
)
def test_a_reply_out_of_order_ends_the_stream(link: Link, raw: Callable[..., Raw], frames: list[Begin | Chunk]) -> None:
    liar = raw()
    liar.hello(link.node_id(3))
    ids, request = asked(link, liar)
    for frame in frames:
        liar.say(replace(frame, id=request.id) if isinstance(frame, Begin) else frame)
    require_refused(liar.last(), Reason.PROTOCOL, "")
    (reply,) = ended(link, ids) or [None]
    assert reply is None or reply.has_error()


def ended(link: Link, ids: list[str]) -> list[object]:
    """What there is to pull, within a second."""
    deadline = time.monotonic() + 1
    while not (replies := list(link.grid.pull_messages(ids))) and time.monotonic() < deadline:
        time.sleep(0.02)
    return replies  # type: ignore[return-value]


def test_a_reply_that_is_no_message_is_an_error_reply(link: Link, raw: Callable[..., Raw]) -> None:
    liar = raw()
    liar.hello(link.node_id(3))
    for header in (b"\xff" * 20, b"\x12\x04\x0a\x02\x0a\x00"):
        ids, request = asked(link, liar)
        liar.say(Begin(request.id, len(header), (), 0, header))
        (reply,) = ended(link, ids)
        assert reply.has_error()  # type: ignore[attr-defined]


def test_a_declared_length_that_is_never_sent_costs_its_request_alone(link: Link, raw: Callable[..., Raw]) -> None:
    liar = raw()
    liar.hello(link.node_id(3))
    ids, request = asked(link, liar, timeout=1.0)
    liar.say(Begin(request.id, 5, (2**30,), 0, b"reply"))
    deadline = time.monotonic() + 10
    while not (replies := list(link.grid.pull_messages(ids))):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert replies[0].has_error()
    assert link.node_id(3) not in link.grid.get_node_ids()  # it owes an answer, and is not asked again


def test_a_reply_over_the_limit_is_an_error_reply(link: Link, raw: Callable[..., Raw]) -> None:
    liar = raw()
    liar.hello(link.node_id(3))
    ids, request = asked(link, liar)
    liar.say(Begin(request.id, 5, (2**45,), 0, b"reply"))
    (reply,) = ended(link, ids)
    assert "are taken" in reply.error.reason  # type: ignore[attr-defined]


def test_a_device_that_only_listens_is_cut_off_after_three_missed_beats(link: Link, raw: Callable[..., Raw]) -> None:
    silent = raw()
    silent.hello(link.node_id(3))
    require_refused(silent.last(), Reason.SILENT, "nothing was heard")


def test_of_two_processes_of_one_device_the_newer_wins_and_the_older_is_told(
    link: Link, raw: Callable[..., Raw]
) -> None:
    older, newer = raw(), raw()
    older.hello(link.node_id(3))
    assert isinstance(newer.hello(link.node_id(3)), Welcome)
    require_refused(older.last(), Reason.REPLACED, "another process")
    assert older.end() is grpc.StatusCode.OK
    ids, request = asked(link, newer)
    assert request.id.hex() in ids


def test_an_agent_that_is_replaced_ends(link: Link) -> None:
    which = link.devices.start(link.device(5), link.address)
    link.wait_until(lambda: link.node_id(5) in link.grid.get_node_ids())
    newer = link.devices.start(link.device(5), link.address)
    with pytest.raises(RefusedByServerError, match="another process"):
        link.devices.futures[which].result(10)
    link.devices.stop(newer)


def test_garbage_on_the_port_disturbs_nobody(link: Link) -> None:
    host, port = link.address.split(":")
    for garbage in (
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\xff\xff" + b"\x00" * 500,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(garbage)
    assert len(link.exchange()) == HONEST


def test_the_server_that_is_not_this_federations_is_named(link: Link, tmp_path: Path) -> None:
    other = Authority.create(SigningKey.generate().public, time.time())
    fooled = replace(issued(link, 3, authority=other), authority=other.pem)
    assert "not of this federation's authority" in why_unreachable(link.address, fooled, time.time())


def test_a_name_that_is_not_the_servers_is_named(link: Link) -> None:
    host, port = link.address.split(":")
    for name in ("fl.example.org", "10.0.0.1"):
        with socket.create_connection((host, int(port))) as connection:
            said = _shaken(connection, name, link.tls(3))
        assert f"is not for the {'address' if name[0] == '1' else 'name'} {name}: connect by a name that it has" in said


def test_a_port_nobody_listens_on_is_named(link: Link) -> None:
    assert "cannot connect to 127.0.0.1:1: Connection refused" in why_unreachable(
        "127.0.0.1:1", link.tls(3), time.time()
    )
    assert "cannot connect" in why_unreachable("nonsense", link.tls(3), time.time())


def test_a_port_in_use_is_one_line(link: Link) -> None:
    options = LinkOptions(link.address, 1, {})
    second = LinkServer(options, link.tls(0), link.membership, Post(1, Spools()))
    with pytest.raises(UsageError, match="cannot listen on"):
        second.__enter__()


def founded(folder: Path) -> tuple[Root, Roster]:
    """A federation of three in a folder, with the root that made it."""
    root = Root(SigningKey.generate())
    roster, states = Roster(root.federation, 1, int(time.time()) + 10**6, ()), []
    for index in range(3):
        roster, invitation, key = root.invite(roster, f"device-{index}")
        states.append(DeviceState.enrolled(root.public_key, invitation, key))
    write_linked_federation(Federation(root, root.sign_roster(roster), tuple(states)), folder)
    return root, roster


def test_a_revoked_device_is_put_out_at_once_and_stays_out(tmp_path: Path) -> None:
    root, roster = founded(tmp_path)
    with link_of(tmp_path, 3) as link:
        replace_roster(tmp_path / "server", root.sign_roster(roster.revoking(1)))
        with pytest.raises(RefusedByServerError, match="is revoked"):
            link.devices.futures[1].result(10)
        assert len(link.exchange()) == 2
        stubborn = Raw(link, link.tls(1))
        require_refused(stubborn.hello(link.node_id(1)), Reason.IDENTITY, "revoked")
        stubborn.close()


def test_nobody_waits_for_the_answer_of_a_device_that_was_revoked(tmp_path: Path) -> None:
    root, roster = founded(tmp_path)
    app, begun = ClientApp(), threading.Event()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        begun.set()
        time.sleep(20)
        return Message(message.content, reply_to=message)

    with Link(tmp_path, 3) as link:
        link.start(0, 2)
        link.start(1, app=app)

        def revoke() -> None:
            assert begun.wait(10)
            replace_roster(tmp_path / "server", root.sign_roster(roster.revoking(1)))

        threading.Thread(target=revoke).start()
        began = time.monotonic()
        replies = link.exchange(timeout=15)
        assert time.monotonic() - began < 10
        assert [reply.metadata.src_node_id for reply in replies if reply.has_error()] == [link.node_id(1)]
        assert len(replies) == 3
        assert len(link.exchange()) == 2


def test_frames_of_the_welcome_are_checked_by_the_device() -> None:
    with pytest.raises(Exception, match="Welcome"):
        decode_frame(encode_frame(Welcome(b"p" * 16, 0, 10, 5, b"", ())))


def test_a_revocation_holds_although_enrolment_saw_the_new_roster_first(tmp_path: Path) -> None:
    """Whoever looks at the roster in between must not keep the streams from being looked at."""
    root, roster = founded(tmp_path)
    with link_of(tmp_path, 3) as link:
        replace_roster(tmp_path / "server", root.sign_roster(roster.revoking(1)))
        assert link.membership.refresh()
        with pytest.raises(RefusedByServerError, match="is revoked"):
            link.devices.futures[1].result(10)


def test_a_compressed_frame_is_refused_before_it_is_inflated(link: Link) -> None:
    tls = link.tls(3)
    credentials = grpc.ssl_channel_credentials(tls.authority, tls.private_key, tls.certificate)
    with grpc.secure_channel(link.address, credentials) as channel:
        frames = iter([encode_frame(Chunk(b"\0" * 2**19))])
        call = channel.stream_stream(METHOD_PATH)(frames, timeout=20, compression=grpc.Compression.Gzip)
        with pytest.raises(grpc.RpcError):
            next(call)
        assert call.code() is grpc.StatusCode.UNIMPLEMENTED


def test_a_device_that_connects_again_and_again_is_put_off(
    link: Link, raw: Callable[..., Raw], caplog: pytest.LogCaptureFixture
) -> None:
    device = raw(link.tls(4))
    said = [raw(link.tls(4)).hello(link.node_id(4)) for _ in range(21)]
    assert isinstance(said[0], Welcome)
    caplog.clear()
    require_refused(device.hello(link.node_id(4)), Reason.UNSURE, "connections in")
    assert "connections in" not in caplog.text


def test_health_is_told_to_members_and_not_watched(link: Link) -> None:
    tls = link.tls(3)
    credentials = grpc.ssl_channel_credentials(tls.authority, tls.private_key, tls.certificate)
    with grpc.secure_channel(link.address, credentials) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service=SERVICE)
        assert stub.Check(request, timeout=10).status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as caught:
            next(stub.Watch(request, timeout=10))
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_where_the_roster_has_ended_devices_wait_for_the_next_one(tmp_path: Path) -> None:
    root, roster = founded(tmp_path)
    with link_of(tmp_path, 3) as link:
        ended = replace(roster, number=roster.number + 1, not_after=int(time.time()) - 1)
        replace_roster(tmp_path / "server", root.sign_roster(ended))
        link.wait_until(lambda: not link.grid.get_node_ids())
        newer = replace(roster, number=roster.number + 2)
        replace_roster(tmp_path / "server", root.sign_roster(newer))
        link.wait_until(lambda: len(link.grid.get_node_ids()) == 3)


def test_a_link_that_dies_ends_the_run_and_not_its_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with link_of(tmp_path, 3) as link:
        ids = link.grid.push_messages(link.messages())
        assert ids
        monkeypatch.setattr(link.membership, "refresh", lambda: 1 / 0)
        began = time.monotonic()
        with pytest.raises(PropolisError, match="the link has failed: division by zero"):
            link.wait_until(lambda: bool(link.exchange() and False))
        assert time.monotonic() - began < 20
        with pytest.raises(PropolisError, match="the link has failed"):
            link.grid.get_node_ids()


def test_a_configuration_that_devices_would_refuse_is_our_own_mistake(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="devices would refuse"):
        Link(tmp_path, 1, run_config={"x": "y" * 2**17}).start_server()
