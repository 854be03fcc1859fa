"""The two ends of a device's stream against each other, without a stream: cuts, crashes, cancellations, lies."""

from __future__ import annotations

import random

import pytest
from flwr.app import Message, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from propolis.client.jobs import Jobs
from propolis.flower import join_message, set_identity
from propolis.link import transfers
from propolis.link.frames import Beat, Begin, Cancel, Chunk, Frame, Free, Hello, Received, Welcome
from propolis.link.spool import Spools
from propolis.link.transfers import Body
from propolis.secure.errors import PeerError, StorageError
from propolis.server.courier import Courier, Request

NODE = 77
SERVER = b"s" * 16


def request(number: int, size: int = 300, expires: float = 1e9) -> Request:
    set_identity(5)
    message = Message(RecordDict(), NODE, "train")
    return Request(number.to_bytes(16, "big"), message, Body(b"request", [bytes([number]) * size]), expires)


class Pair:
    """A courier, a device, and the stream between them."""

    def __init__(self, limit: int = 10**6) -> None:
        self.courier = Courier(limit, Spools())
        self.ended: list[Request] = []
        self.worked_on: list[bytes] = []
        self.new_process()
        self.connect()

    def new_process(self, name: bytes = b"p") -> None:
        self.jobs = Jobs(name * 16, NODE, 10**6, Spools())

    def connect(self, server: bytes = SERVER) -> None:
        have = self.courier.connected(self.jobs.hello(0.0, 1), server)
        self.jobs.welcomed(Welcome(server, 10, 10**6, 5, b"{}", have))

    def down(self) -> bool:
        """One frame to the device; False when there is none."""
        if (frame := self.courier.next_frame()) is not None:
            self.jobs.receive(frame)
        return frame is not None

    def up(self) -> bool:
        """One frame to the server; False when there is none."""
        frame = self.jobs.next_frame()
        if frame is not None and (ended := self.courier.receive(frame)) is not None:
            self.ended.append(ended)
        return frame is not None

    def work(self) -> bool:
        """The app answers one request; False when there is none."""
        if (job := self.jobs.next_job()) is None:
            return False
        job.request.header()
        (part,) = job.request.parts()
        self.worked_on.append(job.id)
        self.jobs.finished(job, Body(b"reply", [part[::-1], job.id]))
        return True

    def settle(self) -> None:
        while any([self.down(), self.work(), self.up()]):
            pass


def content(ended: Request) -> tuple[bytes, ...]:
    assert ended.reply is not None
    assert ended.reply.header() == b"reply"
    return tuple(ended.reply.parts())


@settings(deadline=None, max_examples=150)
@given(seed=st.integers(0, 2**32), requests=st.integers(1, 5), chunk=st.integers(7, 400))
def test_every_request_is_answered_once_whatever_is_cut_or_crashes(seed: int, requests: int, chunk: int) -> None:
    rng = random.Random(seed)
    original, transfers.CHUNK_BYTES = transfers.CHUNK_BYTES, chunk
    try:
        pair = Pair()
        sent = [request(number) for number in range(1, requests + 1)]
        for each in sent:
            pair.courier.submit(each)
        for step in range(60):
            rng.choice([pair.down, pair.up, pair.work])()
            if rng.random() < 0.1:  # the connection is gone, and what was on it
                pair.courier.next_frame()
                pair.jobs.next_frame()
                pair.connect()
            if rng.random() < 0.03:
                pair.new_process(bytes([step]))
                pair.connect()
        pair.settle()
    finally:
        transfers.CHUNK_BYTES = original
    assert sorted(ended.id for ended in pair.ended) == [each.id for each in sent]
    for ended in pair.ended:
        assert content(ended) == (bytes([ended.id[-1]]) * 300, ended.id)
    assert pair.courier.is_free


def test_a_request_is_not_worked_on_twice_by_one_process() -> None:
    pair = Pair()
    pair.courier.submit(request(1))
    while pair.down():
        pair.connect()  # cut after every frame
    pair.work()
    while not pair.ended:
        pair.connect()
        pair.up()
    assert pair.worked_on == [request(1).id]


def test_another_server_process_knows_nothing_of_the_first_ones_requests() -> None:
    pair = Pair()
    pair.courier.submit(request(1))
    while pair.down():
        pass
    pair.work()  # answered, not yet sent
    pair.courier = Courier(10**6, Spools())
    pair.connect(b"t" * 16)
    pair.courier.submit(request(2))
    pair.settle()
    assert [ended.id for ended in pair.ended] == [request(2).id]


def test_a_device_that_works_on_what_nobody_waits_for_is_busy_until_it_says_otherwise() -> None:
    pair = Pair()
    asked = request(1)
    pair.courier.submit(asked)
    while pair.down():
        pass
    job = pair.jobs.next_job()
    assert job is not None
    pair.courier.cancel(asked)
    assert not pair.courier.is_free
    pair.settle()
    assert not pair.courier.is_free
    pair.connect()  # a cut does not make it free
    pair.settle()
    assert not pair.courier.is_free
    pair.jobs.finished(job, Body(b"reply", []))
    pair.settle()
    assert pair.courier.is_free
    assert pair.ended == []


def test_a_new_process_of_a_busy_device_is_free() -> None:
    pair = Pair()
    asked = request(1)
    pair.courier.submit(asked)
    pair.down()
    pair.courier.cancel(asked)
    pair.new_process(b"q")
    pair.connect()
    assert pair.courier.is_free


def test_a_request_that_was_never_sent_costs_nothing_when_it_is_cancelled() -> None:
    pair = Pair()
    asked = request(1)
    pair.courier.submit(asked)
    pair.courier.cancel(asked)
    assert pair.courier.is_free
    pair.settle()
    assert pair.worked_on == []


def test_a_reply_that_comes_after_its_time_is_read_and_dropped() -> None:
    pair = Pair()
    asked = request(1)
    pair.courier.submit(asked)
    while pair.down():
        pass
    pair.work()
    begin = pair.jobs.next_frame()
    assert isinstance(begin, Begin)
    pair.courier.cancel(asked)
    assert pair.courier.receive(begin) is None
    assert pair.courier.receive(Chunk(b"late")) is None
    pair.settle()
    assert pair.ended == []
    assert pair.courier.is_free


def test_a_reply_over_the_limit_fails_its_request_and_nothing_else() -> None:
    pair = Pair(limit=100)
    large, small = request(1, 300), request(2, 10)
    pair.courier.submit(large)
    pair.courier.submit(small)
    pair.settle()
    assert [ended.id for ended in pair.ended] == [large.id, small.id]
    assert large.failure is not None
    assert "at most 100" in large.failure
    assert content(small) == (bytes([2]) * 10, small.id)


class FullDisk(Spools):
    def open(self, size: int) -> transfers.Spool:
        raise StorageError("cannot spool a message of 321 bytes: No space left on device")


def test_a_full_disk_fails_the_request_and_not_the_stream() -> None:
    pair = Pair()
    pair.courier = Courier(10**6, FullDisk())
    pair.connect()
    asked = request(1)
    pair.courier.submit(asked)
    pair.settle()
    assert asked.failure is not None
    assert "No space left" in asked.failure


def test_what_no_device_sends_is_refused() -> None:
    pair = Pair()
    wrong: list[Frame] = [
        Chunk(b"bytes of nothing"),
        Begin(b"x" * 16, 5, (), 0, b"reply"),  # to a request that was never made
        Received(b"x" * 16),
        Cancel(b"x" * 16),
        Hello(b"p" * 16, NODE, 0, b"", (), 1),
        Welcome(SERVER, 10, 10, 5, b"", ()),
    ]
    for frame in wrong:
        with pytest.raises(PeerError):
            pair.courier.receive(frame)
    assert pair.courier.receive(Beat()) is None
    assert pair.courier.receive(Free(b"x" * 16)) is None


def test_a_second_reply_and_bytes_out_of_order_are_refused() -> None:
    pair = Pair()
    asked = request(1)
    pair.courier.submit(asked)
    while pair.down():
        pass
    begin = Begin(asked.id, 5, (4,), 0, b"reply")
    assert pair.courier.receive(begin) is None
    with pytest.raises(PeerError, match="goes on at byte 0"):
        pair.courier.receive(begin)
    with pytest.raises(PeerError, match="goes on at byte 9"):
        pair.courier.receive(Begin(asked.id, 5, (4,), 9, b""))
    pair.connect()
    with pytest.raises(PeerError, match="bytes of no message"):
        pair.courier.receive(Chunk(b"1234"))
    pair.courier.receive(Begin(asked.id, 5, (4,), 5, b""))
    with pytest.raises(PeerError, match="1 bytes more"):
        pair.courier.receive(Chunk(b"12345"))
    pair.courier.receive(Begin(asked.id, 5, (4,), 5, b""))
    assert pair.courier.receive(Chunk(b"1234")) is asked
    with pytest.raises(PeerError, match="not waiting"):
        pair.courier.receive(begin)


def test_what_no_server_sends_is_refused_by_the_device() -> None:
    jobs = Jobs(b"p" * 16, NODE, 100, Spools())
    for frame in (Chunk(b"x"), Received(b"x" * 16), Hello(b"p" * 16, NODE, 0, b"", (), 1), Free(b"x" * 16)):
        with pytest.raises(PeerError):
            jobs.receive(frame)
    for number in range(64):
        jobs.receive(Begin(number.to_bytes(16, "big"), 1, (), 0, b"x"))
    with pytest.raises(PeerError, match="64 requests at once"):
        jobs.receive(Begin(b"x" * 16, 1, (), 0, b"x"))


def error_of(ended: Request) -> str:
    assert ended.reply is not None
    return join_message(ended.reply.header(), (), ended.message).error.reason


def test_a_request_over_the_devices_limit_is_answered_with_an_error_and_the_stream_goes_on() -> None:
    pair = Pair()
    pair.jobs = Jobs(b"p" * 16, NODE, 200, Spools())
    pair.connect()
    large, small = request(1, 300), request(2, 10)
    pair.courier.submit(large)
    pair.courier.submit(small)
    pair.settle()
    assert [ended.id for ended in pair.ended] == [large.id, small.id]
    assert "the device takes 200" in error_of(large)
    assert content(small) == (bytes([2]) * 10, small.id)


def test_requests_take_no_more_of_the_device_than_one_of_the_largest() -> None:
    pair = Pair()
    pair.jobs = Jobs(b"p" * 16, NODE, 500, Spools())
    pair.connect()
    first, second = request(1, 300), request(2, 300)
    pair.courier.submit(first)
    pair.courier.submit(second)
    while pair.down():  # nobody works on the first one yet
        pass
    pair.settle()
    assert "are in use" in error_of(second)
    assert content(first) == (bytes([1]) * 300, first.id)


@pytest.mark.parametrize("cut", [False, True])
def test_a_full_disk_of_a_device_is_an_error_reply_whatever_is_cut(cut: bool) -> None:
    pair = Pair()
    pair.jobs = Jobs(b"p" * 16, NODE, 10**6, FullDisk())
    pair.connect()
    asked = request(1)
    pair.courier.submit(asked)
    pair.down()
    if cut:
        pair.connect()
    pair.settle()
    assert "no room for the request" in error_of(asked)
    assert pair.courier.is_free


def test_a_job_that_ends_between_hello_and_welcome_leaves_the_device_free() -> None:
    pair = Pair()
    asked = request(1)
    pair.courier.submit(asked)
    while pair.down():
        pass
    job = pair.jobs.next_job()
    assert job is not None
    pair.courier.cancel(asked)
    pair.settle()
    hello = pair.jobs.hello(0.0, 1)
    pair.jobs.finished(job, Body(b"reply", []))
    have = pair.courier.connected(hello, SERVER)
    pair.jobs.welcomed(Welcome(SERVER, 10, 10**6, 5, b"{}", have))
    pair.settle()
    assert pair.courier.is_free


def test_a_late_reply_is_dropped_once_and_not_again_and_again() -> None:
    pair = Pair()
    asked = request(1)
    pair.courier.submit(asked)
    pair.down()
    pair.courier.cancel(asked)
    late = Begin(asked.id, 5, (4,), 0, b"reply")
    assert pair.courier.receive(late) is None
    with pytest.raises(PeerError, match="not waiting"):
        pair.courier.receive(late)
