"""One attempt at one encrypted round: the mirror of `propolis.client.encrypted`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from propolis.secure.errors import PeerError, Refusal, RefusedError
from propolis.secure.he.held import layout_of, scheme_of
from propolis.secure.he.keys import PublicKey
from propolis.secure.he.messages import (
    LONGEST_NAME,
    MOST_METRICS,
    EncryptedPlan,
    EncryptedSum,
    EncryptedUpload,
    pieces,
)
from propolis.secure.he.stream import Totals
from propolis.secure.he.tag import tag_bytes
from propolis.secure.secagg.messages import to_bitmap
from propolis.secure.secagg.states import Exchange
from propolis.server.channel import Channel, Content

# What an upload may be longer than its ciphertexts: the names of its metrics.
_AROUND_CIPHERTEXTS = MOST_METRICS * (LONGEST_NAME + 8) + 256


class EncryptedRound:
    """The devices' uploads, added up as they come.

    Args:
        channel: to the devices.
        plan: of the attempt.
        key: that everything is under.
        metrics: names that the devices' metrics must have; None takes those of the first device.

    Attributes:
        alive: indices of the devices in the sum.
        offered: the names of the metrics that each device had.
    """

    def __init__(self, channel: Channel, plan: EncryptedPlan, key: PublicKey, metrics: tuple[str, ...] | None) -> None:
        self._channel, self._plan, self._key, self._metrics = channel, plan, key, metrics
        self._scheme = scheme_of(key.parameters)
        self._size = self._scheme.upload_bytes + tag_bytes(key.parameters)
        self._limit = self._chunks(("",) * MOST_METRICS) * self._size + _AROUND_CIPHERTEXTS
        self._totals: Totals | None = None
        self.alive: list[int] = []
        self.offered: list[tuple[str, ...]] = []

    def upload(self, nodes: Mapping[int, int], content: Content, timeout: float) -> None:
        """Have the devices train, and add up what they send; a device whose reply is refused is a drop-out."""
        indices = {node_id: index for index, node_id in nodes.items()}
        bodies = dict.fromkeys(indices, self._plan.encoded)
        for node_id, body in self._channel.ask(Exchange.ENCRYPT, bodies, timeout, lambda _: content):
            try:
                self._take(indices[node_id], body)
            except RefusedError as error:
                self._channel.failures[node_id] = f"{Exchange.ENCRYPT.label}: {error}"

    def total(self, members: int) -> EncryptedSum:
        """The sum, over a roster of so many members."""
        if self._totals is None:
            raise AssertionError("nothing has been added up")
        ciphertexts = b"".join(self._totals.ciphertexts())
        alive = to_bitmap(sorted(self.alive), members)
        return EncryptedSum(self._plan.encoded, alive, self._metrics or (), ciphertexts)

    def _take(self, index: int, body: bytes) -> None:
        upload = EncryptedUpload.from_bytes(body, self._limit)
        if upload.round_tag != self._plan.tag:
            raise PeerError(Refusal.STALE, f"device {index} answers another attempt than this one")
        self.offered.append(upload.metrics)
        metrics = upload.metrics if self._metrics is None else self._metrics
        if upload.metrics != metrics:
            raise PeerError(Refusal.MODEL, f"device {index} has other metrics than the others")
        totals = self._totals or Totals(self._scheme.adder(self._key.key_id), self._chunks(metrics))
        totals.add(pieces(upload.ciphertexts, self._size))
        self._totals, self._metrics = totals, metrics
        self.alive.append(index)

    def _chunks(self, metrics: Sequence[str]) -> int:
        """Ciphertexts of an upload with these metrics."""
        return self._key.parameters.ciphertexts(layout_of(self._plan, metrics, self._key.parameters).count)
