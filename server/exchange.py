"""One exchange with many devices: push, poll, and stop waiting when the deadline says so."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Protocol, runtime_checkable

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from propolis.flower import Run, make_run, set_identity, wire_size
from propolis.secure.errors import CancelledError

# Replies are pulled for this many ids at a time, so that a consumer who folds them holds few at once.
PULL_BATCH = 16
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.005, 0.2


@runtime_checkable
class WakingGrid(Protocol):
    """A grid that knows when a reply has come."""

    def wait_for_reply(self, timeout: float) -> None:
        """Return when a reply may have come since the last call, after `timeout` seconds at most."""


def exchange(
    grid: Grid, messages: Iterable[Message], *, timeout: float, cancelled: threading.Event | None = None
) -> Iterator[Message]:
    """Send messages and yield the replies as they come, each once.

    Args:
        grid: any Flower Grid.
        messages: what to send; their time to live becomes the exchange's deadline.
        timeout: seconds until the exchange is over, whoever has not answered.
        cancelled: set by somebody else to end the wait.

    Raises:
        CancelledError: `cancelled` was set.
    """
    outgoing = list(messages)
    if timeout != float("inf"):
        for message in outgoing:
            message.metadata.ttl = timeout
    # A dictionary is a set that keeps the order of sending. Flower gives no id to a message it could not push.
    waiting = {message_id: None for message_id in grid.push_messages(messages=outgoing) if message_id}
    del outgoing
    deadline = time.monotonic() + timeout
    pause = _FIRST_PAUSE_S
    while waiting:
        before = len(waiting)
        for reply in _pull(grid, list(waiting), deadline, cancelled):
            if reply.metadata.reply_to_message_id in waiting:
                del waiting[reply.metadata.reply_to_message_id]
                yield reply
            del reply  # else it would stay in memory while the next one is made
        if time.monotonic() >= deadline:
            return
        if len(waiting) == before:
            _pause(grid, min(pause, max(0.0, deadline - time.monotonic())))
            pause = min(2 * pause, _LONGEST_PAUSE_S)
        else:
            pause = _FIRST_PAUSE_S


def _pause(grid: Grid, seconds: float) -> None:
    if isinstance(grid, WakingGrid):
        grid.wait_for_reply(seconds)
    else:
        time.sleep(seconds)


def _pull(grid: Grid, ids: list[str], deadline: float, cancelled: threading.Event | None) -> Iterator[Message]:
    remaining = iter(ids)
    while batch := list(islice(remaining, PULL_BATCH)):
        if cancelled is not None and cancelled.is_set():
            raise CancelledError("the run was asked to stop")
        for reply in grid.pull_messages(batch):
            yield reply
            del reply
            # A grid may compute its replies one by one as they are pulled.
            if time.monotonic() >= deadline or (cancelled is not None and cancelled.is_set()):
                break
        if time.monotonic() >= deadline:
            return


class OwnGrid(Grid):
    """What our own grids have in common: the run that their messages belong to.

    Args:
        run_id: of the run; this process becomes its server.
    """

    def __init__(self, run_id: int) -> None:
        self.set_run(make_run(run_id))

    def set_run(self, run: Run) -> None:
        """See `Grid.set_run`."""
        self._run = run
        set_identity(run.run_id)

    @property
    def run(self) -> Run:
        """See `Grid.run`."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """See `Grid.create_message`."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """See `Grid.send_and_receive`."""
        return list(exchange(self, messages, timeout=float("inf") if timeout is None else timeout))


class GridWrapper(Grid):
    """A Grid around another one; what a subclass does not change goes straight through.

    `send_and_receive` is built from the wrapper's own push and pull, so a subclass that changes those has changed
    every way to talk to the devices.
    """

    def __init__(self, grid: Grid, cancelled: threading.Event | None = None) -> None:
        self.inner = grid
        self._cancelled = cancelled

    @property
    def binds_identities(self) -> bool:
        """Whether a node's id is a digest of its device's descriptor, and nobody else can answer for it."""
        return bool(getattr(self.inner, "binds_identities", False))

    def set_run(self, run: Run) -> None:
        """See `Grid.set_run`."""
        self.inner.set_run(run)

    @property
    def run(self) -> Run:
        """See `Grid.run`."""
        return self.inner.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """See `Grid.create_message`."""
        return self.inner.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        """See `Grid.get_node_ids`."""
        return self.inner.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """See `Grid.push_messages`."""
        return self.inner.push_messages(messages=messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """See `Grid.pull_messages`."""
        return self.inner.pull_messages(message_ids=message_ids)

    def wait_for_reply(self, timeout: float) -> None:
        """See `WakingGrid`; where the grid inside does not know, this sleeps."""
        _pause(self.inner, timeout)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """See `Grid.send_and_receive`; without a timeout it waits for every reply."""
        limit = float("inf") if timeout is None else timeout
        return list(exchange(self, messages, timeout=limit, cancelled=self._cancelled))


class MeteredGrid(GridWrapper):
    """Counts the bytes of the serialised messages that cross the wire of the grid it wraps.

    Attributes:
        downlink_bytes: sent to devices so far.
        uplink_bytes: received from devices so far.
    """

    def __init__(self, grid: Grid, cancelled: threading.Event | None = None) -> None:
        super().__init__(grid, cancelled)
        self.downlink_bytes = 0
        self.uplink_bytes = 0

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Push and count the downlink."""
        outgoing = list(messages)
        ids = super().push_messages(outgoing)
        self.downlink_bytes += wire_size(outgoing)  # now that they carry their ids
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Pull and count the uplink, message by message."""
        for message in super().pull_messages(message_ids):
            self.uplink_bytes += wire_size([message])
            yield message
            del message


class Snapshot(GridWrapper):
    """A grid whose devices are those listed: the strategy samples from them and can never wait for more."""

    def __init__(self, grid: Grid, node_ids: Iterable[int]) -> None:
        super().__init__(grid)
        self._node_ids = sorted(node_ids)

    def get_node_ids(self) -> Iterable[int]:
        """The listed devices, in order of id."""
        return list(self._node_ids)
