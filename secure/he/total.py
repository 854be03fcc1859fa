"""The sum of a round on the server: what devices upload, checked and added up, with masks or without."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from propolis.secure.errors import PeerError, Refusal
from propolis.secure.he.held import layout_of, scheme_of
from propolis.secure.he.keys import PublicKey
from propolis.secure.he.messages import LONGEST_NAME, MOST_METRICS, EncryptedPlan, EncryptedUpload, pieces
from propolis.secure.he.stream import Totals
from propolis.secure.he.tag import tag_bytes
from propolis.secure.prg import Mask

# What an upload may be longer than its ciphertexts: the names of its metrics.
_AROUND_CIPHERTEXTS = MOST_METRICS * (LONGEST_NAME + 8) + 256


@dataclass(frozen=True, slots=True, repr=False)
class Summed:
    """What a round comes to.

    Attributes:
        metrics: names of the last lanes.
        ciphertexts: with their tags, one after the other.
    """

    metrics: tuple[str, ...]
    ciphertexts: bytes


class EncryptedTotal:
    """The devices' uploads, added up as they come; a `propolis.secure.secagg.addition.Total`.

    Args:
        plan: of the attempt.
        key: that everything is under.
        metrics: names that the devices' metrics must have; None takes those of the first device.

    Attributes:
        offered: the names of the metrics that each device had.
    """

    def __init__(self, plan: EncryptedPlan, key: PublicKey, metrics: tuple[str, ...] | None = None) -> None:
        self._plan, self._key, self._metrics = plan, key, metrics
        self._scheme = scheme_of(key.parameters)
        self._tag_bytes = tag_bytes(key.parameters)
        self._totals: Totals | None = None
        self.offered: list[tuple[str, ...]] = []

    @property
    def largest_addend(self) -> int:
        """See `Total`."""
        size = self._scheme.upload_bytes + self._tag_bytes
        return self._chunks(("",) * MOST_METRICS) * size + _AROUND_CIPHERTEXTS

    def add(self, data: bytes) -> None:
        """See `Total`."""
        upload = EncryptedUpload.from_bytes(data, self.largest_addend)
        if upload.round_tag != self._plan.tag:
            raise PeerError(Refusal.STALE, "the upload is one of another attempt")
        if self._metrics is not None and upload.metrics != self._metrics:
            self.offered.append(upload.metrics)
            raise PeerError(Refusal.MODEL, "the metrics are not the other devices'")
        self._take(upload, self._scheme.upload_bytes)
        self.offered.append(upload.metrics)

    def without(self, masks: Sequence[Mask], threads: int = 1) -> Summed:
        """See `Total`; TenSEAL leaves nothing for more threads to do."""
        return Summed(self._metrics or (), b"".join(self._total.without(masks)))

    def summed(self) -> Summed:
        """The sum as it is; without ciphertexts before the first upload."""
        if self._totals is None:
            return Summed((), b"")
        return Summed(self._metrics or (), b"".join(self._total.ciphertexts()))

    def to_bytes(self) -> bytes:
        """See `Total`; empty before the first upload."""
        if self._totals is None:
            return b""
        summed = self.summed()
        return EncryptedUpload(self._plan.tag, summed.metrics, summed.ciphertexts).to_bytes()

    def restore(self, data: bytes) -> None:
        """See `Total`; no more is added to it then."""
        if data:
            self._take(EncryptedUpload.from_bytes(data, len(data)), self._scheme.ciphertext_bytes)

    @property
    def _total(self) -> Totals:
        if self._totals is None:
            raise AssertionError("nothing has been added up")
        return self._totals

    def _take(self, upload: EncryptedUpload, ciphertext_bytes: int) -> None:
        totals = self._totals or Totals(self._scheme.adder(self._key.key_id), self._chunks(upload.metrics))
        totals.add(pieces(upload.ciphertexts, ciphertext_bytes + self._tag_bytes))
        self._totals, self._metrics = totals, upload.metrics

    def _chunks(self, metrics: Sequence[str]) -> int:
        """Ciphertexts of an upload with these metrics."""
        return self._key.parameters.ciphertexts(layout_of(self._plan, metrics, self._key.parameters).count)
