from __future__ import annotations

import threading
import time
from collections.abc import Iterable

import pytest
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from propolis.flower import message_from_bytes, message_to_bytes, serialized, set_message_id
from propolis.secure.errors import CancelledError
from propolis.server.exchange import MeteredGrid, Snapshot, exchange
from propolis.simulations.local import LocalGrid


def echo_app() -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return Message(RecordDict({"metrics": MetricRecord({"node": context.node_id})}), reply_to=message)

    return app


def messages(count: int) -> list[Message]:
    content = RecordDict({"config": ConfigRecord({"text": "x" * 100})})
    return [Message(content, dst_node_id=node, message_type="train") for node in range(1, count + 1)]


class Silent(LocalGrid):
    """A grid whose devices 2, 4, 6, ... never answer."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        for message_id in message_ids:
            if message_id in self._pending and self._pending[message_id][1].metadata.dst_node_id % 2:
                yield from super().pull_messages([message_id])


def test_every_reply_comes_once() -> None:
    grid = LocalGrid(echo_app, 40)
    replies = list(exchange(grid, messages(40), timeout=60))
    assert sorted(reply.metadata.src_node_id for reply in replies) == list(range(1, 41))


def test_a_silent_device_costs_one_deadline() -> None:
    began = time.monotonic()
    replies = list(exchange(Silent(echo_app, 6), messages(6), timeout=0.5))
    assert [reply.metadata.src_node_id for reply in replies] == [1, 3, 5]
    assert 0.5 <= time.monotonic() - began < 10


def test_the_deadline_is_the_messages_time_to_live() -> None:
    outgoing = messages(2)
    list(exchange(LocalGrid(echo_app, 2), outgoing, timeout=12.5))
    assert [message.metadata.ttl for message in outgoing] == [12.5, 12.5]


def test_a_cancelled_exchange_ends() -> None:
    cancelled = threading.Event()
    threading.Timer(0.2, cancelled.set).start()
    with pytest.raises(CancelledError):
        list(exchange(Silent(echo_app, 6), messages(6), timeout=60, cancelled=cancelled))


def test_a_shared_content_is_serialised_as_each_message_would_be() -> None:
    outgoing = [*messages(3), Message(RecordDict({"m": MetricRecord({"x": 1})}), dst_node_id=9, message_type="train")]
    for index, message in enumerate(outgoing):
        set_message_id(message, f"id-{index}")
    for message, parts in zip(outgoing, serialized(outgoing), strict=True):
        rebuilt = message_from_bytes(b"".join(parts))
        assert rebuilt.content == message.content
        assert rebuilt.metadata == message.metadata
        assert sum(map(len, parts)) == len(message_to_bytes(message))


def test_the_meter_counts_the_serialised_messages() -> None:
    grid = MeteredGrid(LocalGrid(echo_app, 3))
    outgoing = messages(3)
    replies = list(grid.send_and_receive(outgoing, timeout=60))
    assert grid.uplink_bytes == sum(len(message_to_bytes(reply)) for reply in replies)
    sent = sum(len(message_to_bytes(message)) for message in outgoing)
    assert grid.downlink_bytes == sent


def test_a_snapshot_is_sorted_and_fixed() -> None:
    grid = LocalGrid(echo_app, 5)
    assert list(Snapshot(grid, [4, 2]).get_node_ids()) == [2, 4]
    assert Snapshot(grid, [1]).run is grid.run
