"""All the requests of a run: who is connected, what waits for whom, and which replies are there to be pulled."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Iterator

from flwr.app import Message, RecordDict

from propolis.flower import Parted, part_content, part_metadata, set_message_id
from propolis.link.frames import ID_BYTES, LARGEST_HEADER, PROCESS_BYTES, Frame, Hello, Progress
from propolis.link.spool import Spools
from propolis.link.transfers import Body
from propolis.secure.errors import PropolisError, UsageError
from propolis.server.courier import Courier, Request

# A reply that nobody has pulled for so long after its time is forgotten.
_UNPULLED_S = 60.0


class Post:
    """The link's state, shared by the run's thread, which pushes and pulls, and the link's, which sends and receives.

    Args:
        limit: bytes that a reply may have.
        spools: where replies wait.
    """

    def __init__(self, limit: int, spools: Spools) -> None:
        self.process = os.urandom(PROCESS_BYTES)
        self._limit, self._spools = limit, spools
        self._couriers: dict[int, Courier] = {}
        self._connected: set[int] = set()
        self._requests: dict[str, Request] = {}
        self._changed = threading.Condition()
        self._arrivals = self._seen = 0
        self._death: BaseException | None = None

    def node_ids(self) -> list[int]:
        """The devices that are connected and not busy with something that nobody waits for."""
        with self._changed:
            self._require_alive()
            return sorted(node_id for node_id in self._connected if self._couriers[node_id].is_free)

    def push(self, messages: Iterable[Message]) -> list[str]:
        """Give each message an id and send it, now or when its device is there; its time to live starts now."""
        requests = list(_requests_for(messages))  # which takes its time, and the link goes on meanwhile
        with self._changed:
            self._require_alive()
            for request in requests:
                self._requests[request.id.hex()] = request
                self._courier(request.node_id).submit(request)
        return [request.id.hex() for request in requests]

    def ended(self, message_ids: Iterable[str]) -> list[str]:
        """Those of the requests that have ended and were not taken yet."""
        with self._changed:
            self._require_alive()
            found = ((message_id, self._requests.get(message_id)) for message_id in message_ids)
            return [message_id for message_id, request in found if request is not None and request.is_answered]

    def take(self, message_id: str) -> Request | None:
        """An ended request, each once: see `Request.is_answered`. None: it still waits, or was taken."""
        with self._changed:
            request = self._requests.get(message_id)
            if request is None or not request.is_answered:
                return None
            return self._requests.pop(message_id)

    def wait(self, timeout: float) -> None:
        """Wait until something has come since the last wait ended, at most `timeout` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self._arrivals != self._seen, timeout)
            self._seen = self._arrivals
            self._require_alive()

    def wait_for_nodes(self, count: int, deadline: float) -> int:
        """Wait until so many devices are connected, or the monotonic clock shows `deadline`; their number."""
        while len(found := self.node_ids()) < count and time.monotonic() < deadline:
            with self._changed:
                self._changed.wait(min(0.2, max(0.0, deadline - time.monotonic())))
        return len(found)

    def died(self, error: BaseException) -> None:
        """The link has ended by itself: whoever waits for replies waits in vain, and is told."""
        with self._changed:
            self._death = error
            self._notify()

    def connected(self, node_id: int, hello: Hello) -> tuple[Progress, ...]:
        """A device's stream begins; see `Courier.connected`."""
        with self._changed:
            self._connected.add(node_id)
            have = self._courier(node_id).connected(hello, self.process)
            self._notify()
            return have

    def disconnected(self, node_id: int) -> None:
        """A device has no stream any more; what is on its way to it waits."""
        with self._changed:
            self._connected.discard(node_id)

    def next_frame(self, node_id: int) -> Frame | None:
        """See `Courier.next_frame`."""
        with self._changed:
            return self._couriers[node_id].next_frame()

    def receive(self, node_id: int, frame: Frame) -> None:
        """See `Courier.receive`."""
        with self._changed:
            courier = self._couriers[node_id]
            was_free = courier.is_free
            if courier.receive(frame) is not None or courier.is_free is not was_free:
                self._notify()

    def put_out(self, node_id: int) -> None:
        """End the requests to a device that may not be here any more: nobody waits for its answers."""
        with self._changed:
            for request in self._requests.values():
                if request.node_id == node_id and not request.is_answered:
                    request.failure = "the device may not take part any more"
                    self._courier(node_id).cancel(request)
            self._notify()

    def expire(self) -> set[int]:
        """End the requests whose time is over; the devices that must be told."""
        now, told = time.monotonic(), set()
        with self._changed:
            for message_id, request in list(self._requests.items()):
                if request.expires + _UNPULLED_S <= now:
                    request.drop_reply()
                    del self._requests[message_id]
                if request.expires <= now and not request.is_answered:
                    request.failure = "the device did not answer in time"
                    self._courier(request.node_id).cancel(request)
                    told.add(request.node_id)
            if told:
                self._notify()
        return told

    def _courier(self, node_id: int) -> Courier:
        if node_id not in self._couriers:
            self._couriers[node_id] = Courier(self._limit, self._spools)
        return self._couriers[node_id]

    def _require_alive(self) -> None:
        if self._death is not None:
            raise PropolisError(f"the link has failed: {self._death}")

    def _notify(self) -> None:
        self._arrivals += 1
        self._changed.notify_all()


def _requests_for(messages: Iterable[Message]) -> Iterator[Request]:
    """The messages with their new ids, in the form in which they travel; a content that many share is parted once."""
    last: RecordDict | None = None
    content = Parted(b"", ())
    for message in messages:
        message_id = os.urandom(ID_BYTES)
        set_message_id(message, message_id.hex())
        if not message.has_content():
            content, last = Parted(b"", ()), None
        elif message.content is not last:
            last, content = message.content, part_content(message.content)
        body = Body(part_metadata(message) + content.header, content.parts)
        if len(body.header) > LARGEST_HEADER:
            raise UsageError(
                f"a message has {len(body.header)} bytes besides its arrays, the link takes {LARGEST_HEADER}: "
                "put large values into arrays"
            )
        yield Request(message_id, message, body, time.monotonic() + message.metadata.ttl)
