"""Flower devices that have a key of homomorphic encryption, in this process, and an HeGrid around them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextvars import ContextVar
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Message, RecordDict
from flwr.serverapp.strategy import FedAvg, Strategy
from secure_app import Arrays, Rounds, Wire, Work, app_of, body_of, honest, mean_shift

from propolis.client.encrypted_sums import OpenedModel, open_model, open_sum
from propolis.client.state import DeviceStore, MemoryStore
from propolis.flower import with_content
from propolis.messages import RECORD, protocol_record
from propolis.secure.he.layout import Opened
from propolis.secure.he.messages import EncryptedSum, EncryptedUpload
from propolis.secure.he.parameters import choose
from propolis.secure.secagg.messages import UploadReply, from_bytes, to_bytes
from propolis.secure.secagg.policy import Policy
from propolis.secure.secagg.states import Exchange
from propolis.server.encryption import Encryption
from propolis.server.he_grid import HeGrid
from propolis.server.masked_round import Masking
from propolis.simulations.federation import SIMULATED, EncryptionKeys, Federation, make_encryption_keys, make_federation
from propolis.simulations.local import LocalGrid


@cache
def encrypted_federation(
    devices: int, seeded: bool = False, bits: int = 16, number: int = 0, masked: bool = False
) -> Federation:
    """Keys take a moment to make; nothing of a federation is changed by what uses it."""
    return make_federation(devices, 0, choose(devices, bits, seeded=seeded), masked=masked)


def another_key(
    federation: Federation, clients: int | None = None, bits: int = 16, masked: bool = False
) -> EncryptionKeys:
    """One that the same root stands behind."""
    parameters = choose(clients or len(federation.devices), bits)
    return make_encryption_keys(federation.root, federation.devices, parameters, masked=masked)


# Whether updates are masked too; a fixture of the tests chooses.
under_masks = ContextVar("under_masks", default=False)


class EncryptedHive(Rounds):
    """Some devices that work as told, node id = index + 1, and an encrypting grid around them."""

    def __init__(
        self,
        devices: int = 5,
        work: Work = honest,
        *,
        policy: Policy = SIMULATED,
        strategy: Strategy | None = None,
        federation: Federation | None = None,
        seeded: bool = False,
        exact: Iterable[str] = (),
        frozen: Iterable[str] = (),
        journal: Path | None = None,
        **encryption: Any,
    ) -> None:
        self.federation = federation or encrypted_federation(devices, seeded)
        assert self.federation.he is not None
        self.keys = self.federation.he
        self.stores: list[DeviceStore] = [
            MemoryStore(state.copy(), policy, he_key=bundle)
            for state, bundle in zip(self.federation.devices, self.keys.bundles, strict=True)
        ]
        self.wire = Wire(LocalGrid(partial(app_of, work, self._store), devices))
        masking = Masking() if under_masks.get() else None
        given = {"key": self.keys.public, "max_weight": float(devices), "masking": masking, **encryption}
        self.encryption = Encryption(**given)
        self._more: dict[str, Any] = {"exact": exact, "frozen": frozen, "journal": journal}
        self.grid = self.new_grid(strategy or FedAvg())

    def new_grid(self, strategy: Strategy) -> HeGrid:
        """A server that knows nothing of what was before."""
        return HeGrid(self.wire, strategy, self.federation.verified_roster, self.encryption, **self._more)

    def opened(self, device: int = 0) -> OpenedModel:
        """The global model as a device sees it."""
        assert self.grid.model is not None
        return open_model(self.stores[device], self.grid.model.to_bytes())

    def evaluation(self, device: int = 0) -> Opened:
        """The devices' metrics of the model as one of them sees them."""
        assert self.grid.evaluation is not None
        return open_sum(self.stores[device], self.grid.evaluation.to_bytes())[1]

    @property
    def exchange(self) -> str:
        """In which devices train, and send what is encrypted."""
        return "encrypt" if self.encryption.masking is None else "upload"

    def uploads(self) -> list[EncryptedUpload]:
        """What devices sent."""
        sent = [message.content[RECORD][self.exchange] for message in self.wire.said(self.exchange)]
        return [EncryptedUpload.from_bytes(self._inside(body), 2**24) for body in sent]

    def have_send(self, node_id: int, change: Callable[[EncryptedUpload], bytes]) -> None:
        """Have a device send something else than its upload from here on."""

        def meddle(exchange: str, node: int, body: bytes) -> bytes:
            if (exchange, node) != (self.exchange, node_id):
                return body
            changed = change(EncryptedUpload.from_bytes(self._inside(body), 2**24))
            if self.encryption.masking is None:
                return changed
            return to_bytes(replace(from_bytes(UploadReply, body), vector=changed))

        self.wire.meddle = meddle

    def _inside(self, body: bytes) -> bytes:
        return body if self.encryption.masking is None else from_bytes(UploadReply, body).vector

    def lie(self, **changes: Any) -> None:
        """Have devices get another sum than the true one from here on."""
        assert self.grid.model is not None
        broadcast = replace(self.grid.model, **changes).to_bytes()

        def deliver(exchange: str, message: Message) -> Message:
            if exchange != self.exchange:
                return message
            told = protocol_record(Exchange[exchange.upper()], body_of(message), broadcast)
            return with_content(message, RecordDict({**message.content, RECORD: told}))

        self.wire.deliver = deliver


def require_opened(opened: OpenedModel, base: Arrays, indices: Iterable[int], tolerance: float = 2e-4) -> None:
    """That a model is the mean of these honest devices after one round from `base`."""
    shifted = mean_shift(indices)
    assert opened.arrays.keys() == base.keys()
    for name, array in opened.arrays.items():
        np.testing.assert_allclose(array, base[name] + shifted, atol=tolerance)


def sum_of(hive: EncryptedHive) -> EncryptedSum:
    assert hive.grid.model is not None
    return hive.grid.model
