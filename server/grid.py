"""`SecureGrid`: any Flower Grid, any averaging strategy, and the server learns only the sum."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray

from propolis.messages import RECORD
from propolis.secure.codec.pipeline import Pipeline
from propolis.secure.codec.scale import Scale
from propolis.secure.codec.update import Mean, count_lanes, decode_mean
from propolis.secure.errors import TooFewPeersError, UsageError
from propolis.secure.identity import TrustedRoster
from propolis.secure.ring import Vector
from propolis.secure.secagg.addition import RingTotal
from propolis.secure.secagg.plan import Kind, Terms
from propolis.secure.secagg.server import SecAggServer
from propolis.server.batch import Batch, Outcome
from propolis.server.broadcaster import Broadcaster, WholeModel
from propolis.server.channel import Channel, Content
from propolis.server.directory import Directory
from propolis.server.journal import Journal
from propolis.server.model import like
from propolis.server.planner import Planner, Protection
from propolis.server.protected_grid import HANDSHAKE_S, ProtectedGrid
from propolis.server.published_sums import PublishedSums
from propolis.server.secure_round import Deadlines, SecureRound, say_hello, telling_a_sum

# Strategies that look at single updates, with their subclasses; under a secure sum there are none to look at.
_NEED_SINGLE_UPDATES = frozenset(
    {
        *("Krum", "MultiKrum", "Bulyan", "FedMedian", "FedTrimmedAvg", "QFedAvg", "FedXgbBagging", "FedXgbCyclic"),
        *("DifferentialPrivacyClientSideFixedClipping", "DifferentialPrivacyServerSideFixedClipping"),
        *("DifferentialPrivacyClientSideAdaptiveClipping", "DifferentialPrivacyServerSideAdaptiveClipping"),
    }
)

_log = logging.getLogger("flwr")


class SecureGrid(ProtectedGrid):
    """Turns each batch of train or evaluate messages into one secure round with ONE averaged reply.

    The reply has the model plus the weighted mean change, the weighted means of the metrics and the sum of the
    weights, so a strategy that averages replies goes on as if it had averaged them itself.

    Args:
        grid: any Flower Grid.
        strategy: that will aggregate the reply.
        roster: who may take part, verified.
        protection: see `Protection`.
        exact: names of arrays that need more than a coarse grid, such as running statistics; integers (up to 2^53)
            always do.
        frozen: names of arrays that devices do not send back.
        journal: file in which the shares of a round are kept before they are used: a server that is started again
            after a crash, and asks the same, gets that round's sum, and the devices reveal nothing twice.
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
        journal: Path | None = None,
        cancelled: threading.Event | None = None,
    ) -> None:
        super().__init__(grid, cancelled)
        _require_averaging(strategy)
        self.scale = Scale(protection.range)
        self._broadcaster = Broadcaster(protection.codec.broadcast) if protection.codec.broadcast else None
        self._weight_key = str(getattr(strategy, "weighted_by_key", "num-examples"))
        self._roster, self._protection, self._attempts = roster, protection, protection.attempts
        self._directory = Directory(roster, bound=self.binds_identities)
        self._planner = Planner(roster, protection, self._weight_key, exact, frozen)
        self._journal = Journal(journal) if journal else None
        self._metric_names: dict[Kind, tuple[str, ...]] = {}  # what most devices sent last
        self._published = PublishedSums(protection.min_difference)

    def resume_from(self, metrics: Mapping[str, float], state: Mapping[str, NDArray[Any]]) -> None:
        """Go on after a round with these metrics, after which `state` was this."""
        self.scale = Scale.of_metrics(metrics)
        if self._broadcaster is not None:
            self._broadcaster.resume_from(state)

    def renew(self, roster: TrustedRoster) -> None:
        """Go by a newer roster from the next round on; an equal one changes nothing."""
        if roster.number > self._roster.number:
            self._roster = roster
            self._directory.renew(roster)
            self._planner.renew(roster)

    def adopted(self, model: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """A new model as its devices will have it: a run that begins with it has nothing to make up for."""
        if self._broadcaster is None:
            return model
        return self._broadcaster.adopted(model, self._planner.quantized(model))

    def state(self) -> dict[str, NDArray[Any]]:
        """What a run needs, besides the last round's metrics, to go on as if it had never stopped."""
        return self._broadcaster.state() if self._broadcaster is not None else {}

    def _prepared(self, batch: Batch) -> Batch:
        if self._broadcaster is None:
            return batch
        return self._broadcaster.publish(batch, self._planner.quantized(batch.model))

    def _round(self, batch: Batch) -> Message:
        channel = Channel(self.inner, batch.message_type, batch.messages[0].metadata.group_id, self._cancelled)
        if self._journal and (recalled := self._journal.recall(batch, self._roster)):
            return self._published_mean(*recalled, channel)
        return self._published_mean(batch, self._collected(batch, channel), channel)

    def _collected(self, batch: Batch, channel: Channel) -> SecAggServer[Vector]:
        """A round with the devices that are there, up to the shares that its sum needs."""
        handshake = min(batch.timeout, HANDSHAKE_S)
        say_hello(channel, self._directory, self._roster.signed, batch.node_ids, handshake)
        nodes = self._directory.members(batch.node_ids)
        server = self._role(batch, nodes)
        round_ = SecureRound(channel, self._directory, server, nodes, self._protection.min_clients)
        source = self._broadcaster or WholeModel(Content(batch.content))
        try:
            round_.collect(
                source,
                Deadlines(handshake, batch.timeout),
                lambda: self._published.require_apart(batch.kind, batch.model_digest, server.alive),
            )
        finally:
            if server.offered_metrics:
                self._metric_names[batch.kind] = Counter(server.offered_metrics).most_common(1)[0][0]
        if self._journal:
            self._journal.keep(batch, server)
        return server

    def _published_mean(self, batch: Batch, server: SecAggServer[Vector], channel: Channel) -> Message:
        mean = self._mean(server, batch, channel)
        self._published.remember(batch.kind, batch.model_digest, server.alive)
        return self._reply(batch, mean, server, channel)

    def _mean(self, server: SecAggServer[Vector], batch: Batch, channel: Channel) -> Mean:
        """What the devices' sum says; a device that is known to have made it impossible takes part no more."""
        pipeline = _pipeline(server.terms, batch)
        with telling_a_sum(self._directory, channel):
            vector, lanes = server.sum(batch.shared_input)
            return decode_mean(vector, lanes, server.metrics, pipeline, len(server.alive))

    def _role(self, batch: Batch, nodes: dict[int, int]) -> SecAggServer[Vector]:
        """The protocol's role for the devices that are there."""
        if len(nodes) < self._protection.min_clients:
            raise TooFewPeersError(
                f"{len(nodes)} of {len(batch.messages)} devices said hello, {self._protection.min_clients} are needed"
            )
        parameters = sum(prod(shape) for shape in batch.shapes.values())
        self._protection.require_feasible(len(nodes), parameters)
        plan = self._planner.plan(batch, nodes, self.scale)
        terms = Terms(plan.to_bytes())
        keys = {index: self._directory.spend(node_id) for index, node_id in nodes.items()}
        return SecAggServer(
            terms,
            self._roster,
            keys,
            RingTotal(terms.grid.ring, _pipeline(terms, batch).size),
            count_lanes(terms.encoding, batch.shapes),
            metrics=self._metric_names.get(batch.kind),
        )

    def _reply(self, batch: Batch, mean: Mean, server: SecAggServer[Vector], channel: Channel) -> Message:
        metrics: dict[str, int | float | list[int] | list[float]] = {**mean.metrics, self._weight_key: mean.weight}
        content = RecordDict()
        if batch.kind is Kind.TRAIN:
            arrays = {
                name: Array(like(old, old + mean.changes[name], name))
                for name, old in batch.precise.items()
                if name in mean.changes
            }
            content[batch.model_key] = ArrayRecord(arrays)
            encoding = server.terms.encoding
            metrics |= {"saturated": mean.saturated, "clipped": mean.clipped, "wraps": mean.wraps}
            metrics |= {"bits": encoding.width, "update-range": encoding.grid.range, "largest-change": mean.largest}
            self.scale = self.scale.following(mean, encoding)
            metrics |= self.scale.metrics()
        if mean.wraps:
            _log.warning("secure round: %d values of the sum did not fit the ring", mean.wraps)
        if mean.saturated:
            _log.warning("secure round: %d values were out of range and cut off", mean.saturated)
        content["metrics"] = MetricRecord(metrics)
        content[RECORD] = Outcome(len(server.alive), len(batch.messages), tuple(channel.failures.values())).record()
        return Message(content, reply_to=batch.messages[0])


def _pipeline(terms: Terms, batch: Batch) -> Pipeline:
    """The codec of a round, as its devices have it."""
    return Pipeline(terms.encoding, len(terms.cohort), batch.shapes, batch.model)


def _require_averaging(strategy: Strategy) -> None:
    for base in type(strategy).__mro__:
        if base.__module__.startswith("flwr.") and base.__name__ in _NEED_SINGLE_UPDATES:
            raise UsageError(
                f"{base.__name__} looks at single updates, which nobody sees under secure aggregation; use a strategy "
                "that averages, such as FedAvg, FedAvgM, FedAdam, FedYogi, FedAdagrad or FedProx"
            )
