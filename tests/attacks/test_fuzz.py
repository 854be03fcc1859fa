"""Whatever bytes come, only our errors come out, nothing is changed by what is refused, and memory stays bounded."""

from __future__ import annotations

import re
import resource
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Any

import pytest
from attacks.fuzzing import CASES, Mutator, fields_of, fuzz, varint
from attacks.insiders import Founded, found
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from google.protobuf.message import Message
from protocol import SHARED_INPUT, Cohort, Round, server_from

from propolis.protos import identity_pb2, secagg_pb2
from propolis.secure import labels
from propolis.secure.errors import PropolisError, RefusedError
from propolis.secure.identity import Descriptor, Invitation, Prekey, Roster, Signed, SigningKey, prekey_context
from propolis.secure.secagg.client import SecAggClient
from propolis.secure.secagg.device import Device
from propolis.secure.secagg.device_state import DeviceState
from propolis.secure.secagg.messages import (
    _KIND_OF,
    ConfirmReply,
    Head,
    HelloReply,
    HelloRequest,
    PrepareReply,
    PrepareRequest,
    UnmaskReply,
    UploadReply,
    UploadRequest,
    from_bytes,
    to_bytes,
)
from propolis.secure.secagg.plan import Plan, Terms
from propolis.secure.secagg.preparation import head_context
from propolis.secure.secagg.server import SecAggServer
from propolis.secure.wire import decode, encode

DEVICES = 5
CHALLENGE = bytes(32)
MEGABYTE = 2**20
MOST_MEMORY = 64 * MEGABYTE
# How often it is looked whether a refusal changed anything.
LOOK_EVERY = 8


@dataclass
class Recording:
    """One honest round, in which everything that travels and everything that is stored is kept."""

    founded: Founded
    attempt: Round
    messages: dict[str, list[bytes]] = field(default_factory=dict)
    device: dict[str, bytes] = field(default_factory=dict)  # state of device 0 before each exchange
    server: dict[str, bytes] = field(default_factory=dict)

    @property
    def cohort(self) -> Cohort:
        return self.attempt.cohort

    def keep(self, step: str, _: int, data: bytes) -> bytes:
        self.messages.setdefault(step.replace(" ", "_"), []).append(data)
        return data

    def snapshot(self, step: str) -> None:
        self.device[step] = self.cohort.federation.devices[0].to_bytes()
        self.server[step] = self.attempt.server.to_bytes()

    def restored_server(self, step: str) -> SecAggServer:
        return server_from(self.server[step], self.cohort.roster)


@cache
def recorded() -> Recording:
    founded = found(DEVICES)
    recording = Recording(founded, founded.cohort().round(malicious=True))
    cohort, attempt = recording.cohort, recording.attempt
    attempt.meddle = recording.keep
    recording.messages["hello_request"] = [to_bytes(HelloRequest(cohort.signed_roster, CHALLENGE))]
    keys = [attempt.server._members[index].keys for index in range(DEVICES)]
    recording.messages["hello_reply"] = [to_bytes(HelloReply(each.descriptor, each.prekey, bytes(64))) for each in keys]
    recording.snapshot("prepare")
    attempt.prepare()
    recording.snapshot("upload")
    attempt.upload(silent=(3,))
    attempt.server.close_uploads()
    recording.snapshot("confirm")
    attempt.confirm()
    recording.snapshot("unmask")
    attempt.unmask()
    assert not attempt.refused
    attempt.sum()
    recording.snapshot("end")
    return recording


def snake(cls: type) -> str:
    """The name of a message's type as its recordings are called."""
    return re.sub("(?<=[a-z])(?=[A-Z])", "_", cls.__name__).lower()


def corpus_of(cls: type) -> list[bytes]:
    """Valid bytes of a type."""
    recording = recorded()
    if cls in _KIND_OF:
        return recording.messages[snake(cls)]
    keys = [from_bytes(HelloReply, data) for data in recording.messages["hello_reply"]]
    root, roster = recording.founded.root, recording.founded.roster
    payloads: dict[type, list[bytes]] = {
        Invitation: [root.invite(roster, "new")[1].payload],
        Descriptor: [each.descriptor.payload for each in keys],
        Prekey: [each.prekey.payload for each in keys],
        Roster: [root.sign_roster(roster).payload],
        Plan: [recording.attempt.terms.bytes, recording.cohort.plan(number=2**31, width=32).to_bytes()],
        Head: [from_bytes(PrepareReply, data).head.payload for data in recording.messages["prepare_reply"]],
        DeviceState: list(recording.device.values()),
        SecAggClient: [DeviceState.from_bytes(d).round for name, d in recording.device.items() if name != "prepare"],
        SecAggServer: list(recording.server.values()),
    }
    return payloads[cls]


SIGNED: dict[type, type[Message]] = {
    Invitation: identity_pb2.Invitation,
    Descriptor: identity_pb2.Descriptor,
    Prekey: identity_pb2.Prekey,
    Roster: identity_pb2.Roster,
    Plan: secagg_pb2.Plan,
    Head: secagg_pb2.Head,
}
WIRE = (*_KIND_OF, *SIGNED)


def parser(cls: type) -> Callable[[bytes], object]:
    if cls in _KIND_OF:
        return lambda data: from_bytes(cls, data)
    return lambda data: decode(cls, data, SIGNED[cls])


# Parsing.


@pytest.mark.parametrize("cls", WIRE, ids=lambda cls: cls.__name__)
def test_bytes_of_a_peer_are_a_message_or_refused(cls: type) -> None:
    parse = parser(cls)
    assert all(parse(data) for data in corpus_of(cls))
    assert fuzz(cls.__name__, corpus_of(cls), parse, RefusedError) < CASES


@pytest.mark.parametrize("cls", _KIND_OF, ids=lambda cls: cls.__name__)
def test_a_message_is_no_other_message(cls: type) -> None:
    for other in _KIND_OF:
        if other is not cls:
            with pytest.raises(RefusedError, match="expected a"):
                from_bytes(cls, corpus_of(other)[0])


@pytest.mark.parametrize("cls", WIRE, ids=lambda cls: cls.__name__)
def test_a_field_beyond_its_bounds_is_refused(cls: type) -> None:
    parse = parser(cls)
    valid: Any = parse(corpus_of(cls)[0])
    for name, value in beyond_bounds(valid):
        with pytest.raises(RefusedError, match=f"{name}: expected"):
            parse(written(replace(valid, **{name: value})))


def beyond_bounds(message: Any) -> Iterator[tuple[str, object]]:
    """Each field with values just below and just above what it may hold."""
    for each in fields(message):
        value, bound = getattr(message, each.name), each.metadata.get("bound")
        if bound is None or isinstance(value, tuple):
            continue
        wrong = (max(bound.least - 1, 0), bound.most + 1) if bound.most < 2**22 else (max(bound.least - 1, 0),)
        for size in wrong:
            if not bound.least <= size <= bound.most:
                yield each.name, sized_like(value, size)


def sized_like(value: object, size: int) -> object:
    return bytes(size) if isinstance(value, bytes) else "x" * size if isinstance(value, str) else size


def written(message: object) -> bytes:
    cls = type(message)
    return to_bytes(message) if cls in _KIND_OF else encode(message, SIGNED[cls])


def test_a_plan_can_be_carried_out_or_is_refused() -> None:
    assert fuzz("Terms", corpus_of(Plan), lambda data: Terms(data).require_feasible(), RefusedError) < CASES


STATES: dict[type, Callable[[bytes], object]] = {
    DeviceState: DeviceState.from_bytes,
    SecAggClient: lambda data: SecAggClient.from_bytes(data, bytes(32)),
    SecAggServer: lambda data: server_from(data, recorded().cohort.roster),
}


# To be said by `from_bytes`: see the reasons.
@pytest.mark.parametrize("cls", STATES, ids=lambda cls: cls.__name__)
def test_a_damaged_state_is_a_state_or_said_to_be_damaged(cls: type) -> None:
    assert all(STATES[cls](data) for data in corpus_of(cls))
    assert fuzz(f"{cls.__name__} state", corpus_of(cls), STATES[cls], PropolisError) < CASES


# Roles. Bytes that do not parse are refused before anything else, as above, so only the others go further.


@dataclass
class AtDevice:
    """Device 0 before an exchange, and again so after each case that it accepts."""

    exchange: str
    step: str

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        cohort = recorded().cohort
        self.device = Device(DeviceState.from_bytes(recorded().device[self.step]), cohort.policy, cohort.now)

    def give(self, data: bytes) -> None:
        extra = (SHARED_INPUT,) if self.exchange == "begin_upload" else ()
        getattr(self.device, self.exchange)(data, *extra)

    def stored(self) -> bytes:
        return self.device.state.to_bytes()


@dataclass
class AtServer:
    """The server before device 0 answers."""

    exchange: str
    step: str

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.server = recorded().restored_server(self.step)
        if self.step == "upload":
            self.server.upload_request(0)

    def give(self, data: bytes) -> None:
        getattr(self.server, self.exchange)(0, from_bytes(REPLIES[self.exchange], data))

    def stored(self) -> bytes:
        return self.server.to_bytes()


Role = AtDevice | AtServer
REQUESTS = {
    "hello": "prepare",
    "prepare": "prepare",
    "begin_upload": "upload",
    "confirm": "confirm",
    "unmask": "unmask",
}
REPLIES: dict[str, type] = {
    "receive_prepare": PrepareReply,
    "receive_upload": UploadReply,
    "receive_confirm": ConfirmReply,
    "receive_unmask": UnmaskReply,
}


def into(role: Role, name: str, corpus: Sequence[bytes], made: Callable[[bytes], bytes] = lambda case: case) -> int:
    """Fuzz a role: what it refuses may change nothing; what it accepts is undone."""
    pristine, given = role.stored(), 0

    def take(case: bytes) -> None:
        nonlocal given
        data, given = made(case), given + 1
        try:
            role.give(data)
        except RefusedError:
            if given % LOOK_EVERY == 0:
                assert role.stored() == pristine, "a refusal changed something"
            raise
        role.reset()

    role.give(made(corpus[0]))
    role.reset()
    taken = fuzz(name, corpus, take, RefusedError, role.stored)
    assert role.stored() == pristine
    return taken


def addressed_to_0(messages: list[bytes]) -> list[bytes]:
    """Each exchange goes through the devices in rising order."""
    return messages[:1]


@pytest.mark.parametrize("exchange", REQUESTS)
def test_a_device_answers_or_refuses(exchange: str) -> None:
    name = f"{exchange.removeprefix('begin_')}_request"
    role = AtDevice(exchange, REQUESTS[exchange])
    assert into(role, f"Device.{exchange}", addressed_to_0(recorded().messages[name])) < CASES


@pytest.mark.parametrize("exchange", REPLIES)
def test_the_server_takes_a_reply_or_refuses_it(exchange: str) -> None:
    step = exchange.removeprefix("receive_")
    into(at_server(exchange), f"SecAggServer.{exchange}", addressed_to_0(recorded().messages[f"{step}_reply"]))


def at_server(exchange: str) -> AtServer:
    return AtServer(exchange, exchange.removeprefix("receive_"))


# Members: payloads are changed first and signed then, with the key that the others expect.


def signed(label: bytes, private: bytes, payload: bytes, *context: bytes) -> Signed:
    key = Ed25519PrivateKey.from_private_bytes(private)
    return Signed(payload, key.sign(labels.joined(label, *context, payload)))


def first(cls: type, step: str) -> Any:
    return from_bytes(cls, recorded().messages[step][0])


def hello_with_roster(payload: bytes) -> bytes:
    return to_bytes(HelloRequest(signed(labels.ROSTER, recorded().founded.root.key.private, payload), CHALLENGE))


def prepare_with_descriptor(payload: bytes) -> bytes:
    request: PrepareRequest = first(PrepareRequest, "prepare_request")
    forged = signed(labels.DESCRIPTOR, recorded().founded.invitations[1].private, payload)
    return to_bytes(replace(request, descriptors=(forged, *request.descriptors[1:])))


def prepare_with_prekey(payload: bytes) -> bytes:
    request: PrepareRequest = first(PrepareRequest, "prepare_request")
    context = prekey_context(recorded().founded.root.federation, 1)
    forged = signed(labels.PREKEY, private_of(1), payload, *context)
    return to_bytes(replace(request, prekeys=(forged, *request.prekeys[1:])))


def prepare_with_plan(payload: bytes) -> bytes:
    return to_bytes(replace(first(PrepareRequest, "prepare_request"), plan=payload or b"\0"))


def upload_with_head(payload: bytes) -> bytes:
    request: UploadRequest = first(UploadRequest, "upload_request")
    forged = signed(labels.HEAD, private_of(1), payload, *head_context(1, recorded().attempt.terms.digest))
    return to_bytes(replace(request, heads=(forged, *request.heads[1:])))


def preparation_with_head(payload: bytes) -> bytes:
    reply: PrepareReply = first(PrepareReply, "prepare_reply")
    context = head_context(0, recorded().attempt.terms.digest)
    return to_bytes(replace(reply, head=signed(labels.HEAD, private_of(0), payload, *context)))


def private_of(index: int) -> bytes:
    return recorded().cohort.federation.devices[index].signing_key.private


MEMBERS: dict[str, tuple[type, int, Callable[[], Role], Callable[[bytes], bytes]]] = {
    "roster": (Roster, 0, lambda: AtDevice("hello", "prepare"), hello_with_roster),
    "plan": (Plan, 0, lambda: AtDevice("prepare", "prepare"), prepare_with_plan),
    "descriptor": (Descriptor, 1, lambda: AtDevice("prepare", "prepare"), prepare_with_descriptor),
    "prekey": (Prekey, 1, lambda: AtDevice("prepare", "prepare"), prepare_with_prekey),
    "head": (Head, 1, lambda: AtDevice("begin_upload", "upload"), upload_with_head),
    "head to the server": (Head, 0, lambda: at_server("receive_prepare"), preparation_with_head),
}


@pytest.mark.parametrize("name", MEMBERS)
def test_what_a_member_signs_is_taken_or_refused(name: str) -> None:
    cls, owner, role, made = MEMBERS[name]
    assert into(role(), f"signed {name}", [corpus_of(cls)[owner]], made) < CASES


def test_an_invitation_that_the_root_signed_is_accepted_or_refused() -> None:
    founded, (payload,) = recorded().founded, corpus_of(Invitation)

    def take(case: bytes) -> None:
        invitation = signed(labels.INVITATION, founded.root.key.private, case)
        DeviceState.enrolled(founded.root.public_key, invitation, SigningKey(bytes(32)))

    fuzz("signed invitation", [payload], take, PropolisError)


# Memory.


@pytest.mark.parametrize("cls", [*WIRE, *STATES], ids=lambda cls: cls.__name__)
def test_no_small_message_takes_much_memory(cls: type) -> None:
    take, corpus = STATES.get(cls) or parser(cls), corpus_of(cls)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    try:
        for case in Mutator(f"memory {cls.__name__}", corpus).cases(100):
            with suppress(Exception):  # which ones may come out is tested above
                take(case)
        assert tracemalloc.get_traced_memory()[1] < MOST_MEMORY
    finally:
        tracemalloc.stop()
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MOST_MEMORY


def test_what_is_refused_does_not_stay_in_memory() -> None:
    device, forged = AtDevice("hello", "prepare"), range(16)
    tracemalloc.start()
    try:
        for number in forged:
            roster = Signed(number.to_bytes(1, "big") * MEGABYTE, bytes(64))
            with pytest.raises(RefusedError):
                device.give(to_bytes(HelloRequest(roster, CHALLENGE)))
        assert tracemalloc.get_traced_memory()[0] < 4 * MEGABYTE
    finally:
        tracemalloc.stop()


def test_a_cohort_longer_than_the_roster_is_refused_before_it_is_counted() -> None:
    plan = replace(recorded().cohort.plan(malicious=True), cohort=b"\xff" * MEGABYTE)
    request = to_bytes(replace(first(PrepareRequest, "prepare_request"), plan=plan.to_bytes()))
    device = AtDevice("prepare", "prepare")
    tracemalloc.start()
    try:
        with pytest.raises(RefusedError):
            device.give(request)
        assert tracemalloc.get_traced_memory()[1] < 16 * MEGABYTE
    finally:
        tracemalloc.stop()


# The mutator itself.


def test_the_cases_are_the_same_for_one_seed() -> None:
    corpus = corpus_of(PrepareRequest)
    once, again, other = (list(Mutator(seed, corpus).cases(200)) for seed in (1, 1, 2))
    assert once == again != other


@pytest.mark.parametrize("value", [0, 1, 127, 128, 300, 2**32, 2**64 - 1])
def test_a_mutator_knows_the_framing(value: int) -> None:
    data = identity_pb2.Prekey(number=value, public_key=b"k" * 200).SerializeToString()
    fields = fields_of(data)
    assert data[fields[-1].content : fields[-1].end] == b"k" * 200
    assert varint(value)[-1] < 128


def test_most_cases_get_past_the_framing() -> None:
    cases = list(Mutator(0, corpus_of(PrepareRequest)).cases(1000))
    parsed = 0
    for case in cases:
        with suppress(Exception):
            secagg_pb2.Wire.FromString(case)
            parsed += 1
    assert parsed > len(cases) / 2


@pytest.mark.parametrize("cls", _KIND_OF, ids=lambda cls: cls.__name__)
def test_nothing_is_parsed_but_what_is_expected(cls: type) -> None:
    """Megabytes of empty entries would become gigabytes of objects."""
    empties = b"\x1a\x00" * 2**20
    other = next(kind for kind in range(1, 11) if kind != _KIND_OF[cls][0])
    data = secagg_pb2.Wire(version=1, suite=1, kind=other, body=empties).SerializeToString()
    with pytest.raises(RefusedError, match="expected a"):
        from_bytes(cls, data)
