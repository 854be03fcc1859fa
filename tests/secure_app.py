"""Flower devices behind SecureMod, in this process, with a SecureGrid around them and a wire to meddle with between."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Strategy

from propolis.client.state import DeviceStore, MemoryStore
from propolis.client.update import SecureMod
from propolis.flower import message_to_bytes, set_message_id, unavailable_reply, with_content
from propolis.messages import RECORD, open_record, protocol_record
from propolis.secure.codec.profiles import PROFILES
from propolis.secure.codec.quantize import wrap_free
from propolis.secure.secagg.policy import Policy
from propolis.server.batch import Outcome
from propolis.server.exchange import GridWrapper
from propolis.server.grid import SecureGrid
from propolis.server.planner import Protection
from propolis.simulations.federation import SIMULATED, Federation, make_federation
from propolis.simulations.local import LocalGrid

Arrays = Mapping[str, np.ndarray]
# What a device answers to a message, by its index.
Work = Callable[[Message, int], RecordDict]

MODEL: Arrays = {
    "w": np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3),
    "b": np.array([0.5, -0.5, 0.0], np.float32),
}


def answer(arrays: Arrays | None = None, **metrics: Any) -> RecordDict:
    """An app's reply; ``num_examples`` is the weight."""
    content = RecordDict({"metrics": MetricRecord({name.replace("_", "-"): v for name, v in metrics.items()})})
    if arrays is not None:
        content["arrays"] = record(arrays)
    return content


def record(arrays: Arrays) -> ArrayRecord:
    return ArrayRecord({name: Array(np.asarray(array)) for name, array in arrays.items()})


def arrays_of(message: Message) -> dict[str, np.ndarray]:
    (arrays,) = message.content.array_records.values()
    return {name: array.numpy() for name, array in arrays.items()}


def metrics_of(message: Message) -> dict[str, Any]:
    (metrics,) = message.content.metric_records.values()
    return dict(metrics)


def outcome_of(message: Message) -> Outcome:
    outcome = Outcome.of(message.content)
    assert outcome is not None
    return outcome


def shift(index: int) -> float:
    """How far `honest` devices move every parameter."""
    return (index + 1) / 64


def honest(message: Message, index: int) -> RecordDict:
    """Weight index + 1; training moves every entry by `shift`, evaluation has an accuracy of index / 8."""
    if message.metadata.message_type == "evaluate":
        return answer(num_examples=index + 1, accuracy=index / 8)
    moved = {name: (array + shift(index)).astype(array.dtype) for name, array in arrays_of(message).items()}
    return answer(moved, num_examples=index + 1, loss=2.0 + index)


def mean_shift(indices: Iterable[int]) -> float:
    """The weighted mean of `shift` over some honest devices."""
    weights = {index: index + 1 for index in indices}
    return sum(weight * shift(index) for index, weight in weights.items()) / sum(weights.values())


def app_of(work: Work, stores: Callable[[Context], DeviceStore] | None) -> ClientApp:
    app = ClientApp(mods=[SecureMod(stores)] if stores else [])

    def handle(message: Message, context: Context) -> Message:
        return Message(work(message, int(context.node_config["partition-id"])), reply_to=message)

    for register in (app.train, app.evaluate, app.query):
        register()(handle)
    return app


def exchange_of(message: Message) -> str:
    """The name of the exchange that a request or a reply belongs to; empty for an error."""
    return open_record(message.content)[0].label if message.has_content() else ""


def body_of(message: Message) -> bytes:
    return open_record(message.content)[1]


class Wire(GridWrapper):
    """A grid that keeps what crosses it, loses what it is told to, and changes it on the way.

    Attributes:
        lose: by exchange and node id, whether the node is gone.
        meddle: what becomes of the bytes of a reply, by exchange and node id.
        deliver: what becomes of a request.
        requests, replies: what crossed, as it was sent.
    """

    def __init__(self, grid: Grid) -> None:
        super().__init__(grid)
        self.lose: Callable[[str, int], bool] = lambda exchange, node_id: False
        self.meddle: Callable[[str, int, bytes], bytes] = lambda exchange, node_id, body: body
        self.deliver: Callable[[str, Message], Message] = lambda exchange, message: message
        self.requests: list[Message] = []
        self.replies: list[Message] = []
        self._lost: dict[str, Message] = {}

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        return [self._push(exchange_of(message), message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        for message_id in message_ids:
            if message_id in self._lost:
                yield unavailable_reply(self._lost.pop(message_id), "lost")
                continue
            for reply in self.inner.pull_messages([message_id]):
                self.replies.append(reply)
                yield self._meddled(reply)

    def said(self, exchange: str) -> list[Message]:
        """The replies of an exchange so far."""
        return [reply for reply in self.replies if exchange_of(reply) == exchange]

    def asked(self, exchange: str) -> list[int]:
        """Whom the requests of an exchange were for."""
        return [m.metadata.dst_node_id for m in self.requests if exchange_of(m) == exchange]

    def uplink(self) -> bytes:
        """All that devices sent."""
        return b"".join(map(message_to_bytes, self.replies))

    def _push(self, exchange: str, message: Message) -> str:
        self.requests.append(message)
        if not self.lose(exchange, message.metadata.dst_node_id):
            delivered = self.deliver(exchange, message)
            (message_id,) = self.inner.push_messages([delivered])
            set_message_id(message, message_id)
            return message_id
        set_message_id(message, f"lost-{len(self.requests)}")
        self._lost[message.metadata.message_id] = message
        return message.metadata.message_id

    def _meddled(self, reply: Message) -> Message:
        if not reply.has_content():
            return reply
        exchange, body = exchange_of(reply), body_of(reply)
        changed = self.meddle(exchange, reply.metadata.src_node_id, body)
        return reply if changed is body else with_body(reply, changed)


def with_body(message: Message, body: bytes) -> Message:
    """The message with other bytes of the protocol."""
    exchange, _ = open_record(message.content)
    return with_content(message, RecordDict({**message.content, RECORD: protocol_record(exchange, body)}))


class Rounds:
    """Asks the devices of a hive through its grid, as a strategy does.

    Attributes:
        wire: between the grid and the devices.
        grid: that protects what they say.
        stores: the devices', by index.
    """

    wire: Wire
    grid: Grid
    stores: list[DeviceStore]

    def messages(
        self, kind: str = "train", model: Arrays = MODEL, nodes: Iterable[int] | None = None, **config: Any
    ) -> list[Message]:
        records = RecordDict({"arrays": record(model), "config": ConfigRecord(config)})
        chosen = self.wire.get_node_ids() if nodes is None else nodes
        return [self.grid.create_message(records, kind, node_id, "") for node_id in chosen]

    def round(
        self, kind: str = "train", model: Arrays = MODEL, nodes: Iterable[int] | None = None, **config: Any
    ) -> Message:
        """The one reply to one round."""
        (reply,) = self.grid.send_and_receive(self.messages(kind, model, nodes, **config), timeout=60)
        return reply

    def _store(self, context: Context) -> DeviceStore:
        return self.stores[int(context.node_config["partition-id"])]


class Hive(Rounds):
    """Some devices that work as told, node id = index + 1, and a secure grid around them."""

    def __init__(
        self,
        devices: int = 5,
        work: Work = honest,
        *,
        policy: Policy = SIMULATED,
        strategy: Strategy | None = None,
        federation: Federation | None = None,
        exact: Iterable[str] = (),
        **protection: Any,
    ) -> None:
        self.federation = federation or make_federation(devices, seed=0)
        self.stores: list[DeviceStore] = [MemoryStore(state, policy) for state in self.federation.devices]
        self.wire = Wire(LocalGrid(partial(app_of, work, self._store), devices))
        codec = protection.pop("codec", PROFILES["float32"])
        if "bits" in protection:
            codec = replace(codec, width=protection.pop("bits"))
        self.protection = Protection(**{"max_weight": float(devices), "codec": codec, **protection})
        self.grid = SecureGrid(
            self.wire, strategy or FedAvg(), self.federation.verified_roster, self.protection, exact=exact
        )

    @property
    def step(self) -> float:
        """What a mean of whole devices may be off by: a step of the grid for each, relative to the mean weight."""
        devices, protection = len(self.stores), self.protection
        return wrap_free(protection.codec.width, devices, self.grid.scale.range).step * protection.max_weight


def require_mean(reply: Message, indices: Iterable[int], tolerance: float = 2e-3, model: Arrays = MODEL) -> None:
    """That a round's reply is the mean of these honest devices."""
    shifted = mean_shift(indices)
    for name, array in arrays_of(reply).items():
        np.testing.assert_allclose(array, model[name] + shifted, atol=tolerance)
