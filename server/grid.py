"""`SecureGrid`: any Flower Grid, any averaging strategy, and the server learns only the sum."""

from __future__ import annotations

import logging
import os
import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NoReturn, cast

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from propolis.messages import RECORD, model_digest, model_in, shared_input_of
from propolis.secure.codec.fixed_point import FixedPoint
from propolis.secure.codec.update import Encoding, Mean, decode_mean, following_range
from propolis.secure.errors import PeerError, TooFewPeersError, UsageError
from propolis.secure.graph import sharing
from propolis.secure.identity import TrustedRoster
from propolis.secure.secagg.messages import to_bitmap
from propolis.secure.secagg.plan import Kind, Plan, Terms
from propolis.secure.secagg.server import SecAggServer
from propolis.server.channel import Channel
from propolis.server.directory import Directory
from propolis.server.exchange import GridWrapper
from propolis.server.model import like
from propolis.server.secure_round import SecureRound, say_hello

_KINDS = {"train": Kind.TRAIN, "evaluate": Kind.EVALUATE}

# Strategies that look at single updates, with their subclasses; under a secure sum there are none to look at.
_NEED_SINGLE_UPDATES = frozenset(
    {
        *("Krum", "MultiKrum", "Bulyan", "FedMedian", "FedTrimmedAvg", "QFedAvg", "FedXgbBagging", "FedXgbCyclic"),
        *("DifferentialPrivacyClientSideFixedClipping", "DifferentialPrivacyServerSideFixedClipping"),
        *("DifferentialPrivacyClientSideAdaptiveClipping", "DifferentialPrivacyServerSideAdaptiveClipping"),
    }
)

# Exchanges without training take no longer than this, whatever a round's deadline is.
_HANDSHAKE_S = 120.0

# Models of which it is known whose sums were published.
_MODELS_REMEMBERED = 256

_log = logging.getLogger("flwr")


@dataclass(frozen=True, slots=True)
class Protection:
    """How a federation's sums are protected; devices refuse what is below their own policy.

    Attributes:
        max_weight: largest weight of a device, public; a device with a larger one is refused.
        bits: width of the ring, which is what a parameter costs on the wire.
        range: largest weighted change that the first round can carry; later rounds follow the devices' mean.
        min_clients: fewest devices that a sum is over; devices have a floor of their own.
        min_difference: fewest devices that two sums over one model may differ by, if they do at all.
        malicious: protect against a server that shows devices different views: complete graph, one exchange more.
        corrupted: assumed share of the devices that collude with the server.
        dropped: assumed share of the devices that drop out of a round.
        attempts: times that a batch is tried.
    """

    max_weight: float
    bits: int = 16
    range: float = 1.0
    min_clients: int = 3
    min_difference: int = 3
    malicious: bool = False
    corrupted: float = 0.1
    dropped: float = 0.25
    attempts: int = 3


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a secure round's one reply is over; travels in it as a ConfigRecord.

    Attributes:
        survivors: devices in the mean.
        asked: devices that the round was for.
        failures: what the others said or did wrong.
    """

    survivors: int
    asked: int
    failures: tuple[str, ...]

    def record(self) -> ConfigRecord:
        """As part of a reply."""
        return ConfigRecord({"survivors": self.survivors, "asked": self.asked, "failures": list(self.failures)})

    @classmethod
    def of(cls, content: RecordDict) -> Outcome | None:
        """The outcome in a reply; None in one that is a single device's."""
        record = content.config_records.get(RECORD)
        if record is None:
            return None
        survivors, asked, failures = record["survivors"], record["asked"], record["failures"]
        return cls(cast(int, survivors), cast(int, asked), tuple(cast(list[str], failures)))


class SecureGrid(GridWrapper):
    """Turns each batch of train or evaluate messages into one secure round with ONE averaged reply.

    The reply has the model plus the weighted mean change, the weighted means of the metrics and the sum of the
    weights, so a strategy that averages replies goes on as if it had averaged them itself.

    Args:
        grid: any Flower Grid.
        strategy: that will aggregate the reply.
        roster: who may take part, verified.
        protection: see `Protection`.
        exact: names of arrays that need more than a coarse grid, such as running statistics; integers always do.
        frozen: names of arrays that devices do not send back.
        cancelled: set by somebody else to end a wait.

    Raises:
        UsageError: the strategy needs single updates.
    """

    def __init__(
        self,
        grid: Grid,
        strategy: Strategy,
        roster: TrustedRoster,
        protection: Protection,
        *,
        exact: Iterable[str] = (),
        frozen: Iterable[str] = (),
        cancelled: threading.Event | None = None,
    ) -> None:
        super().__init__(grid, cancelled)
        _require_averaging(strategy)
        self.range = protection.range
        self._weight_key = str(getattr(strategy, "weighted_by_key", "num-examples"))
        self._roster, self._protection = roster, protection
        self._exact, self._frozen = frozenset(exact), frozenset(frozen)
        self._directory = Directory(roster)
        self._run_id = os.urandom(16)
        self._number, self._attempt = 0, 0
        self._metric_names: dict[Kind, tuple[str, ...]] = {}  # what most devices sent last
        self._published: dict[tuple[Kind, bytes], list[frozenset[int]]] = {}

    def resume_from(self, metrics: Mapping[str, float]) -> None:
        """Go on with the range that follows a round whose metrics these are."""
        self.range = following_range(metrics["update-range"], metrics["largest-change"])

    def push_messages(self, messages: Iterable[Message]) -> NoReturn:
        """Refused: a message on its own is not protected."""
        raise UsageError("a SecureGrid sends whole rounds: use send_and_receive, or the grid that it is around")

    def pull_messages(self, message_ids: Iterable[str]) -> NoReturn:
        """Refused, like `push_messages`."""
        self.push_messages([])

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """One secure round.

        Args:
            messages: all of type train, or all of type evaluate, with one content for all; each for another node.
            timeout: seconds that each exchange of the round may take; None waits for every device.

        Returns:
            One reply with the mean; `Outcome.of` its content says how many devices it is over.

        Raises:
            UsageError: the messages are none of these.
            TooFewPeersError: too few devices survived, in every attempt.
        """
        outgoing = list(messages)
        if not outgoing:
            return []
        batch = _Batch.of(outgoing, float("inf") if timeout is None else timeout)
        for attempt in range(1, self._protection.attempts + 1):
            try:
                return [self._round(batch)]
            except TooFewPeersError as error:
                if attempt == self._protection.attempts:
                    raise
                _log.warning("secure round: %s; trying again", error)
        raise AssertionError("unreachable")

    def _round(self, batch: _Batch) -> Message:
        channel = Channel(self.inner, batch.message_type, batch.messages[0].metadata.group_id, self._cancelled)
        handshake = min(batch.timeout, _HANDSHAKE_S)
        say_hello(channel, self._directory, self._roster.signed, batch.node_ids, handshake)
        nodes = self._directory.members(batch.node_ids)
        server = self._role(batch, nodes)
        round_ = SecureRound(channel, self._directory, server, nodes, self._protection.min_clients)
        round_.prepare(handshake)
        try:
            round_.upload(batch.content, batch.timeout)
        finally:
            if server.offered_metrics:
                self._metric_names[batch.kind] = Counter(server.offered_metrics).most_common(1)[0][0]
        self._require_apart(batch, server.alive)
        if self._protection.malicious:
            round_.confirm(handshake)
        round_.unmask(handshake)
        alive = frozenset(server.alive)
        mean = self._mean(server, batch)
        self._remember_published(batch, alive)
        return self._reply(batch, mean, len(alive), channel)

    def _mean(self, server: SecAggServer, batch: _Batch) -> Mean:
        """What the devices' sum says; a device that is known to have made it impossible takes part no more."""
        shapes = {name: array.shape for name, array in batch.model.items()}
        terms = server.terms
        try:
            vector, lanes = server.sum(batch.shared_input)
            encoding, cohort, alive = terms.plan.encoding, len(terms.cohort), len(server.alive)
            return decode_mean(vector, lanes, server.metrics, encoding, shapes, cohort, alive)
        except PeerError as error:
            if error.culprit is not None:
                self._directory.ban(error.culprit)
            raise TooFewPeersError(f"the sum cannot be told: {error}") from None

    def _role(self, batch: _Batch, nodes: dict[int, int]) -> SecAggServer:
        """The protocol's role for the devices that are there."""
        if len(nodes) < self._protection.min_clients:
            raise TooFewPeersError(
                f"{len(nodes)} of {len(batch.messages)} devices said hello, {self._protection.min_clients} are needed"
            )
        protection = self._protection
        # What devices would refuse is our own mistake.
        sharing(len(nodes), protection.corrupted, protection.dropped, protection.malicious)
        FixedPoint(protection.bits, len(nodes), self.range)
        plan = self._plan(batch, nodes)
        terms = Terms(plan.to_bytes())
        keys = {index: self._directory.spend(node_id) for index, node_id in nodes.items()}
        shapes = {name: array.shape for name, array in batch.model.items()}
        return SecAggServer(
            terms,
            self._roster,
            keys,
            plan.encoding.dimension(shapes),
            plan.encoding.fixed_lanes(shapes),
            metrics=self._metric_names.get(batch.kind),
        )

    def _plan(self, batch: _Batch, nodes: dict[int, int]) -> Plan:
        self._number, self._attempt = self._next_name(batch.server_round)
        protection = self._protection
        return Plan(
            encoding=self._encoding(batch),
            malicious=protection.malicious,
            run_id=self._run_id,
            round=self._number,
            attempt=self._attempt,
            kind=batch.kind,
            roster_number=self._roster.number,
            roster_digest=self._roster.digest,
            cohort=to_bitmap(sorted(nodes), len(self._roster.roster.entries)),
            corrupted_ppm=round(protection.corrupted * 1e6),
            dropped_ppm=round(protection.dropped * 1e6),
        )

    def _next_name(self, server_round: int | None) -> tuple[int, int]:
        """Round and attempt of the next plan: they rise, also when the application counts otherwise."""
        number = self._number + 1 if server_round is None else max(server_round, self._number)
        return number, self._attempt + 1 if number == self._number else 0

    def _encoding(self, batch: _Batch) -> Encoding:
        names = () if batch.kind is Kind.EVALUATE else sorted(batch.model.keys() - self._frozen)
        exact = {name for name in names if name in self._exact or batch.model[name].dtype.kind != "f"}
        return Encoding(
            width=self._protection.bits,
            range=self.range,
            max_weight=self._protection.max_weight,
            weight_key=self._weight_key,
            quantized=tuple(name for name in names if name not in exact),
            exact=tuple(name for name in names if name in exact),
        )

    def _require_apart(self, batch: _Batch, alive: Iterable[int]) -> None:
        """Against differencing: two sums over one model are over the same devices, or differ by enough of them."""
        for before in self._published.get((batch.kind, batch.model_digest), []):
            if 0 < len(before.symmetric_difference(alive)) < self._protection.min_difference:
                raise TooFewPeersError(
                    f"the devices of this round and of one before over the same model differ by fewer than "
                    f"{self._protection.min_difference}: their sums would tell too much"
                )

    def _remember_published(self, batch: _Batch, alive: frozenset[int]) -> None:
        self._published.setdefault((batch.kind, batch.model_digest), []).append(alive)
        while len(self._published) > _MODELS_REMEMBERED:
            del self._published[next(iter(self._published))]

    def _reply(self, batch: _Batch, mean: Mean, survivors: int, channel: Channel) -> Message:
        metrics: dict[str, int | float | list[int] | list[float]] = {**mean.metrics, self._weight_key: mean.weight}
        content = RecordDict()
        if batch.kind is Kind.TRAIN:
            arrays = {
                name: Array(like(old, old + mean.changes[name], name))
                for name, old in batch.model.items()
                if name in mean.changes
            }
            content[batch.model_key] = ArrayRecord(arrays)
            metrics |= {"saturated": mean.saturated, "update-range": self.range, "largest-change": mean.largest}
            self.range = following_range(self.range, mean.largest)
        if mean.saturated:
            _log.warning("secure round: %d values were out of range and cut off", mean.saturated)
        content["metrics"] = MetricRecord(metrics)
        content[RECORD] = Outcome(survivors, len(batch.messages), tuple(channel.failures.values())).record()
        return Message(content, reply_to=batch.messages[0])


@dataclass(frozen=True, slots=True)
class _Batch:
    """The messages of one round, and what they have in common."""

    messages: list[Message]
    timeout: float
    kind: Kind
    shared_input: bytes
    model_key: str
    model: dict[str, np.ndarray]
    model_digest: bytes

    @classmethod
    def of(cls, messages: list[Message], timeout: float) -> _Batch:
        types = {message.metadata.message_type for message in messages}
        if len(types) > 1 or not types <= _KINDS.keys():
            raise UsageError(f"a SecureGrid protects train or evaluate messages, got {', '.join(sorted(types))}")
        if len({message.metadata.dst_node_id for message in messages}) < len(messages):
            raise UsageError("a SecureGrid sends each device one message in a round")
        _require_one_content(messages)
        content = messages[0].content
        try:
            model = model_in(content)
        except PeerError as error:
            raise UsageError(f"a SecureGrid needs the model in each message: {error}") from None
        (key,) = content.array_records
        (kind,) = (_KINDS[each] for each in types)
        digest = model_digest(model)
        return cls(messages, timeout, kind, shared_input_of(content, digest), key, model, digest)

    @property
    def message_type(self) -> str:
        return self.kind.name.lower()

    @property
    def content(self) -> RecordDict:
        return self.messages[0].content

    @property
    def node_ids(self) -> list[int]:
        return [message.metadata.dst_node_id for message in self.messages]

    @property
    def server_round(self) -> int | None:
        """The round as the application counts, where it says so."""
        for record in self.content.config_records.values():
            if isinstance(number := record.get("server-round"), int) and number >= 0:
                return number
        return None


def _require_one_content(messages: list[Message]) -> None:
    """Raise UsageError when the messages' contents differ, so that a device could be singled out."""
    first = messages[0].content
    if RECORD in first:
        raise UsageError(f"the record name {RECORD} is taken by the protocol")
    for message in messages[1:]:
        same = all(message.content.get(name) is record for name, record in first.items())
        if not (same and len(message.content) == len(first)) and message.content != first:
            raise UsageError("the strategy sends devices different models or configurations; a secure sum needs one")


def _require_averaging(strategy: Strategy) -> None:
    for base in type(strategy).__mro__:
        if base.__module__.startswith("flwr.") and base.__name__ in _NEED_SINGLE_UPDATES:
            raise UsageError(
                f"{base.__name__} looks at single updates, which nobody sees under secure aggregation; use a strategy "
                "that averages, such as FedAvg, FedAvgM, FedAdam, FedYogi, FedAdagrad or FedProx"
            )
