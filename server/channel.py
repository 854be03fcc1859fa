"""Exchanges of the secure protocol with many devices, as Flower messages."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from propolis.flower import is_made_up
from propolis.messages import RECORD, open_record, protocol_record, refusal_of
from propolis.secure.errors import PeerError, Refusal
from propolis.secure.secagg.states import Exchange
from propolis.server.exchange import exchange


@dataclass(frozen=True, slots=True)
class Content:
    """What the application tells a device in an exchange.

    Attributes:
        records: its own, as they come from the strategy.
        broadcast: the model's way to the device, where the records hold it only by name.
    """

    records: RecordDict = field(default_factory=RecordDict)
    broadcast: bytes = b""


class Channel:
    """Asks devices and remembers what went wrong with each.

    Args:
        grid: any Flower Grid.
        message_type: of the strategy's own messages, ``train`` or ``evaluate``: mods see no others.
        group_id: likewise.
        cancelled: set by somebody else to end a wait.

    Attributes:
        failures: by node id, what a device said or did wrong; those that were lost said nothing.
        refusals: by node id, the code of what a device refused.
    """

    def __init__(self, grid: Grid, message_type: str, group_id: str, cancelled: threading.Event | None = None) -> None:
        self._grid, self._type, self._group_id, self._cancelled = grid, message_type, group_id, cancelled
        self.failures: dict[int, str] = {}
        self.refusals: dict[int, Refusal] = {}

    @property
    def said(self) -> str:
        """What the devices that failed said last, for a person."""
        reasons = list(self.failures.values())
        return f"; one said: {reasons[-1]}" if reasons else "; the others were lost or did not answer in time"

    def forgive(self, node_id: int) -> None:
        """Forget what a device said: it is asked again."""
        self.failures.pop(node_id, None)
        self.refusals.pop(node_id, None)

    def ask(
        self,
        asked: Exchange,
        bodies: Mapping[int, bytes],
        timeout: float,
        content_of: Callable[[int], Content] | None = None,
    ) -> Iterator[tuple[int, bytes]]:
        """Send each node its request, and yield the replies as they come.

        Args:
            asked: the exchange.
            bodies: the protocol's bytes by node id.
            timeout: seconds until the exchange is over.
            content_of: what the application tells the device of a node id; None for nothing.

        Yields:
            Node id and the protocol's bytes.
        """
        messages = (
            self._message(asked, node_id, body, content_of(node_id) if content_of else Content())
            for node_id, body in bodies.items()
        )
        for reply in exchange(self._grid, messages, timeout=timeout, cancelled=self._cancelled):
            node_id = reply.metadata.src_node_id
            if node_id in bodies and (body := self._body(asked, node_id, reply)) is not None:
                yield node_id, body

    def _message(self, asked: Exchange, node_id: int, body: bytes, content: Content) -> Message:
        records = RecordDict(dict(content.records))
        records[RECORD] = protocol_record(asked, body, content.broadcast)
        return self._grid.create_message(records, self._type, node_id, self._group_id)

    def _body(self, asked: Exchange, node_id: int, reply: Message) -> bytes | None:
        if is_made_up(reply):
            return None
        if reply.has_error():
            if refusal := refusal_of(reply.error.code):
                self.refusals[node_id] = refusal
            said = refusal.reason if refusal else f"error {reply.error.code}: is secure_mod in its ClientApp?"
            self.failures[node_id] = f"{asked.label}: {said}"
            return None
        try:
            answered, body = open_record(reply.content)
        except PeerError as error:
            self.failures[node_id] = f"{asked.label}: {error}"
            return None
        if answered is not asked:
            self.failures[node_id] = f"{asked.label}: answered {answered.label}"
            return None
        return body
