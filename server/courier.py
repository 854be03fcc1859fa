"""What is on its way between the server and one device, over however many streams it takes. No I/O, no clock."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass

from flwr.app import Message

from propolis.link.frames import Beat, Begin, Cancel, Chunk, Frame, Free, Hello, Progress, Received
from propolis.link.spool import Spools
from propolis.link.transfers import Body, Incoming
from propolis.secure.errors import PeerError, Refusal, StorageError

# Ended requests whose late replies are read and dropped; an honest device has few of them.
_ENDED_KEPT = 1024


@dataclass(slots=True, eq=False)
class Request:
    """A message to a device, and its reply as far as it has come.

    Attributes:
        id: 16 bytes.
        message: as Flower knows it.
        body: its bytes; its arrays are shared with the other devices' requests.
        expires: when nobody waits for the reply any more; on the clock of whoever made the request.
        reply: what has arrived of it.
        failure: why no reply will come.
        was_sent: whether the device may know of it.
    """

    id: bytes
    message: Message
    body: Body
    expires: float
    reply: Incoming | None = None
    failure: str | None = None
    was_sent: bool = False

    @property
    def node_id(self) -> int:
        """The device's."""
        return int(self.message.metadata.dst_node_id)

    @property
    def is_answered(self) -> bool:
        """Whether its reply is whole, or will not come."""
        return self.failure is not None or (self.reply is not None and self.reply.is_whole)

    def drop_reply(self) -> None:
        """Forget what has arrived."""
        if self.reply is not None:
            self.reply.close()
            self.reply = None


class Courier:
    """The requests of one device and their way there and back.

    A request lives until its one reply is whole or nobody waits for it; it outlives streams, and it is sent again
    to a new process of the device. So no reply is ever taken twice, and none is lost with a connection.

    Args:
        limit: bytes that a reply may have.
        spools: where replies go as they arrive.
    """

    def __init__(self, limit: int, spools: Spools) -> None:
        self._limit, self._spools = limit, spools
        self._process = b""
        self._requests: dict[bytes, Request] = {}
        self._queue: deque[tuple[Request, int]] = deque()
        self._sending: tuple[Request, Iterator[Begin | Chunk]] | None = None
        self._notes: deque[Frame] = deque()
        self._ended: OrderedDict[bytes, bool] = OrderedDict()  # id: whether its reply was taken
        self._working: set[bytes] = set()
        self._arriving: Request | None = None
        self._dropping = False

    @property
    def is_free(self) -> bool:
        """Whether the device works on nothing that nobody waits for any more."""
        return not self._working

    def connected(self, hello: Hello, server: bytes) -> tuple[Progress, ...]:
        """A stream begins.

        Args:
            hello: the device's first frame.
            server: the process that `self` lives in.

        Returns:
            What the device has to know of the replies it may be sending.
        """
        has = {progress.id: progress for progress in hello.have} if hello.server == server else {}
        if hello.process != self._process:
            self._process = hello.process
            for request in self._requests.values():
                request.drop_reply()
        self._working &= has.keys()
        self._notes.clear()
        self._queue.clear()
        self._sending = self._arriving = None
        self._dropping = False
        for request in self._requests.values():
            known = has.get(request.id)
            if known is None or not known.whole:
                self._queue.append((request, known.size if known and known.size <= request.body.total else 0))
        unwanted = (Progress(message_id, 0, True) for message_id in has if message_id not in self._requests)
        coming = (r.reply.progress for r in self._requests.values() if r.reply is not None)
        return (*unwanted, *coming)

    def submit(self, request: Request) -> None:
        """Send a request, now or when the device is there."""
        self._requests[request.id] = request
        self._queue.append((request, 0))

    def cancel(self, request: Request) -> None:
        """Nobody waits for the reply any more; a device that works on it is busy until it says that it is not."""
        self._requests.pop(request.id, None)
        self._end(request.id, taken=False)
        self._queue = deque(entry for entry in self._queue if entry[0] is not request)
        if self._sending is not None and self._sending[0] is request:
            self._sending = None
        if self._arriving is request:
            self._arriving, self._dropping = None, True
        request.drop_reply()
        if request.was_sent:
            self._working.add(request.id)
            self._notes.append(Cancel(request.id))

    def next_frame(self) -> Frame | None:
        """The next frame for the device, or None while there is none."""
        if self._notes:
            return self._notes.popleft()
        while self._sending is not None or self._queue:
            if self._sending is None:
                request, offset = self._queue.popleft()
                request.was_sent = True
                self._sending = request, request.body.frames(request.id, offset)
            if (frame := next(self._sending[1], None)) is not None:
                return frame
            self._sending = None
        return None

    def receive(self, frame: Frame) -> Request | None:
        """A frame from the device.

        Returns:
            The request that it ends: see `Request.is_answered`.

        Raises:
            PeerError: a frame that no honest device sends now.
        """
        match frame:
            case Begin():
                return self._begin(frame)
            case Chunk():
                if self._arriving is None and not self._dropping:
                    raise PeerError(Refusal.PHASE, "bytes of no message")
                return self._append(self._arriving, frame.data) if self._arriving else None
            case Free():
                self._working.discard(frame.id)
            case Beat():
                pass
            case _:
                raise PeerError(Refusal.PHASE, f"a {type(frame).__name__} is not what a device sends now")
        return None

    def _begin(self, begin: Begin) -> Request | None:
        self._arriving, self._dropping = None, False
        request = self._requests.get(begin.id)
        if request is None:
            if self._ended.get(begin.id, True):
                raise PeerError(Refusal.REPEATED, "a reply to a request that is not waiting for one")
            self._dropping = True  # it was on its way when we stopped waiting; that happens once
            self._ended[begin.id] = True
            return None
        if request.reply is not None:
            request.reply.go_on(begin)
        elif begin.total > self._limit:
            return self._fail(request, f"its reply has {begin.total} bytes; at most {self._limit} are taken")
        else:
            try:
                request.reply = Incoming(begin, self._limit, self._spools)
            except StorageError as error:
                return self._fail(request, str(error))
        self._arriving = request
        return self._append(request, begin.data)

    def _append(self, request: Request, data: bytes) -> Request | None:
        if request.reply is None:
            raise PeerError(Refusal.PHASE, "bytes of no message")
        try:
            request.reply.append(data)
        except StorageError as error:
            return self._fail(request, str(error))
        if not request.reply.is_whole:
            return None
        self._arriving = None
        return self._answered(request, Received(request.id), taken=True)

    def _fail(self, request: Request, why: str) -> Request:
        """Take no reply to this request; what is on its way is dropped."""
        request.drop_reply()
        request.failure = why
        self._arriving, self._dropping = None, True
        return self._answered(request, Cancel(request.id), taken=False)

    def _answered(self, request: Request, note: Frame, *, taken: bool) -> Request:
        del self._requests[request.id]
        if self._sending is not None and self._sending[0] is request:  # the device has no use for the rest of it
            self._sending = None
        self._end(request.id, taken=taken)
        self._notes.append(note)
        return request

    def _end(self, message_id: bytes, *, taken: bool) -> None:
        self._ended[message_id] = taken
        while len(self._ended) > _ENDED_KEPT:
            self._ended.popitem(last=False)
