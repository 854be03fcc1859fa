"""`LinkGrid`: Flower's Grid over the devices that are connected to this process."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable, Iterator

from flwr.app import Message

from propolis.flower import join_message, set_message_id, unavailable_reply
from propolis.link.frames import ID_BYTES
from propolis.server.courier import Request
from propolis.server.exchange import OwnGrid
from propolis.server.post import Post

_COLLECT_EVERY = 256 * 2**20


class LinkGrid(OwnGrid):
    """The devices behind a link, as a Flower ServerApp sees them.

    A reply becomes a Message when it is pulled; until then its arrays are where the link put them, which is a file
    where they are large. So a consumer that folds replies as it pulls them holds one at a time.

    Args:
        post: what the link sends and receives.
        wake: tells the link that there is something to send to these devices.
        run_id: of the run that the messages belong to.
    """

    # A node's id is a digest of its descriptor, and the link lets nobody else answer for it.
    binds_identities = True

    def __init__(self, post: Post, wake: Callable[[Iterable[int]], None], run_id: int) -> None:
        super().__init__(run_id)
        self._post, self._wake = post, wake
        self._read = 0

    def get_node_ids(self) -> Iterable[int]:
        """The devices that are connected and free: one that owes an answer after its time is not asked again."""
        if overdue := self._post.expire():  # since the link's own thread looked last
            self._wake(overdue)
        return self._post.node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """See `Grid.push_messages`; a device that is not connected gets its message when it is, in its time to live."""
        outgoing = list(messages)
        ids = self._post.push(outgoing)
        self._wake({message.metadata.dst_node_id for message in outgoing})
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """The replies that have come whole, each read when it is asked for; an error where none will come."""
        for message_id in self._post.ended(message_ids):
            if (request := self._post.take(message_id)) is not None:
                self._collect_before(request)
                yield _message_of(request)

    def wait_for_reply(self, timeout: float) -> None:
        """Return when a reply may have come since the last call, after `timeout` seconds at most."""
        self._post.wait(timeout)

    def _collect_before(self, request: Request) -> None:
        """Free the replies that were read and dropped before this one.

        A content of Flower that was asked for its `array_records` refers to itself, so it outlives its last user until
        Python looks for such. It does so after many objects, and a few of these fill the memory.
        """
        if self._read > _COLLECT_EVERY:
            gc.collect()
            self._read = 0
        if request.reply is not None:
            self._read += request.reply.received


def _message_of(request: Request) -> Message:
    """The reply to an ended request."""
    if request.failure is not None or request.reply is None:
        return unavailable_reply(request.message, request.failure or "no reply")
    try:
        reply = join_message(request.reply.header(), request.reply.parts(), request.message)
    except ValueError as error:
        return unavailable_reply(request.message, f"the device's reply is broken: {error}")
    finally:
        request.drop_reply()
    set_message_id(reply, os.urandom(ID_BYTES).hex())
    return reply
