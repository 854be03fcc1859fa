"""The streams of the devices that are connected: who is let in, what is read and written, why a stream ends."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import grpc

from propolis.link.certificates import DeviceName
from propolis.link.clock import clock_fault
from propolis.link.frames import (
    Beat,
    Farewell,
    Frame,
    Hello,
    News,
    Progress,
    Reason,
    Welcome,
    decode_frame,
    encode_frame,
    farewell,
)
from propolis.secure.errors import PeerError, Refusal, RefusedError, TrustError, UsageError
from propolis.secure.wire import FORMAT_VERSION
from propolis.server.membership import Membership
from propolis.server.patience import Patience
from propolis.server.post import Post

_HELLO_S, FAREWELL_S = 10.0, 2.0
_MISSED_BEATS = 3
# An honest device waits longer and longer between attempts.
_MOST_HELLOS, _HELLOS_IN_S = 20, 10.0
# A roster ends without changing; so now and then everybody is looked at.
_CHECK_S = 10.0
# For each device that is told of news, which then asks.
_SPREAD_MS, _LONGEST_SPREAD_MS = 5, 60_000
_log = logging.getLogger("propolis.link")


class _Stream:
    """One device's connection."""

    def __init__(self, name: DeviceName, hello: Hello) -> None:
        self.name, self.hello, self.node_id = name, hello, hello.node_id
        self.handler = asyncio.current_task()
        self.waker = asyncio.Event()
        self.farewell: Farewell | None = None
        self.end_by = float("inf")
        self.heard = self.sent = time.monotonic()
        self.owes: Frame | None = None

    def end(self, frame: Farewell) -> None:
        """Say why, and close; a device that does not read is cut off soon."""
        if self.farewell is None:
            self.farewell, self.end_by = frame, time.monotonic() + FAREWELL_S
            self.waker.set()


class Streams:
    """The open streams, by node id.

    Args:
        welcome: what every device is told first.
        membership: who may connect; looked at again at every sweep.
        post: the requests and replies.
    """

    def __init__(self, welcome: Welcome, membership: Membership, post: Post) -> None:
        self._welcome, self._membership, self._post = welcome, membership, post
        self._open: dict[int, _Stream] = {}
        self._every: set[_Stream] = set()  # those too whose device has a newer one
        self._checked = (membership.roster.number, time.monotonic())
        self._patience = Patience(_MOST_HELLOS, _HELLOS_IN_S)

    def wake(self, node_ids: Iterable[int]) -> None:
        """There is something to send to these devices."""
        for node_id in node_ids:
            if (stream := self._open.get(node_id)) is not None:
                stream.waker.set()

    def tell_news(self) -> None:
        """There is something new to ask for; devices do so over a time that grows with their number."""
        news = News(min(_LONGEST_SPREAD_MS, _SPREAD_MS * len(self._open)))
        for stream in self._open.values():
            stream.owes = news
            stream.waker.set()

    async def end_all(self, frame: Farewell) -> None:
        """End every stream, and wait until they have."""
        deadline = time.monotonic() + 2 * FAREWELL_S
        while self._every and time.monotonic() < deadline:
            for stream in self._every:  # those too that begin meanwhile
                stream.end(frame)
            await asyncio.sleep(0.02)

    async def connect(self, _: Any, context: Any) -> None:
        """A device's stream from its first frame to its last."""
        if (stream := await _introduced(context, self._admitted)) is None:
            return
        tasks = []
        try:
            have = self._register(stream)
            await context.write(encode_frame(replace(self._welcome, have=have)))
            converse = (self._read(stream, context), self._write(stream, context))
            tasks = [asyncio.create_task(each) for each in converse]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if stream.farewell is not None:
                await asyncio.wait(tasks[1:], timeout=FAREWELL_S)
        finally:
            for task in tasks:
                task.cancel()
            self._forget(stream)

    def _register(self, stream: _Stream) -> tuple[Progress, ...]:
        """The newer stream of a device wins; an older process is told, an older stream of the same one just ends."""
        if (older := self._open.get(stream.node_id)) is None:
            pass
        elif older.hello.process == stream.hello.process:
            older.end(farewell(Reason.UNSPECIFIED, "this process has connected again"))
        else:
            _log.warning("a device runs twice; the newer process takes over", extra={"index": older.name.index})
            older.end(farewell(Reason.REPLACED, "another process with this device's certificate has connected"))
        self._open[stream.node_id] = stream
        self._every.add(stream)
        _log.info("device connected", extra={"index": stream.name.index, "node_id": stream.node_id})
        return self._post.connected(stream.node_id, stream.hello)

    def _admitted(self, name: DeviceName, hello: Frame) -> _Stream:
        """The stream of a device that is who its certificate says, and may be here."""
        if not isinstance(hello, Hello):
            raise PeerError(Refusal.PHASE, f"expected a Hello, got a {type(hello).__name__}")
        if hello.version != FORMAT_VERSION:
            raise _RefusedStreamError(Reason.VERSION, f"version {hello.version} of the link; this is {FORMAT_VERSION}")
        if hello.node_id != name.node_id:
            raise _RefusedStreamError(Reason.IDENTITY, "the node id is not that of the certificate")
        if self._patience.ends(name.index):
            raise _RefusedStreamError(Reason.UNSURE, f"more than {_MOST_HELLOS} connections in {_HELLOS_IN_S:g} s")
        self._membership.require(name)
        if (fault := clock_fault(hello.clock, time.time())) is not None:
            raise _RefusedStreamError(Reason.CLOCK, fault)
        return _Stream(name, hello)

    async def _read(self, stream: _Stream, context: Any) -> None:
        with suppress(asyncio.CancelledError):
            while (data := await context.read()) is not grpc.aio.EOF:
                stream.heard = time.monotonic()
                try:
                    frame = decode_frame(data)
                    if isinstance(frame, Farewell):
                        return
                    if self._open.get(stream.node_id) is stream:
                        self._post.receive(stream.node_id, frame)
                        stream.waker.set()
                except RefusedError as error:
                    _log.warning("refused a frame: %s", error, extra={"index": stream.name.index})
                    stream.end(farewell(Reason.PROTOCOL, str(error)))
                    return

    async def _write(self, stream: _Stream, context: Any) -> None:
        while stream.farewell is None:
            frame, stream.owes = stream.owes, None
            if frame is None and self._open.get(stream.node_id) is stream:
                frame = self._post.next_frame(stream.node_id)
            if frame is None:
                await stream.waker.wait()
                stream.waker.clear()
                continue
            await context.write(encode_frame(frame))
            stream.sent = time.monotonic()
        await context.write(encode_frame(stream.farewell))

    def _forget(self, stream: _Stream) -> None:
        self._every.discard(stream)
        if self._open.get(stream.node_id) is stream:
            del self._open[stream.node_id]
            self._post.disconnected(stream.node_id)
            _log.info("device disconnected", extra={"index": stream.name.index, "node_id": stream.node_id})

    def sweep(self) -> None:
        """Now and then: whose time is over, who is silent, who may not be here any more."""
        now = time.monotonic()
        self.wake(self._post.expire())
        self._membership.refresh()
        number, checked = self._checked
        is_new = number != self._membership.roster.number
        if is_new or now - checked > _CHECK_S:
            self._checked = (self._membership.roster.number, now)
            for stream in list(self._open.values()):
                self._require_still(stream)
        if is_new:
            self.tell_news()
        for stream in list(self._open.values()):
            self._require_heard(stream, now)
        for stream in list(self._every):
            if now > stream.end_by and stream.handler is not None:  # it does not even read its farewell
                stream.handler.cancel()

    def _require_heard(self, stream: _Stream, now: float) -> None:
        if now - stream.heard > _MISSED_BEATS * self._welcome.beat_seconds:
            stream.end(farewell(Reason.SILENT, f"nothing was heard for {now - stream.heard:.0f} s"))
        elif now - stream.sent > self._welcome.beat_seconds:
            stream.owes = stream.owes or Beat()
            stream.waker.set()

    def _require_still(self, stream: _Stream) -> None:
        try:
            self._membership.require(stream.name)
        except UsageError as error:  # of ours: a file cannot be read, for now
            _log.error("cannot look up a device: %s", error)
        except TrustError as error:
            _log.warning("device put out: %s", error, extra={"index": stream.name.index})
            stream.end(farewell(_reason_of(error), str(error)))
            if _reason_of(error) is Reason.IDENTITY:
                self._post.put_out(stream.node_id)


class _RefusedStreamError(Exception):
    """A device is not let in."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.frame = farewell(reason, detail)


async def _introduced(context: Any, admitted: Callable[[DeviceName, Frame], _Stream]) -> _Stream | None:
    """Read a device's Hello; None where the device was refused, and told why."""
    try:
        name = DeviceName.of(context.auth_context()["x509_pem_cert"][0])
        return admitted(name, decode_frame(await asyncio.wait_for(context.read(), _HELLO_S)))
    except _RefusedStreamError as refused:
        await _refuse(context, refused.frame)
    except RefusedError as error:
        await _refuse(context, farewell(_reason_of(error), str(error)))
    except UsageError as error:  # of ours: a file cannot be read
        _log.error("cannot look up a device: %s", error)
        await _refuse(context, farewell(Reason.UNSURE, "the server cannot look up its members at the moment"))
    except (TimeoutError, TypeError, KeyError):  # it said nothing, or its end
        await _refuse(context, farewell(Reason.SILENT, "no Hello"))
    return None


def _reason_of(error: RefusedError) -> Reason:
    """A device that is told IDENTITY does not come back; what may be mended on the server is another reason."""
    if error.refusal is Refusal.ROSTER:
        return Reason.UNSURE
    return Reason.IDENTITY if isinstance(error, TrustError) else Reason.PROTOCOL


async def _refuse(context: Any, frame: Farewell) -> None:
    if frame.reason != Reason.UNSURE:  # or whoever knocks all the time fills the log
        _log.warning("refused a device: %s", frame.detail)
    with suppress(TimeoutError):
        await asyncio.wait_for(context.write(encode_frame(frame)), FAREWELL_S)
