"""`HeGrid`: any Flower Grid, and a server that adds up what it cannot read, and sends on what it cannot read.

Each device gets the encrypted model, trains, and sends its weights encrypted, which are added to one sum as they come:
in one exchange, or under masks in those of secure aggregation. The strategy chooses the devices and the configuration;
the model that it sees is the public one that the run began with, all the time.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray

from propolis.messages import RECORD, Arrays, with_model_elsewhere
from propolis.secure.errors import PeerError, Refusal, TooFewPeersError, UsageError
from propolis.secure.he.held import scheme_of
from propolis.secure.he.keys import PublicKey
from propolis.secure.he.messages import EncryptedPlan, EncryptedSum, Entry
from propolis.secure.he.total import EncryptedTotal
from propolis.secure.identity import TrustedRoster
from propolis.secure.secagg.messages import to_bitmap
from propolis.secure.secagg.plan import Kind
from propolis.server.batch import Batch, Outcome
from propolis.server.channel import Channel, Content
from propolis.server.directory import Directory
from propolis.server.encryption import Encryption, require_blind
from propolis.server.he_round import Asking, Collected, Given, collect
from propolis.server.masked_round import MaskedRounds
from propolis.server.protected_grid import HANDSHAKE_S, Attempts, ProtectedGrid
from propolis.server.secure_round import say_hello

_MOST_NAMED = 20
# What devices say where nothing can be done with the model: not a sum, or one that no round can go on from.
_OF_A_SPOILT_MODEL = (Refusal.CIPHERTEXT, Refusal.NOT_FINITE, Refusal.TRAINING_FAILED, Refusal.WEIGHT)
_log = logging.getLogger("propolis.server")


class HeGrid(ProtectedGrid):
    """Turns each batch of train or evaluate messages into one encrypted round.

    The one reply has the arrays of the messages as they were, and says how many devices took part; what they
    trained, and their metrics, are in `model` and `evaluation`, which who has the key opens.

    Args:
        grid: any Flower Grid.
        strategy: that will aggregate the reply.
        roster: who may take part, verified.
        encryption: see `Encryption`.
        exact: names of arrays that need more than a coarse grid, such as running statistics; integers always do.
        frozen: names of arrays that devices do not send back.
        journal: as in `propolis.server.grid.SecureGrid`, for rounds under masks.
        cancelled: set by somebody else to end a wait.

    Attributes:
        model: the global model; None before the first round.
        evaluation: the metrics of the last evaluation; None before the first one.

    Raises:
        UsageError: the strategy computes on the mean; or TenSEAL is not installed.
    """

    def __init__(
        self,
        grid: Grid,
        strategy: Strategy,
        roster: TrustedRoster,
        encryption: Encryption,
        *,
        exact: Iterable[str] = (),
        frozen: Iterable[str] = (),
        journal: Path | None = None,
        cancelled: threading.Event | None = None,
    ) -> None:
        super().__init__(grid, cancelled)
        require_blind(strategy)
        scheme_of(encryption.key.parameters)  # find out now whether TenSEAL is there
        self._weight_key = str(getattr(strategy, "weighted_by_key", "num-examples"))
        self._roster, self._encryption, self._attempts = roster, encryption, encryption.attempts
        self._exact, self._frozen = frozenset(exact), frozenset(frozen)
        self._directory = Directory(roster, bound=self.binds_identities)
        self._masked: MaskedRounds | None = None
        if encryption.masking is not None:
            self._masked = MaskedRounds(self._directory, encryption.masking, encryption.min_clients, journal)
        self._names = Attempts()
        self._metrics: dict[Kind, tuple[str, ...]] = {}  # what most devices sent last
        self.model: EncryptedSum | None = None
        self.evaluation: EncryptedSum | None = None
        # The model before it, None being the public one; nothing where there is none to go back to.
        self._before: list[EncryptedSum | None] = []

    def renew(self, roster: TrustedRoster) -> None:
        """See `ProtectedGrid.renew`."""
        if roster.number > self._roster.number:
            self._roster = roster
            self._directory.renew(roster)

    @property
    def room(self) -> int:
        """Most devices of a sum."""
        return self._encryption.key.parameters.clients

    def renew_key(self, key: PublicKey) -> None:
        """Go by another key from the next round on, in which devices open the model with the one that it is under."""
        if key.key_id != self._encryption.key.key_id:
            scheme_of(key.parameters)
            self._encryption = replace(self._encryption, key=key)
            _log.info("rounds are under key %s from here on", key.key_id.hex()[:16])

    def resume_from(self, metrics: Mapping[str, float], state: Mapping[str, NDArray[Any]]) -> None:
        """See `ProtectedGrid.resume_from`; raises UsageError where the state is no encrypted model.

        The model may be under an older key than the grid's: the next round puts it under that.
        """
        try:
            self.model, self.evaluation, before = (
                EncryptedSum.from_bytes(state[name].tobytes()) if len(state.get(name, ())) else None
                for name in ("model", "evaluation", "before")
            )
            self._before = [before] if "before" in state else []
            if self.model is None:
                raise UsageError("the run's state holds no encrypted model")
            EncryptedPlan.from_bytes(self.model.plan)
        except PeerError as error:
            raise UsageError(f"the run's state holds no encrypted model: {error}") from None

    def state(self) -> dict[str, NDArray[Any]]:
        """The encrypted model, the one before it and the evaluation, as bytes; none of the public model."""
        sums = {"model": self.model, "evaluation": self.evaluation}
        data = {name: total.to_bytes() for name, total in sums.items() if total is not None}
        for before in self._before:
            data["before"] = before.to_bytes() if before else b""
        return {name: np.frombuffer(each, np.uint8) for name, each in data.items()}

    def _prepared(self, batch: Batch) -> Batch:
        return batch

    def _round(self, batch: Batch) -> Message:
        channel = Channel(self.inner, batch.message_type, batch.messages[0].metadata.group_id, self._cancelled)
        given = Given.of(self._content(batch), batch.messages[0].metadata.group_id)
        collected = self._recalled(batch, given) or self._collected(batch, given, channel)
        alive = to_bitmap(collected.alive, len(self._roster.roster.entries))
        summed = collected.summed
        total = EncryptedSum(collected.plan.encoded, alive, summed.metrics, summed.ciphertexts, given.shared_input)
        if batch.kind is Kind.TRAIN:
            self._before, self.model = [self.model], total
        else:
            self.evaluation = total
        return self._reply(batch, len(collected.alive), channel)

    def _recalled(self, batch: Batch, given: Given) -> Collected | None:
        """What devices revealed to this round's sum before the server was started again."""
        if self._masked is None:
            return None
        return self._masked.recall(batch, given, self._roster, self._encryption.key)

    def _collected(self, batch: Batch, given: Given, channel: Channel) -> Collected:
        """A round with the devices that are there."""
        handshake = min(batch.timeout, HANDSHAKE_S)
        say_hello(channel, self._directory, self._roster.signed, batch.node_ids, handshake)
        nodes = self._directory.members(batch.node_ids)
        self._require(len(nodes), f"of {len(batch.messages)} devices said hello", channel)
        if len(nodes) > (most := self._encryption.key.parameters.clients):
            raise UsageError(f"{len(nodes)} devices in a round: the key has room for {most}; make one for more")
        plan = self._plan(batch)
        total = EncryptedTotal(plan, self._encryption.key, self._metrics.get(batch.kind))
        asked = Asking(channel, plan, total, nodes, given, batch.timeout)
        try:
            collected = self._masked.collect(asked, batch, self._roster) if self._masked else collect(asked)
            self._require(len(collected.alive), f"of {len(nodes)} devices sent an encrypted update", channel)
        except TooFewPeersError as error:
            judging = len(nodes) - len(_keyless(channel, nodes))
            raise TooFewPeersError(f"{error}{self._step_back(batch.kind, channel, judging)}") from None
        finally:
            _say_keyless(channel, nodes)
            if total.offered:
                self._metrics[batch.kind] = Counter(total.offered).most_common(1)[0][0]
        return collected

    def _step_back(self, kind: Kind, channel: Channel, asked: int) -> str:
        """Go back to the model before where so many devices refuse this one that no round can go on from it.

        It is a sum of fewer devices than they insist on, or one of them has sent what was no update, which nobody but
        who has the key can see; or one that can be opened, and that nothing can be trained from. It takes more than
        half of the devices. `asked` are those that have the keys to judge it. Returns what to say of it.
        """
        signs = _OF_A_SPOILT_MODEL if kind is Kind.TRAIN else _OF_A_SPOILT_MODEL[:1]
        refusals = sum(refusal in signs for refusal in channel.refusals.values())
        is_in_the_way = asked - refusals < self._encryption.min_clients <= asked
        if not is_in_the_way or 2 * refusals <= asked or not self._before:
            return ""
        self.model = self._before.pop()
        return f", {refusals} refused the model of the round before, which is therefore given up"

    def _require(self, count: int, what: str, channel: Channel) -> None:
        if count < (least := self._encryption.min_clients):
            raise TooFewPeersError(f"{count} {what}, {least} are needed{channel.said}")

    def _plan(self, batch: Batch) -> EncryptedPlan:
        self._names.next(batch.server_round)
        entries = self._entries(batch.model) if batch.kind is Kind.TRAIN else ()
        encryption = self._encryption
        return EncryptedPlan(
            run_id=self._names.run_id,
            round=self._names.number,
            attempt=self._names.attempt,
            kind=batch.kind,
            roster_number=self._roster.number,
            roster_digest=self._roster.digest,
            key_id=encryption.key.key_id,
            weight_key=self._weight_key,
            max_weight=encryption.max_weight,
            range=encryption.range,
            entries=entries,
        )

    def _entries(self, model: Arrays) -> tuple[Entry, ...]:
        """The arrays that devices send."""
        return tuple(
            Entry(name, str(array.dtype), array.shape, name in self._exact or array.dtype.kind != "f")
            for name, array in model.items()
            if name not in self._frozen
        )

    def _content(self, batch: Batch) -> Content:
        """The application's content, in which the arrays that devices trained are left out once they are encrypted."""
        if self.model is None:
            return Content(batch.content)
        names = {entry.name for entry in EncryptedPlan.from_bytes(self.model.plan).entries}
        return Content(with_model_elsewhere(batch.content, names), self.model.to_bytes())

    def _reply(self, batch: Batch, alive: int, channel: Channel) -> Message:
        """What a strategy can average without learning anything: the arrays that it knows, from so many devices."""
        content = RecordDict()
        if batch.kind is Kind.TRAIN:
            record = batch.content.array_records[batch.model_key]
            content[batch.model_key] = ArrayRecord({n: a for n, a in record.items() if n not in self._frozen})
        content["metrics"] = MetricRecord({self._weight_key: float(alive)})
        content[RECORD] = Outcome(alive, len(batch.messages), tuple(channel.failures.values())).record()
        return Message(content, reply_to=batch.messages[0])


def _keyless(channel: Channel, nodes: Mapping[int, int]) -> list[int]:
    """The devices that have not the key of the round, or not that of its model."""
    return sorted(index for index, node_id in nodes.items() if channel.refusals.get(node_id) is Refusal.HE_KEY)


def _say_keyless(channel: Channel, nodes: Mapping[int, int]) -> None:
    if keyless := _keyless(channel, nodes):
        named = ", ".join(map(str, keyless[:_MOST_NAMED]))
        _log.warning("%d without the key of this round or of its model: device %s", len(keyless), named)
