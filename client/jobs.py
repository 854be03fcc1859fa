"""What a device has been asked and not yet delivered, over however many streams it takes. No I/O, no clock."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from propolis.flower import error_header
from propolis.link.frames import Beat, Begin, Cancel, Chunk, Frame, Free, Hello, Progress, Received, Welcome
from propolis.link.spool import Spools
from propolis.link.transfers import Body, Incoming
from propolis.secure.errors import PeerError, Refusal, StorageError

# What a server may have a device hold at a time; requests beyond it get an error for an answer.
_MOST_JOBS = 64


@dataclass(slots=True, eq=False)
class Job:
    """A request of the server, and the reply once there is one.

    Attributes:
        id: the request's.
        request: what has arrived of it, until the app has answered.
        reply: what the app answered.
        is_void: nobody waits for the reply any more.
        has_begun: whether the app works, or has worked, on it.
    """

    id: bytes
    request: Incoming | None = None
    reply: Body | None = None
    is_void: bool = False
    has_begun: bool = False

    @property
    def progress(self) -> Progress:
        """How much of the request is here: all of it, where it has been answered."""
        return Progress(self.id, 0, True) if self.request is None else self.request.progress

    def close(self) -> None:
        """Forget the request's bytes."""
        if self.request is not None:
            self.request.close()
            self.request = None


class Jobs:
    """The device's end of the link, without the link.

    Args:
        process: 16 bytes that name this process.
        node_id: the device's.
        limit: bytes that a request may have.
        spools: where requests go as they arrive.
    """

    def __init__(self, process: bytes, node_id: int, limit: int, spools: Spools) -> None:
        self._process, self.node_id, self._limit, self._spools = process, node_id, limit, spools
        self._server = b""
        self._jobs: dict[bytes, Job] = {}
        self._ready: deque[Job] = deque()
        self._replies: deque[tuple[Job, int]] = deque()
        self._sending: tuple[Job, Iterator[Begin | Chunk]] | None = None
        self._notes: deque[Frame] = deque()
        self._arriving: Job | None = None
        self._dropping = False

    def hello(self, clock: float, version: int) -> Hello:
        """The first frame of a stream; `clock` is in seconds since 1970."""
        have = tuple(job.progress for job in self._jobs.values())
        return Hello(self._process, self.node_id, int(clock), self._server, have, version)

    def welcomed(self, welcome: Welcome) -> None:
        """The server's first frame: go on where the last stream ended, or forget what another server asked."""
        self._notes.clear()
        self._replies.clear()
        self._sending = self._arriving = None
        self._dropping = False
        if welcome.process != self._server:
            self._server = welcome.process
            for job in list(self._jobs.values()):
                self._drop(job)
            self._notes.clear()  # this server knows nothing of them
        arrived: dict[bytes, int] = {}
        for progress in welcome.have:
            if progress.whole:
                self._cancel(progress.id)
            arrived[progress.id] = progress.size
        self._replies.extend((job, arrived.get(job.id, 0)) for job in self._jobs.values() if job.reply is not None)

    def receive(self, frame: Frame) -> None:
        """A frame from the server.

        Raises:
            PeerError: a frame that no server sends now.
        """
        match frame:
            case Begin():
                self._begin(frame)
            case Chunk():
                if self._arriving is None and not self._dropping:
                    raise PeerError(Refusal.PHASE, "bytes of no message")
                if self._arriving is not None:
                    self._append(self._arriving, frame.data)
            case Cancel():
                self._cancel(frame.id)
            case Received():
                self._delivered(frame.id)
            case Beat():
                pass
            case _:
                raise PeerError(Refusal.PHASE, f"a {type(frame).__name__} is not what a server sends now")

    def next_job(self) -> Job | None:
        """The next request that is whole and wanted: the app's work."""
        while self._ready:
            job = self._ready.popleft()
            if not job.is_void:
                job.has_begun = True
                return job
        return None

    def finished(self, job: Job, reply: Body | None) -> None:
        """What the app made of a request; None where it was none."""
        job.close()
        if job.is_void or reply is None:
            del self._jobs[job.id]
            self._notes.append(Free(job.id))
        else:
            job.reply = reply
            self._replies.append((job, 0))

    def next_frame(self) -> Frame | None:
        """The next frame for the server, or None while there is none."""
        if self._notes:
            return self._notes.popleft()
        while self._sending is not None or self._replies:
            if self._sending is None:
                job, offset = self._replies.popleft()
                if job.is_void or job.reply is None:
                    continue
                self._sending = job, job.reply.frames(job.id, min(offset, job.reply.total))
            if not self._sending[0].is_void and (frame := next(self._sending[1], None)) is not None:
                return frame
            self._sending = None
        return None

    def _begin(self, begin: Begin) -> None:
        self._arriving, self._dropping = None, False
        job = self._jobs.get(begin.id)
        if job is None:
            if len(self._jobs) >= _MOST_JOBS:
                raise PeerError(Refusal.POLICY, f"more than {_MOST_JOBS} requests at once")
            job = self._jobs[begin.id] = Job(begin.id)
            self._take(job, begin)
        elif job.request is None:
            self._dropping = True  # answered with an error before it had arrived
        else:
            job.request.go_on(begin)
        if job.request is not None:
            self._arriving = job
            self._append(job, begin.data)

    def _take(self, job: Job, begin: Begin) -> None:
        """Make room for a request, or answer that there is none."""
        held = sum(other.request.total for other in self._jobs.values() if other.request is not None)
        if held + begin.total > self._limit:
            self._refuse(job, f"a request of {begin.total} bytes; the device takes {self._limit}, {held} are in use")
            return
        try:
            job.request = Incoming(begin, self._limit, self._spools)
        except StorageError:
            self._refuse(job, "the device has no room for the request on its disk")

    def _append(self, job: Job, data: bytes) -> None:
        if job.request is None:
            return
        try:
            job.request.append(data)
        except StorageError:
            job.close()
            self._refuse(job, "the device has no room for the request on its disk")
            return
        if job.request.is_whole:
            self._arriving = None
            self._ready.append(job)

    def _refuse(self, job: Job, why: str) -> None:
        """Answer with an error in the app's place; what is still to come of the request is dropped."""
        self._arriving, self._dropping = None, True
        job.has_begun = True
        job.reply = Body(error_header(why), ())
        self._replies.append((job, 0))

    def _cancel(self, message_id: bytes) -> None:
        if (job := self._jobs.get(message_id)) is not None:
            self._drop(job)
        else:
            self._notes.append(Free(message_id))

    def _delivered(self, message_id: bytes) -> None:
        if (job := self._jobs.get(message_id)) is None or job.reply is None:
            raise PeerError(Refusal.PHASE, "the server says to have a reply that was never sent")
        del self._jobs[message_id]

    def _drop(self, job: Job) -> None:
        """Nobody waits for this job; while the app works on it, the device is not free."""
        job.is_void = True
        if self._arriving is job:
            self._arriving = None
        if job.has_begun and job.reply is None:
            return
        del self._jobs[job.id]
        job.close()
        self._notes.append(Free(job.id))
